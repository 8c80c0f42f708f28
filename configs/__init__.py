"""Experiments as `get_config()` files, one a paper or family."""
