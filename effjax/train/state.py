"""Everything a run is, as one pytree: what is trained, and the place in its randomness and data."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, UInt32


@flax.struct.dataclass
class TrainState:
    """The state that a step function maps to the next one, and that a checkpoint holds.

    Two runs whose states are equal go on identically: the batch and the random numbers of the next step
    follow from the state alone. The fields are annotated `Any` because the same class also carries what
    describes a state: shapes, shardings, partition specs.

    Attributes:
      step: `[] int32`, the optimiser steps done.
      params: unboxed arrays, in the layout of the model's `params` collection.
      opt_state: of the optax transformation.
      ema: a moving average shaped like `params`, or None.
      collections: the model's other variable collections by name (`batch_stats`, ...); may be empty.
      key: `[2] uint32`, the raw data of the run's base key, so that a checkpoint stores plain integers.
      examples: `[2] uint32`, the training examples consumed, as (low, high) words of a 64-bit count. It is
        the data position. It is counted, not computed as step times batch, because the batch may change on
        resume; it lies on the device, because the step that does not happen must not consume its batch; and
        it takes two words, because 2^31 examples are one long run, and jax has no 64-bit integers by default.
      halted: `[] bool`, set by the first step that met a non-finite value. From then on every step
        leaves the state as it was before that one, which is what a replay needs.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    collections: Any
    key: Any
    examples: Any
    halted: Any

    @classmethod
    def create(
        cls,
        params: Any,
        opt_state: Any,
        key: Key[Array, ""],
        ema: Any = None,
        collections: dict[str, Any] | None = None,
    ) -> "TrainState":
        """The state before the first step. Pure: works under `jit` and `eval_shape`."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=opt_state,
            ema=ema,
            collections=dict(collections or {}),
            key=jax.random.key_data(key),
            examples=jnp.zeros((2,), jnp.uint32),
            halted=jnp.zeros((), jnp.bool_),
        )

    def step_key(self, purpose: int = 0) -> Key[Array, ""]:
        """The key of the coming step for one purpose: `fold_in(fold_in(base, purpose), step)`.

        Nothing is split and carried along, so a resumed run draws what the unbroken one would have drawn.
        """
        base = jax.random.wrap_key_data(self.key, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(base, purpose), self.step)


def add_examples(examples: UInt32[Array, "2"], count: int) -> UInt32[Array, "2"]:
    """Adds `count` to the 64-bit count, carrying into the high word. Holds for any count below 2^32."""
    low = examples[0] + np.uint32(count)
    carry = (low < examples[0]).astype(jnp.uint32)
    return jnp.stack([low, examples[1] + carry])


def examples_seen(state: TrainState) -> int:
    """The data position as a Python integer; waits for the device."""
    low, high = (int(word) for word in np.asarray(state.examples))
    return low + (high << 32)


def examples_words(count: int) -> UInt32[np.ndarray, "2"]:
    """The inverse of `examples_seen`, for a run that starts in the middle of its data."""
    return np.array([count & 0xFFFFFFFF, count >> 32], np.uint32)


def advance(old: TrainState, new: TrainState, finite: Bool[Array, ""]) -> TrainState:
    """Takes the step from `old` to `new`, or halts.

        finite and not old.halted:  new
        otherwise:                  old, with halted set

    A select on each array, no branch: it is fused with the update, and the old state can still be donated.
    """
    go = jnp.logical_and(finite, jnp.logical_not(old.halted))
    kept = jax.tree.map(lambda n, o: jnp.where(go, n, o), new, old)
    return kept.replace(halted=jnp.logical_not(go))
