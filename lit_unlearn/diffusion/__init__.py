"""Everything that depends on diffusers and transformers; other parts of the package use ``Pipeline``."""
