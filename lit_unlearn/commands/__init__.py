"""The commands that need no trainer, one file each: its parser, and what it runs.

What takes seconds to import is imported when a command runs, not when it is parsed.
"""
