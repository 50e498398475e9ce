"""Runs side by side: Markdown, CSV, one HTML page, tables, figures."""
