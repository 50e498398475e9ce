"""Basics that the other packages use: files, signals, errors, YAML, devices; independent of models and edits."""
