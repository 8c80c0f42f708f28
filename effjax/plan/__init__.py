"""What a run will need on chips that are not here: compiled ahead of time, then read."""
