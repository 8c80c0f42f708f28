"""What things cost: parameters and multiply-accumulates from the jaxpr, time from the clock."""

from effjax.measure.chips import CHIPS, Chip, chip
from effjax.measure.cost import Cost, count, count_bytes, count_parameters
from effjax.measure.latency import Comparison, Timing, compare, time_function
from effjax.measure.tree import Module, short, table, tree

__all__ = [
    "CHIPS",
    "Chip",
    "Comparison",
    "Cost",
    "Module",
    "Timing",
    "chip",
    "compare",
    "count",
    "count_bytes",
    "count_parameters",
    "short",
    "table",
    "time_function",
    "tree",
]
