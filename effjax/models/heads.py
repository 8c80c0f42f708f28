"""What stands between the last map of a pyramid and the logits."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress import fold
from effjax.compress.merge import Fold, Variables, unchanged
from effjax.config import part
from effjax.layers.activations import activation
from effjax.layers.conv import ConvNorm
from effjax.layers.dense import Dense, zeros
from effjax.layers.norms import NormKind, norm
from effjax.layers.pool import KINDS as POOLS
from effjax.layers.pool import Plain, pooled


class Linear(nn.Module):
    """Pools the places, normalises, and projects onto the classes.

    Attributes:
      norm: a kind in `effjax.layers.norms`; None leaves it out.
      place: where the norm stands: at every place of the map, or on the pooled vector.
      epsilon: of the norm.
      pool: mean or largest value over the places, or a kind in `effjax.layers.pool`.
      hidden: width of a GELU layer in front of the classes; None leaves it out.
      distillation: whether a second norm and projection, taught by another network, is averaged with the
        first (Touvron et al. 2021).
    """

    norm: NormKind | None = "layer"
    place: Literal["before_pool", "after_pool"] = "before_pool"
    epsilon: float = 1e-6
    pool: Plain | nn.Module = part(POOLS, default="mean")
    hidden: int | None = None
    distillation: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], classes: int, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns logits, or pooled features where there are no classes."""
        if self.place == "before_pool":
            x = self._norm("norm", x, train)  # [B, H, W, C]
        vector = pooled(self.pool, x.reshape(x.shape[0], -1, x.shape[-1]), train, self)  # [B, C]
        y = self._project("norm", "hidden", "classifier", vector, classes, train)  # [B, classes]
        if not self.distillation or not classes:
            return y
        other = self._project(
            "distillation_norm", "distillation_hidden", "distillation_classifier", vector, classes, train
        )
        return (y + other) / 2

    @nn.nowrap
    def merge(self) -> tuple["Linear", Fold]:
        """A batch norm on the pooled vector becomes part of the projection behind it."""
        if self.norm != "batch" or self.place != "after_pool":
            return self, unchanged
        behind = "classifier" if self.hidden is None else "hidden"
        pairs = {behind: "norm"}
        if self.distillation:
            pairs[f"distillation_{behind}"] = "distillation_norm"

        def folded(variables: Variables) -> Variables:
            params, statistics = variables["params"], variables["batch_stats"]
            kept = {name: value for name, value in params.items() if name not in pairs.values()}
            layers = {
                layer: fold.affine_before(
                    params[layer], fold.batch_norm(params[name], statistics[name], self.epsilon)
                )
                for layer, name in pairs.items()
            }
            return {"params": kept | layers}

        return self.clone(norm=None), folded

    @nn.nowrap
    def _norm(self, name: str, x: Float[Array, "b *places c"], train: bool) -> Float[Array, "b *places c"]:
        return x if self.norm is None else norm(self.norm, self.epsilon, name, train=train)(x)

    @nn.nowrap
    def _project(
        self, norm_name: str, hidden_name: str, name: str, x: Float[Array, "b c"], classes: int, train: bool
    ) -> Float[Array, "b classes"]:
        if self.place == "after_pool":
            x = self._norm(norm_name, x, train)
        if self.hidden is not None:
            x = jax.nn.gelu(Dense(self.hidden, ("embed", "mlp"), name=hidden_name)(x), approximate=False)
        if not classes:
            return x
        return Dense(classes, ("embed", "classes"), kernel_init=zeros, name=name)(x)


class Wide(nn.Module):
    """Widens every place, pools, and has a hidden layer before the classes.

        h = mean_hw(a(batch_norm(x W_1))),    logits = a(layer_norm(h W_2)) W_3 + b

    Source: the head of EfficientViT, Cai et al. 2023, that LowFormer took over.

    Attributes:
      widths: channels at every place, and of the hidden layer.
      activation: `a`, a name in `effjax.layers.activations`.
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
