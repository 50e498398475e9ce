"""What an edit is once it is found: read, applied, exported, checked."""
