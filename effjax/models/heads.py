"""What stands between the last map of a pyramid and the logits."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress import fold
from effjax.compress.merge import Fold, Variables, unchanged
from effjax.layers.dense import Dense, zeros
from effjax.layers.norms import NormKind, norm


class Linear(nn.Module):
    """Pools the places, normalises, and projects onto the classes.

    Attributes:
      norm: a kind in `effjax.layers.norms`; None leaves it out.
      place: where the norm stands: at every place of the map, or on the pooled vector.
      epsilon: of the norm.
      pool: mean or largest value over the places.
      hidden: width of a GELU layer in front of the classes; None leaves it out.
      distillation: whether a second norm and projection, taught by another network, is averaged with the
        first (Touvron et al. 2021).
    """

    norm: NormKind | None = "layer"
    place: Literal["before_pool", "after_pool"] = "before_pool"
    epsilon: float = 1e-6
    pool: Literal["mean", "max"] = "mean"
    hidden: int | None = None
    distillation: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], classes: int, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns logits, or pooled features where there are no classes."""
        if self.place == "before_pool":
            x = self._norm("norm", x, train)  # [B, H, W, C]
        pooled = jnp.mean(x, (1, 2)) if self.pool == "mean" else jnp.max(x, (1, 2))  # [B, C]
        y = self._project("norm", "hidden", "classifier", pooled, classes, train)  # [B, classes]
        if not self.distillation or not classes:
            return y
        other = self._project(
            "distillation_norm", "distillation_hidden", "distillation_classifier", pooled, classes, train
        )
        return (y + other) / 2

    @nn.nowrap
    def merge(self) -> tuple["Linear", Fold]:
        """A batch norm on the pooled vector becomes part of the projection behind it."""
        if self.norm != "batch" or self.place != "after_pool":
            return self, unchanged
        pairs = {"classifier": "norm"}
        if self.distillation:
            pairs["distillation_classifier"] = "distillation_norm"

        def folded(variables: Variables) -> Variables:
            params, statistics = variables["params"], variables["batch_stats"]
            layers = {
                layer: fold.affine_before(
                    params[layer], fold.batch_norm(params[name], statistics[name], self.epsilon)
                )
                for layer, name in pairs.items()
            }
            return {"params": layers}

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


KINDS = {"linear": Linear}
