"""What stands between the last map of a pyramid and the logits."""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.ffn.activations import activation
from effjax.layers.conv import ConvNorm
from effjax.layers.dense import Dense, zeros
from effjax.layers.norms import NormKind, norm


class Linear(nn.Module):
    """Pools the places, normalises, and projects onto the classes.

    Attributes:
      norm: a kind in `effjax.layers.norms`; None leaves it out.
      place: where the norm stands: at every place of the map, or on the pooled vector.
      epsilon: of the norm.
      pool: mean or largest value over the places.
      distillation: whether a second norm and projection, taught by another network, is averaged with the
        first (Touvron et al. 2021).
    """

    norm: NormKind | None = "layer"
    place: Literal["before_pool", "after_pool"] = "before_pool"
    epsilon: float = 1e-6
    pool: Literal["mean", "max"] = "mean"
    distillation: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], classes: int, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns logits, or pooled features where there are no classes."""
        if self.place == "before_pool":
            x = self._norm("norm", x, train)  # [B, H, W, C]
        pooled = jnp.mean(x, (1, 2)) if self.pool == "mean" else jnp.max(x, (1, 2))  # [B, C]
        y = self._project("norm", "classifier", pooled, classes, train)  # [B, classes]
        if not self.distillation or not classes:
            return y
        other = self._project("distillation_norm", "distillation_classifier", pooled, classes, train)
        return (y + other) / 2

    @nn.nowrap
    def _norm(self, name: str, x: Float[Array, "b *places c"], train: bool) -> Float[Array, "b *places c"]:
        return x if self.norm is None else norm(self.norm, self.epsilon, name, train=train)(x)

    @nn.nowrap
    def _project(
        self, norm_name: str, name: str, x: Float[Array, "b c"], classes: int, train: bool
    ) -> Float[Array, "b classes"]:
        if self.place == "after_pool":
            x = self._norm(norm_name, x, train)
        if not classes:
            return x
        return Dense(classes, ("embed", "classes"), kernel_init=zeros, name=name)(x)


class Wide(nn.Module):
    """Widens every place, pools, and has a hidden layer before the classes.

        h = mean_hw(a(batch_norm(x W_1))),    logits = a(layer_norm(h W_2)) W_3 + b

    Source: the head of EfficientViT, Cai et al. 2023, that LowFormer took over.

    Attributes:
      widths: channels at every place, and of the hidden layer.
      activation: `a`, a name in `effjax.ffn.activations`.
      epsilon: of the norms.
    """

    widths: tuple[int, int]
    activation: str = "hard_swish"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], classes: int, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns logits, or the hidden layer where there are no classes."""
        options: dict[str, Any] = dict(epsilon=self.epsilon, activation=self.activation)
        x = ConvNorm(self.widths[0], 1, **options, name="expand")(x, train=train)  # [B, H, W, F]
        h = jnp.mean(x, (1, 2))  # [B, F]
        h = Dense(self.widths[1], ("mlp", "embed"), use_bias=False, name="hidden")(h)  # [B, G]
        h = activation(self.activation)(norm("layer", self.epsilon, "norm")(h))
        if not classes:
            return h
        return Dense(classes, ("embed", "classes"), kernel_init=zeros, name="classifier")(h)


KINDS = {"linear": Linear, "wide": Wide}
