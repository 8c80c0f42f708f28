"""What things cost: work and memory from the jaxpr, time from the clock, floors from a table of chips."""

from effjax.measure.chips import CHIPS, Chip, chip
from effjax.measure.coding_rate import coding_rate, density, subspace_coding_rate
from effjax.measure.cost import Cost, count
from effjax.measure.cpu import measure_cpu
from effjax.measure.latency import Comparison, Timing, compare, time_function
from effjax.measure.parameters import count_bytes, count_parameters
from effjax.measure.roofline import (
    Floor,
    attainable,
    collective_seconds,
    floor,
    floor_of,
    intensity,
    ridge,
)
from effjax.measure.tree import Module, short, table, tree
from effjax.measure.work import Work

__all__ = [
    "CHIPS",
    "Chip",
    "Comparison",
    "Cost",
    "Floor",
    "Module",
    "Timing",
    "Work",
    "attainable",
    "chip",
    "coding_rate",
    "collective_seconds",
    "compare",
    "count",
    "count_bytes",
    "count_parameters",
    "density",
    "floor",
    "floor_of",
    "intensity",
    "measure_cpu",
    "ridge",
    "short",
    "subspace_coding_rate",
    "table",
    "time_function",
    "tree",
]
