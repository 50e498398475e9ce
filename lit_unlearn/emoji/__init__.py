"""How the embedded model emoji-sd came to be: artwork, captions and the modules that trained its parts."""
