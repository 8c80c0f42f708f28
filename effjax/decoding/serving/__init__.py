"""Texts for many at once: a running batch that requests join and leave at any step."""
