"""The commands of the trainer: recipes, folders of runs, where they run."""
