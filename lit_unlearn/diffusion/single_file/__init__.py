"""Checkpoints that are one file in the layout of the original code: the place of each weight of diffusers in them."""
