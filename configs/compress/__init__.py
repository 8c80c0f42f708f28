"""Recipes for experiments.compress: ways to make a trained network smaller."""
