"""Diffusion experiments."""
