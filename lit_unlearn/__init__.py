"""Concept unlearning for text-to-image diffusion models, as PyTorch Lightning recipes.

Importing the package loads nothing heavy; import what you need from its sub-packages.
"""

__version__ = "0.1.0"
