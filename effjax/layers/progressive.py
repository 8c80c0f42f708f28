"""From layer norm to a batch norm that folds away, while training.

    RepBN(x)  = BN(x) + eta x
    PRepBN(x) = g LN(x) + (1 - g) RepBN(x),    g = max(1 - t / T, 0) at training pass t = 0, 1, ..

In evaluation PRepBN is RepBN, which is affine a channel, and so becomes part of the layer behind it
(`effjax.compress.slab`). `eta` is one learned number a norm, 1 at first.

Source: SLAB, Guo et al. 2024, equations 2 to 4; initial value and counting as in the published code.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import named, zeros

_ones = nn.initializers.ones_init()


@dataclasses.dataclass(frozen=True)
class Progressive:
    """PRepBN in a config: `norm=dict(kind="progressive", steps=300_000)`.

    Attributes:
      steps: training passes T after which the layer norm is gone.
      kind: says what it is.
      batch_epsilon: of the batch norm; that of the layer norm is the block's.
    """

    steps: int
    kind: Literal["progressive"] = "progressive"
    batch_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps={self.steps} of a progressive norm: give at least 1.")


class RepBatchNorm(nn.Module):
    """RepBN: a batch norm beside a multiple of its input.

    Attributes:
      epsilon: added to the variance.
      train: whether mean and variance are the batch's, and the running averages move by a tenth.
    """

    epsilon: float = 1e-5
    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b *places c"]) -> Float[Array, "b *places c"]:
        """Normalises every channel over examples and places."""
        affine: dict[str, Any] = dict(scale_init=named(_ones, ("norm",)), bias_init=named(zeros, ("norm",)))
        norm = nn.BatchNorm(not self.train, momentum=0.9, epsilon=self.epsilon, name="batch", **affine)
        eta = self.param("eta", named(_ones, ()), (), jnp.float32)
        return norm(x).astype(x.dtype) + eta.astype(x.dtype) * x


class ProgressiveNorm(nn.Module):
    """PRepBN; the passes done stand in `batch_stats` as `passes`.

    Attributes:
      setting: how it proceeds.
      epsilon: of the layer norm.
      train: whether this is a training pass, which counts; micro-batches count one by one.
    """

    setting: Progressive
    epsilon: float
    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b *places c"]) -> Float[Array, "b *places c"]:
        """Mixes the two norms; what is left in evaluation is RepBN alone."""
        passes = self.variable("batch_stats", "passes", jnp.zeros, (), jnp.int32)
        after = RepBatchNorm(self.setting.batch_epsilon, self.train, name="after")(x)  # [B, ..., C]
        affine: dict[str, Any] = dict(scale_init=named(_ones, ("norm",)), bias_init=named(zeros, ("norm",)))
        before = nn.LayerNorm(epsilon=self.epsilon, name="before", **affine)
        if not self.train:
            if self.is_initializing():
                before(x)
            return after
        g = jnp.maximum(1 - passes.value.astype(jnp.float32) / self.setting.steps, 0).astype(x.dtype)
        if not self.is_initializing():
            passes.value = jnp.minimum(passes.value + 1, self.setting.steps)
        return g * before(x).astype(x.dtype) + (1 - g) * after
