"""LightningModules: one file per method, its loss and nothing else."""
