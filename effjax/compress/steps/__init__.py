"""Steps of a recipe: functions from a trained network to a smaller one.

A step is a frozen dataclass with `apply(subject, calibration) -> subject`: `effjax.compress.subject`.
"""
