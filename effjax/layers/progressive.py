"""From layer norm to a batch norm that folds away, while training.

    RepBN(x)  = BN(x) + eta x
    PRepBN(x) = g LN(x) + (1 - g) RepBN(x),    g = 1 - (t - W) / T within [0, 1] at training pass t = 0, 1, ..

In language models LN is the RMS norm. In evaluation PRepBN is RepBN, which is affine a channel, and so
becomes part of the layer behind it (`effjax.compress.slab`). `eta` is one learned number a norm, 1 at first.

While training, mean and variance are those of the whole batch: in a language model of tokens to come and of
padding too. In evaluation they are running averages, and no token sees another.

Source: SLAB, Guo et al. 2024, equations 2 to 4; initial values and counting as in the published code, which
keeps the running averages still for the first W passes. Here they move from the first one on; of a pass a
hundred passes ago they hold less than three parts in a hundred thousand.
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
      steps: training passes T that it takes from the first norm to RepBN.
      kind: says what it is.
      batch_epsilon: of the batch norm; that of the first norm is the block's.
      before: the norm that training begins with.
      warmup: passes W with that norm alone.
      initial: what the batch norm's scale and `eta` start at.
    """

    steps: int
    kind: Literal["progressive"] = "progressive"
    batch_epsilon: float = 1e-5
    before: Literal["layer", "rms"] = "layer"
    warmup: int = 0
    initial: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0:
            raise UsageError(
                f"a progressive norm with steps={self.steps} and warmup={self.warmup}: give at least 1 and 0."
            )


class RepBatchNorm(nn.Module):
    """RepBN: a batch norm beside a multiple of its input.

    Attributes:
      epsilon: added to the variance.
      train: whether mean and variance are the batch's, and the running averages move by a tenth.
      initial: what scale and `eta` start at.
    """

    epsilon: float = 1e-5
    train: bool = False
    initial: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b *places c"]) -> Float[Array, "b *places c"]:
        """Normalises every channel over examples and places."""
        filled = nn.initializers.constant(self.initial)
        affine: dict[str, Any] = dict(scale_init=named(filled, ("norm",)), bias_init=named(zeros, ("norm",)))
        norm = nn.BatchNorm(not self.train, momentum=0.9, epsilon=self.epsilon, name="batch", **affine)
        eta = self.param("eta", named(filled, ()), (), jnp.float32)
        return norm(x).astype(x.dtype) + eta.astype(x.dtype) * x


class ProgressiveNorm(nn.Module):
    """PRepBN; the passes done stand in `batch_stats` as `passes`.

    Attributes:
      setting: how it proceeds.
      epsilon: of the norm that training begins with.
      train: whether this is a training pass, which counts; micro-batches count one by one.
    """

    setting: Progressive
    epsilon: float
    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b *places c"]) -> Float[Array, "b *places c"]:
        """Mixes the two norms; what is left in evaluation is RepBN alone."""
        passes = self.variable("batch_stats", "passes", jnp.zeros, (), jnp.int32)
        form = self.setting
        after = RepBatchNorm(form.batch_epsilon, self.train, form.initial, name="after")(x)  # [B, ..., C]
        common: dict[str, Any] = dict(epsilon=self.epsilon, scale_init=named(_ones, ("norm",)), name="before")
        if form.before == "rms":
            before: nn.Module = nn.RMSNorm(**common)
        else:
            before = nn.LayerNorm(**common, bias_init=named(zeros, ("norm",)))
        if not self.train:
            if self.is_initializing():
                before(x)
            return after
        done = passes.value.astype(jnp.float32)
        g = jnp.clip(1 - (done - form.warmup) / form.steps, 0, 1).astype(x.dtype)
        if not self.is_initializing():
            passes.value = jnp.minimum(passes.value + 1, form.warmup + form.steps)
        return g * before(x).astype(x.dtype) + (1 - g) * after
