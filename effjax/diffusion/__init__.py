"""Diffusion: processes that turn pictures into noise, and samplers that walk back."""
