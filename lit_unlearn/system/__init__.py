"""What the other rooms stand on: files, signals, errors, YAML, devices. Nothing here knows of models or edits."""
