"""How the embedded model emoji-sd was made: artwork, captions and the modules that trained its parts."""
