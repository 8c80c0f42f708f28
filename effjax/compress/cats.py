"""CATS: a trained language model whose gated perceptrons leave out the neurons with a small gate.

    t_l = quantile_k( |activation(x W_gate)| )         of layer l, over the tokens of calibration batches

k is the share of neurons that is left out. Nothing is trained and no weight changes. Three steps, each a pure
function:

    >>> thresholds = calibrate(model, variables, batches, sparsity=0.5)
    >>> sparse, variables = thresholded(model, variables, thresholds)        # evaluate it like any model
    >>> fast, variables = by_rows(sparse, variables)       # the same function, to decode with: compress.rows

Lee et al., COLM 2024, arXiv:2404.08763, section 3.2. The published code keeps a histogram of 1,000 bins
between -1 and 1; here it has one for each of the upper 16 bits of a float32, so that a threshold is exact to
0.8% at any scale. Fine-tuning with low-rank adapters is the task `low_rank`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt16

from effjax.errors import UsageError
from effjax.ffn.cats import CATS
from effjax.ffn.gated import Gated
from effjax.models.lm import LM

Variables = Mapping[str, Any]
Batch = Mapping[str, Array]

_BINS = 2**15  # of float32 without a sign, by the upper 16 bits


def calibrate(
    model: LM, variables: Variables, batches: Iterable[Batch], sparsity: float
) -> Float[np.ndarray, " depth"]:
    """Measures the threshold of each layer.

    Args:
      model: with gated perceptrons.
      variables: of it.
      batches: `tokens` `[B, N]`, and if they are packed `positions` and `segments`, whose 0 marks padding.
      sparsity: k above.

    Raises:
      UsageError: for a sparsity outside of [0, 1), no tokens, or other perceptrons.
    """
    _check(sparsity)
    counts = histogram(*thresholded(model, variables, np.zeros(model.depth, np.float32)), batches)
    return np.asarray([quantile(row, sparsity) for row in counts], np.float32)


@dataclasses.dataclass(frozen=True)
class Thresholding:
    """CATS as one choice.

    Attributes:
      sparsity: share of neurons to leave out, from 0 to below 1.
      batches: how many batches of training text thresholds are measured on.
    """

    sparsity: float
    batches: int = 8

    def __post_init__(self) -> None:
        _check(self.sparsity)
        if self.batches < 1:
            raise UsageError(f"batches={self.batches}: measure thresholds on at least one.")

    def applied(self, model: LM, variables: Variables, batches: Iterable[Batch]) -> tuple[LM, dict[str, Any]]:
        """The model that leaves small gates out, and its variables."""
        return thresholded(model, variables, calibrate(model, variables, batches, self.sparsity))


def _check(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise UsageError(
            f"sparsity is {sparsity}: give the share of neurons to leave out, from 0 to below 1."
        )


def histogram(model: LM, variables: Variables, batches: Iterable[Batch]) -> Int[np.ndarray, "depth bins"]:
    """How often each size of |activation(x W_gate)| occurs in each layer; a bin is the upper 16 bits.

    Args:
      model: that leaves gates out, or none where its thresholds are 0.
      variables: of it.
      batches: as in `calibrate`.

    Raises:
      UsageError: for batches without tokens.
    """

    @jax.jit
    def sizes(variables: Variables, batch: Batch) -> UInt16[Array, "depth b n f"]:
        inputs = batch["tokens"], batch.get("positions"), batch.get("segments")
        _, told = model.apply(variables, *inputs, mutable=["magnitudes"])
        (found,) = told["magnitudes"]["blocks"]["ffn"]["sizes"]
        return found

    counts = np.zeros((model.depth, _BINS), np.int64)
    for batch in batches:
        there = np.ones(np.shape(batch["tokens"]), bool)
        if "segments" in batch:
            there = np.asarray(batch["segments"]) > 0
        for layer, found in enumerate(np.asarray(sizes(variables, batch))):
            counts[layer] += np.bincount(found[there].ravel(), minlength=_BINS)
    if not counts.any():
        raise UsageError("thresholds are measured on tokens: give at least one batch that holds any.")
    return counts


def left_out(model: LM, variables: Variables, batches: Iterable[Batch]) -> Float[np.ndarray, " depth"]:
    """The share of neurons that each layer leaves out of these tokens, to the width of a bin.

    Args:
      model: that leaves gates out.
      variables: of it.
      batches: as in `calibrate`.
    """
    counts = histogram(model, variables, batches)
    held = np.asarray(variables["thresholds"]["blocks"]["ffn"]["threshold"], np.float32)
    at = held.view(np.uint32) >> 16
    below = np.asarray([row[:bin_].sum() for row, bin_ in zip(counts, at, strict=True)])
    inside = np.asarray(
        [
            (threshold - _edge(bin_)) / (_edge(bin_ + 1) - _edge(bin_)) * row[bin_]
            for row, bin_, threshold in zip(counts, map(int, at), held, strict=True)
        ]
    )
    return np.asarray((below + inside) / counts.sum(axis=1), np.float64)


def quantile(counts: Int[np.ndarray, " bins"], share: float) -> float:
    """The size that `share` of all counted lie below; 0 leaves out none."""
    below = np.cumsum(counts)
    wanted = share * below[-1]
    if wanted == 0:
        return 0.0
    bin_ = int(np.searchsorted(below, wanted))
    low, high = _edge(bin_), _edge(bin_ + 1)
    inside = 1 - (below[bin_] - wanted) / counts[bin_]
    return low + inside * (high - low)


def _edge(bin_: int) -> float:
    """The smallest number of a bin."""
    return float(np.asarray([bin_ << 16], np.uint32).view(np.float32)[0])


def thresholded(
    model: LM, variables: Variables, thresholds: Float[np.ndarray, " depth"]
) -> tuple[LM, dict[str, Any]]:
    """Returns the model that leaves small gates out, and its variables; parameters stay as they are.

    Args:
      model: with gated perceptrons.
      variables: of it.
      thresholds: one for each layer.

    Raises:
      UsageError: for other perceptrons, or not as many thresholds as layers.
    """
    ffn = model.block.ffn
    if not isinstance(ffn, Gated | CATS) or getattr(ffn, "use_bias", False) or getattr(ffn, "by_rows", False):
        raise UsageError(
            f"CATS is made of gated perceptrons without biases: {type(ffn).__name__} is none"
            f"{' that is stored by columns' if isinstance(ffn, CATS) else ''}."
        )
    if np.shape(thresholds) != (model.depth,):
        raise UsageError(f"{np.size(thresholds)} thresholds for {model.depth} layers: give one for each.")
    sparse = CATS(hidden=ffn.hidden, activation=ffn.activation)
    held = {"threshold": jnp.asarray(thresholds, jnp.float32)}
    return (
        model.clone(block=model.block.clone(ffn=sparse)),
        {**variables, "thresholds": {"blocks": {"ffn": held}}},
    )
