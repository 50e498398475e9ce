"""The kinds of concepts, in a module that imports nothing, so that ``--help`` can list them at once."""

KINDS = ("object", "person", "character", "style", "scene", "action", "content")
"""Content is what a picture may not show: nudity, blood, violence."""
