"""What the step costs at least: two products a channel of an active neuron, whose rows come once."""

from typing import Any

from jax.experimental import pallas as pl


def forward(
    gate: Any, x: Any, expand: Any, contract: Any, *, active: int | None = None, **_: Any
) -> pl.CostEstimate:
    """By shapes and the number of active neurons; None counts all, as it is known only at run time."""
    count = counted(gate, active)
    vectors = sum(array.size * array.dtype.itemsize for array in (gate, x))
    vectors += contract.shape[1] * x.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * count * channels(expand, contract),
        transcendentals=0,
        bytes_accessed=vectors + copied(count, expand, contract),
    )


def counted(gate: Any, active: int | None) -> int:
    """Neurons that count as active, of those that there are."""
    return int(gate.size if active is None else min(active, gate.size))


def channels(expand: Any, contract: Any) -> int:
    """Weights of a neuron that are fetched."""
    return int(expand.shape[1] + contract.shape[1])


def copied(rows: int, expand: Any, contract: Any) -> int:
    """Bytes of so many rows of both matrices."""
    return rows * channels(expand, contract) * expand.dtype.itemsize


def fetched(active: int, neurons: int, together: int) -> int:
    """Rows that come where so many stand together, which come if one is active; they are independent."""
    passive = (1 - active / neurons) ** together
    return round((1 - passive) * neurons)
