"""Language experiments."""
