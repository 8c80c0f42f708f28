"""What things cost: parameters, arithmetic, bytes and memory from the jaxpr, time from the clock."""

from effjax.measure.chips import CHIPS, Chip, chip
from effjax.measure.cost import Cost, count
from effjax.measure.latency import Comparison, Timing, compare, time_function
from effjax.measure.parameters import count_bytes, count_parameters
from effjax.measure.tree import Module, short, table, tree
from effjax.measure.work import Work

__all__ = [
    "CHIPS",
    "Chip",
    "Comparison",
    "Cost",
    "Module",
    "Timing",
    "Work",
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
