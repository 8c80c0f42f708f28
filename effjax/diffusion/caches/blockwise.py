"""Block-wise adaptive caching: every branch of every layer is computed at its own few calls of the sampler.

    h_(l, n) = branch_l(x) at the calls that branch l is updated at, else what it was at the last of them
    x <- x + gate(t_n) h

A sampler runs once with everything computed (`calibrated`); from what the branches gave there follows when
each is computed from then on (`effjax.diffusion.caches.schedule`), for all requests of as many calls. Outputs
are kept before their gate, which follows the time and costs nothing.

Source: Ji et al., "Block-wise Adaptive Caching for Accelerating Diffusion Policy", ICLR 2026. There the
network is a policy for robots without gates; its first call is always computed, as here.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.diffusion.caches import schedule
from effjax.diffusion.caches.stages import Stages
from effjax.diffusion.denoiser import Condition, Denoiser
from effjax.errors import UsageError

Plan = tuple[tuple[tuple[bool, ...], ...], ...]


@flax.struct.dataclass
class Memory:
    """What a sampler carries.

    Attributes:
      kept: `[layers, branches, B, N, C]`, the branches' outputs when they were last computed.
      call: calls so far.
      branches: computed so far, over all layers.
    """

    kept: Any
    call: Any
    branches: Any

    @property
    def whole_calls(self) -> Any:
        """How many calls of the whole network the computed branches are worth."""
        return self.branches / (self.kept.shape[0] * self.kept.shape[1])


@dataclasses.dataclass(frozen=True)
class BlockwiseCache:
    """Reuses the outputs of branches.

    Attributes:
      updates: calls at which a branch is computed.
      union: branches that are computed also wherever a feed-forward branch behind them is.
      plan: `[calls][layers][branches]`, when each is computed; None before `calibrated`.
    """

    updates: int = 10
    union: int = 3
    plan: Plan | None = None

    def __post_init__(self) -> None:
        if self.updates < 1 or self.union < 0:
            raise UsageError(
                f"updates={self.updates} and union={self.union} must be at least 1 and 0: a branch is "
                f"computed at the first call."
            )

    def calibrated(self, outputs: Float[np.ndarray, "calls layers branches b n c"]) -> "BlockwiseCache":
        """The cache for samplers of as many calls.

        Args:
          outputs: of every branch at every call, when all were computed: `Memory.kept` of a walk with
            `everything`.

        Raises:
          UsageError: for more updates than calls, or more branches in the union than there are.
        """
        calls, layers, branches = outputs.shape[:3]
        fresh, volatile = np.zeros((calls, layers, branches), bool), np.zeros((layers, branches))
        for layer in range(layers):
            for branch in range(branches):
                own = outputs[:, layer, branch]
                chosen = schedule.best_updates(schedule.similarity(own), self.updates)
                fresh[chosen, layer, branch] = True
                volatile[layer, branch] = schedule.volatility(own)
        return dataclasses.replace(self, plan=_hashable(schedule.bubbled(fresh, volatile, self.union)))

    def wrap(self, stages: Stages, calls: int) -> Denoiser:
        """A denoiser that remembers.

        Args:
          stages: the network in pieces.
          calls: how often a sampler will call it.

        Raises:
          UsageError: before `calibrated`, or for another number of calls or layers.
        """
        if self.plan is None:
            raise UsageError("bac has no plan yet: calibrate it on a sampler that computes everything.")
        plan = np.asarray(self.plan)  # [calls, layers, branches]
        if plan.shape != (calls, stages.depth, stages.branches):
            raise UsageError(
                f"the plan is for {plan.shape[0]} calls of {plan.shape[1]} layers, and here are {calls} of "
                f"{stages.depth}: calibrate it again."
            )
        table = jnp.asarray(plan)

        def start(x: Array, t: Array, condition: Condition) -> Memory:
            tokens = jax.eval_shape(lambda: stages.begin(x, t, condition).x)
            kept = jnp.zeros((stages.depth, stages.branches, *tokens.shape), tokens.dtype)
            zero = jnp.zeros((), jnp.int32)
            return Memory(kept, zero, zero)

        def predict(x_t: Array, t: Array, condition: Condition, memory: Memory) -> tuple[Array, Memory]:
            fresh = table[memory.call]  # [layers, branches]
            stream, kept = stages.recall(stages.begin(x_t, t, condition), fresh, memory.kept)
            return stages.finish(stream), Memory(kept, memory.call + 1, memory.branches + jnp.sum(fresh))

        return Denoiser(predict, start)


def everything(calls: int, stages: Stages) -> BlockwiseCache:
    """A cache that computes all and keeps it, to calibrate from."""
    plan = np.ones((calls, stages.depth, stages.branches), bool)
    return BlockwiseCache(calls, 0, _hashable(plan))


def _hashable(plan: Bool[np.ndarray, "calls layers branches"]) -> Plan:
    return tuple(tuple(tuple(bool(b) for b in layer) for layer in call) for call in plan)
