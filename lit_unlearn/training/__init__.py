"""The commands of the trainer: how recipes are found, where runs are kept, and on which device they run."""
