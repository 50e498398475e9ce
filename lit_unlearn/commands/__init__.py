"""The commands that need no trainer. Each has one file with its parser and the code that it runs.

Modules that take seconds to import are imported when a command runs, not when its options are parsed.
"""
