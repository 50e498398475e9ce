"""LightningModules: one file per method, with its loss and nothing else."""
