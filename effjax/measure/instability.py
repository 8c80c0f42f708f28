"""How steady training is, from the loss curves of several seeds and learning rates.

    diverged      not a number, or   mean of the last losses - least running mean > rise
    spikes        steps whose loss is more than d standard deviations above the mean of those before
    sensitivity   mean over learning rates of  min(loss at the end, first loss) - least loss at the end
    threshold     the smallest learning rate with which some seed diverged

Formats of fewer bits are held against each other by all four on the same seeds and learning rates: training
that is as good at its best learning rate may leave fewer of them.

Seeds and learning rates: Lee et al. 2024, arXiv:2405.18710. Sensitivity: Wortsman et al. 2023,
arXiv:2309.14322, section 2. Spikes by standard deviations: OLMo 2, 2025, arXiv:2501.00656, which takes 7 of
them and the 1,000 steps before.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from effjax.errors import UsageError


def running(losses: Float[np.ndarray, "*runs steps"], window: int) -> Float[np.ndarray, "*runs means"]:
    """Means of so many losses in a row; none behind a loss that is not finite."""
    if not 1 <= window <= losses.shape[-1]:
        raise UsageError(f"window={window} must be from 1 to the {losses.shape[-1]} steps of a curve.")
    known = np.where(np.isfinite(losses), losses, np.nan).astype(np.float64)
    sums = np.cumsum(np.pad(known, [(0, 0)] * (losses.ndim - 1) + [(1, 0)]), axis=-1)
    return (sums[..., window:] - sums[..., :-window]) / window


def diverged(
    losses: Float[np.ndarray, "*runs steps"], window: int = 20, rise: float = 0.5
) -> Bool[np.ndarray, "*runs"]:
    """Whether a run went astray and did not come back.

    Args:
      losses: of training, one a step; with one that is not finite the run diverged.
      window: steps that are averaged.
      rise: of the last mean above the least, in the unit of the loss.
    """
    means = running(losses, window)
    return np.asarray(~(means[..., -1] - np.fmin.reduce(means, axis=-1) <= rise))


def spikes(
    losses: Float[np.ndarray, "*runs steps"], window: int = 100, deviations: float = 7.0
) -> Int[np.ndarray, "*runs"]:
    """How many steps stand out above the `window` before them, or are not finite; not of the first `window`.

    Raises:
      UsageError: where a curve is not longer than the window.
    """
    if losses.shape[-1] <= window:
        raise UsageError(f"curves of {losses.shape[-1]} steps have none after window={window}: choose fewer.")
    wide = np.where(np.isfinite(losses), losses, np.nan).astype(np.float64)
    before = np.lib.stride_tricks.sliding_window_view(wide, window, axis=-1)[..., :-1, :]  # [.., steps, w]
    out = wide[..., window:] > before.mean(-1) + deviations * before.std(-1)
    return np.asarray(np.sum(out | np.isnan(wide[..., window:]), axis=-1))


def sensitivity(ends: Float[np.ndarray, "rates *seeds"], first: float) -> float:
    """How much is lost on average by a learning rate that is not the best.

    Args:
      ends: losses at the end.
      first: loss before training, which a run that went astray is taken to have.
    """
    ends = np.minimum(np.nan_to_num(ends, nan=np.inf), first)
    return float(np.mean(ends - ends.min()))


@dataclasses.dataclass(frozen=True)
class Stability:
    """What is said of one way of training.

    Attributes:
      rates: learning rates in order.
      diverged: runs that did, for each learning rate.
      spikes: in all runs, for each learning rate.
      ends: mean losses at the end over the seeds that did not diverge; NaN where none is left.
      sensitivity: see `sensitivity`.
      threshold: the smallest learning rate with which a run diverged; None where none did.
    """

    rates: tuple[float, ...]
    diverged: tuple[int, ...]
    spikes: tuple[int, ...]
    ends: tuple[float, ...]
    sensitivity: float
    threshold: float | None


def stability(
    losses: Float[np.ndarray, "rates seeds steps"],
    rates: tuple[float, ...],
    window: int = 20,
    rise: float = 0.5,
    spike_window: int = 100,
    deviations: float = 7.0,
) -> Stability:
    """Sums up runs with several learning rates and seeds.

    Args:
      losses: of training.
      rates: learning rates, rising.
      window: steps of a running mean.
      rise: see `diverged`.
      spike_window: see `spikes`.
      deviations: see `spikes`.

    Raises:
      UsageError: where learning rates are not those of the curves, or do not rise.
    """
    if len(rates) != len(losses) or list(rates) != sorted(set(rates)):
        raise UsageError(f"{len(losses)} rows of curves need as many rising learning rates, not {rates}.")
    astray = diverged(losses, window, rise)  # [rates, seeds]
    ends = running(losses, window)[..., -1]  # [rates, seeds]
    first = float(np.mean(losses[..., 0]))
    kept = [row[~lost] for row, lost in zip(ends, astray, strict=True)]
    return Stability(
        rates=rates,
        diverged=tuple(int(n) for n in astray.sum(-1)),
        spikes=tuple(int(n) for n in spikes(losses, spike_window, deviations).sum(-1)),
        ends=tuple(float(np.mean(row)) if len(row) else float("nan") for row in kept),
        sensitivity=sensitivity(ends, first),
        threshold=next((rate for rate, row in zip(rates, astray, strict=True) if row.any()), None),
    )
