"""Learning-rate schedules: a peak, a linear warm-up to it, and one of five ways down.

    0 <= s < w:    peak * s / w                         warm-up over w steps
    w <= s <= T:   peak * (end + (1 - end) f(u))        u = (s - w) / (T - w), f from 1 to 0

`s` counts the optimiser steps done, so the first step of a run with a warm-up has the learning rate 0, as in
optax. `end` is a fraction of the peak. Each kind makes an `optax.Schedule`, from optax's own where it has
one.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import optax

from effjax.errors import UsageError
from effjax.train.durations import Budget


def _after_warmup(warmup: str, peak: float, budget: Budget) -> tuple[int, Any]:
    """Returns the steps left after the warm-up and what puts the warm-up before a schedule of them."""
    steps = budget.steps(warmup)
    if steps >= budget.total_steps:
        raise UsageError(
            f"warmup is {warmup!r}, {steps} steps, and the whole run has {budget.total_steps}. "
            "Make it shorter."
        )

    def join(schedule: optax.Schedule) -> optax.Schedule:
        if steps == 0:
            return schedule
        return optax.join_schedules([optax.linear_schedule(0.0, peak, steps), schedule], [steps])

    return budget.total_steps - steps, join


def _check_end(end: float) -> None:
    if not 0 <= end <= 1:
        raise UsageError(f"end is a fraction of the peak, between 0 and 1, not {end}.")


@dataclasses.dataclass(frozen=True)
class Constant:
    """`f = 1`: the peak to the end."""

    warmup: str = "0 steps"

    def make(self, peak: float, budget: Budget) -> optax.Schedule:
        """The schedule of a run of `budget` with the highest learning rate `peak`."""
        _, join = _after_warmup(self.warmup, peak, budget)
        return join(optax.constant_schedule(peak))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """`f(u) = (1 + cos(pi u)) / 2`. Loshchilov and Hutter, arXiv:1608.03983."""

    warmup: str = "0 steps"
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_end(self.end)

    def make(self, peak: float, budget: Budget) -> optax.Schedule:
        """The schedule of a run of `budget` with the highest learning rate `peak`."""
        steps, join = _after_warmup(self.warmup, peak, budget)
        return join(optax.cosine_decay_schedule(peak, steps, alpha=self.end))


@dataclasses.dataclass(frozen=True)
class Linear:
    """`f(u) = 1 - u`."""

    warmup: str = "0 steps"
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_end(self.end)

    def make(self, peak: float, budget: Budget) -> optax.Schedule:
        """The schedule of a run of `budget` with the highest learning rate `peak`."""
        steps, join = _after_warmup(self.warmup, peak, budget)
        return join(optax.linear_schedule(peak, peak * self.end, steps))


@dataclasses.dataclass(frozen=True)
class WarmupStableDecay:
    """The peak held, then a decay over the last part of the run, with `v` from 0 to 1 across that part.

        linear:  f = 1 - v          sqrt:  f = 1 - sqrt(v)          cosine:  f = (1 + cos(pi v)) / 2

    A checkpoint of the stable part serves any longer run. Hu et al., arXiv:2404.06395; the shapes are
    compared by Hagele et al., arXiv:2405.18392.
    """

    warmup: str = "0 steps"
    decay: str = "20%"
    end: float = 0.0
    shape: Literal["linear", "sqrt", "cosine"] = "linear"

    def __post_init__(self) -> None:
        _check_end(self.end)

    def make(self, peak: float, budget: Budget) -> optax.Schedule:
        """The schedule of a run of `budget` with the highest learning rate `peak`."""
        steps, join = _after_warmup(self.warmup, peak, budget)
        decay = budget.steps(self.decay)
        if decay > steps:
            raise UsageError(
                f"warmup {self.warmup!r} and decay {self.decay!r} together are longer than the run of "
                f"{budget.total_steps} steps. Make one of them shorter."
            )
        stable = optax.constant_schedule(peak)
        if decay == 0:
            return join(stable)
        return join(optax.join_schedules([stable, self._decay(peak, decay)], [steps - decay]))

    def _decay(self, peak: float, steps: int) -> optax.Schedule:
        if self.shape == "linear":
            return optax.linear_schedule(peak, peak * self.end, steps)
        if self.shape == "cosine":
            return optax.cosine_decay_schedule(peak, steps, alpha=self.end)

        def one_minus_sqrt(step: Any) -> Any:
            done = jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)
            return peak * (self.end + (1 - self.end) * (1 - jnp.sqrt(done)))

        return one_minus_sqrt


@dataclasses.dataclass(frozen=True)
class UnifiedBudgetAware:
    """The budget-aware family with one shape parameter; `phi = 2` is cosine annealing.

        f(u) = 2 c / (2 phi + (2 - phi) c),   c = 1 + cos(pi u)

    Dividing through by c and with `c / 2 = cos^2(pi u / 2)` the same function reads

        f(u) = 1 / (1 + (phi / 2) tan^2(pi u / 2)),   f / (1 - f) = (2 / phi) cot^2(pi u / 2)

    which shows everything the tests hold it to: it falls from 1 to 0 for every phi, the odds are those of the
    cosine times 2 / phi, so a larger phi decays faster, phi -> 0 is constant, and phi and 4 / phi are each
    other
    turned by half a turn: f(u; phi) = 1 - f(1 - u; 4 / phi).

    Source: Tang et al., "Stepsize anything: A unified learning rate schedule for budgeted-iteration
    training", arXiv:2505.24452. The equation was checked against an independent public implementation and
    against the identities above, not against the paper's own text. The paper ties phi to the condition number
    of the problem. Measured on a noisy quadratic (100 steps, peak 1 / largest eigenvalue, noise proportional
    to the Hessian) the best phi falls as the condition number grows, 32, 5.7, 1.4 at 5, 30, 300: slow
    directions need the rate held up for longer. At 30 steps the best phi ends at 0.3 to 0.7 of the loss of
    step decay.

    Attributes:
      phi: positive; about 0.25 to 10.
    """

    phi: float
    warmup: str = "0 steps"
    end: float = 0.0

    def __post_init__(self) -> None:
        _check_end(self.end)
        if self.phi <= 0:
            raise UsageError(
                f"phi must be positive, not {self.phi}. 2 is cosine annealing, less decays later."
            )

    def make(self, peak: float, budget: Budget) -> optax.Schedule:
        """The schedule of a run of `budget` with the highest learning rate `peak`."""
        steps, join = _after_warmup(self.warmup, peak, budget)
        cosine = optax.cosine_decay_schedule(1.0, steps)

        def schedule(step: Any) -> Any:
            half_c = cosine(step)
            f = 2 * half_c / (self.phi + (2 - self.phi) * half_c)
            return peak * (self.end + (1 - self.end) * f)

        return join(schedule)


KINDS = {
    "constant": Constant,
    "cosine": Cosine,
    "linear": Linear,
    "wsd": WarmupStableDecay,
    "uba": UnifiedBudgetAware,
}
