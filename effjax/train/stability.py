"""Against spikes: gradients clipped where they stand out of those before them, and steps that are left out.

    clip     z = (|g| - m) / s,     |g| -> m + Z^2 s / z                  where z > Z
    skip     no update, and the optimiser's state as it was               where (loss - m) / s > Z

m and s^2 are running averages, of the norms of gradients or of losses: over the first `warmup` steps their
mean and variance, in which nothing is clipped or left out, then m <- d m + (1 - d) x and
s^2 <- d s^2 + (1 - d) (x - m)^2 with the new m. x is the norm after clipping, and a loss that was left out is
not in them, so that one spike does not let the next one through. A batch whose step is left out is not seen
again.

The clipping is Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv:2504.02507,
with its published code's defaults; batches at spikes were left out by hand for PaLM, Chowdhery et al. 2022,
section 5.1.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.train.agvm import ModuleScales

EPSILON = 1e-6


class Running(NamedTuple):
    """Running averages of a figure: how often it was seen, its mean and its variance."""

    seen: Any
    mean: Any
    variance: Any


@dataclasses.dataclass(frozen=True)
class Spikes:
    """What stands out.

    Attributes:
      score: Z, standard deviations above the mean.
      decay: d of the running averages.
      warmup: steps whose mean and variance they begin with.
    """

    score: float = 2.5
    decay: float = 0.97
    warmup: int = 25

    def __post_init__(self) -> None:
        if self.score <= 0 or not 0 < self.decay < 1 or self.warmup < 2:
            raise UsageError(
                f"score={self.score} is above 0, decay={self.decay} between 0 and 1, and "
                f"warmup={self.warmup} at least 2."
            )

    def begin(self) -> Running:
        """Averages of nothing yet."""
        return Running(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.zeros(()))

    def above(self, running: Running, x: Float[Array, ""]) -> Float[Array, ""]:
        """z where the averages hold already, else 0."""
        z = (x - running.mean) / (jnp.sqrt(running.variance) + EPSILON)
        return jnp.where(running.seen >= self.warmup, z, 0.0)

    def with_one_more(self, running: Running, x: Float[Array, ""]) -> Running:
        """The averages after another number."""
        count = running.seen + 1
        early = running.mean + (x - running.mean) / count
        spread = running.variance + ((x - running.mean) * (x - early) - running.variance) / count
        late = self.decay * running.mean + (1 - self.decay) * x
        wide = self.decay * running.variance + (1 - self.decay) * jnp.square(x - late)
        begun = running.seen < self.warmup
        return Running(count, jnp.where(begun, early, late), jnp.where(begun, spread, wide))


class ClipState(NamedTuple):
    """Of clipping: averages of norms, and how many gradients were clipped."""

    norms: Running
    clipped: Any


class SkipState(NamedTuple):
    """Of leaving out: averages of losses, how many steps were left out, and the state of the optimiser."""

    losses: Running
    skipped: Any
    inner: Any


def clip_spikes(spikes: Spikes) -> optax.GradientTransformation:
    """Scales down a gradient whose norm stands out; the further it does, the more."""

    def init(_: Any) -> ClipState:
        return ClipState(spikes.begin(), jnp.zeros((), jnp.int32))

    def update(gradient: Any, state: ClipState, _: Any = None) -> tuple[Any, ClipState]:
        norm = optax.tree.norm(gradient).astype(jnp.float32)
        z = spikes.above(state.norms, norm)
        stands_out = z > spikes.score
        bound = state.norms.mean + spikes.score**2 * jnp.sqrt(state.norms.variance) / jnp.where(
            stands_out, z, 1.0
        )
        kept = jnp.where(stands_out, bound, norm)
        factor = jnp.where(stands_out, bound / jnp.maximum(norm, EPSILON), 1.0)
        scaled = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradient)
        return scaled, ClipState(spikes.with_one_more(state.norms, kept), state.clipped + stands_out)

    return optax.GradientTransformation(init, update)


def skip_spikes(inner: optax.GradientTransformation, spikes: Spikes) -> optax.GradientTransformationExtraArgs:
    """Leaves out the update of a step whose loss stands out; `update` takes the loss as `value`."""
    optimiser = optax.with_extra_args_support(inner)

    def init(params: Any) -> SkipState:
        return SkipState(spikes.begin(), jnp.zeros((), jnp.int32), optimiser.init(params))

    def update(
        gradient: Any, state: SkipState, params: Any = None, *, value: Float[Array, ""], **others: Any
    ) -> tuple[Any, SkipState]:
        loss = value.astype(jnp.float32)
        stands_out = spikes.above(state.losses, loss) > spikes.score
        updates, after = optimiser.update(gradient, state.inner, params, value=value, **others)
        updates = jax.tree.map(lambda leaf: jnp.where(stands_out, jnp.zeros_like(leaf), leaf), updates)
        kept = lambda old, new: jax.tree.map(lambda a, b: jnp.where(stands_out, a, b), old, new)  # noqa: E731
        losses = kept(state.losses, spikes.with_one_more(state.losses, loss))
        return updates, SkipState(losses, state.skipped + stands_out, kept(state.inner, after))

    return optax.GradientTransformationExtraArgs(init, update)


def counts(opt_state: Any) -> dict[str, Array]:
    """Gradients clipped, steps left out so far, and scales of modules, by the name of a metric."""
    found: dict[str, Array] = {}
    waiting = [opt_state]
    while waiting:
        own = _states(waiting.pop())
        for state in own:
            if isinstance(state, ClipState):
                found["clipped_steps"] = state.clipped
            elif isinstance(state, ModuleScales):
                found |= {f"module_scale_{i}": state.scales[i] for i in range(1, len(state.scales))}
                waiting.append(state.inner)
            else:
                found["skipped_steps"] = state.skipped
                waiting.append(state.inner)
    return found


def _states(tree: Any) -> list[Any]:
    known = ClipState, SkipState, ModuleScales
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, known))
    return [leaf for leaf in leaves if isinstance(leaf, known)]
