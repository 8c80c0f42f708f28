"""The table of what works and how that is known; reading it imports neither jax nor flax."""

from effjax.catalog.entry import FAMILIES, NOT_MEASURED, STATUSES, Entry, Size
from effjax.catalog.table import find, get, load, problems, render_markdown

__all__ = [
    "FAMILIES",
    "NOT_MEASURED",
    "STATUSES",
    "Entry",
    "Size",
    "find",
    "get",
    "load",
    "problems",
    "render_markdown",
]
