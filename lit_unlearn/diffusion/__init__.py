"""The only part of the package that knows diffusers and transformers."""
