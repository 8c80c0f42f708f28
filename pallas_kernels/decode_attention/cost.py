"""What decoding costs at least: two products a key, one exponential a score, every key and value once."""

from typing import Any

from jax.experimental import pallas as pl


def forward(q: Any, k: Any, v: Any, lengths: Any, pages: Any = None, valid: Any = None, **_: Any) -> Any:
    """As if all slots were in use: how many are is known only at run time."""
    batch, tokens, heads, size = q.shape
    values = v.shape[-1]
    slots = k.shape[1] if pages is None else k.shape[1] * pages.shape[1]
    scores = batch * tokens * heads * slots
    cached = batch * slots * k.shape[2] * (size + values)
    moved = (cached + q.size + q.size // size * values) * q.dtype.itemsize
    moved += sum(array.size * array.dtype.itemsize for array in (lengths, pages, valid) if array is not None)
    return pl.CostEstimate(flops=2 * scores * (size + values), transcendentals=scores, bytes_accessed=moved)
