"""Checkpoints that are one file in the layout of the original code: names of weights, reading, and writing edits."""
