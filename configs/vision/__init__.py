"""Vision experiments."""
