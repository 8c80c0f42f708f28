"""The drivers a person runs: `python -m experiments.NAME`."""
