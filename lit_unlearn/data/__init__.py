"""Concept sets (YAML, package data) and what turns them into batches of prompts."""
