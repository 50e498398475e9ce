"""Compares runs: Markdown, CSV, one HTML page, tables, figures."""
