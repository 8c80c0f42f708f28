"""Weights for each modality: a token meets those of its own, and only those.

    y_i = W^{m(i)} x_i,        m(i) the modality of token i

Tokens are sorted by modality and all matrices run as one grouped product, so that the work is that of one
matrix whatever the number of modalities. Nothing is learned of the way a token takes. Liang et al.,
"Mixture-of-Transformers", 2024, arXiv:2411.04996, section 2.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from effjax.layers.dense import named, xavier, zeros
from effjax.layers.grouped_product import grouped
from effjax.layers.norms import standardised


@flax.struct.dataclass
class Modalities:
    """Which token is of which modality, and how to sort them. Annotated `Any`, as it also carries shapes.

    Attributes:
      ids: `[B, N]` int, modality of each token.
      order: `[B N]` int, tokens sorted by modality, those of one in the order that they stand in.
      place: `[B N]` int, where in that order each token lies.
      sizes: `[M]` int, tokens of each.
    """

    ids: Any
    order: Any
    place: Any
    sizes: Any

    @classmethod
    def of(cls, ids: Int[Array, "b n"], count: int) -> "Modalities":
        """Sorts the tokens of a batch by their modality, of which there are `count`."""
        flat = ids.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        return cls(ids, order, jnp.argsort(order), jnp.bincount(flat, length=count))

    def sort(self, x: Float[Array, "b n ..."]) -> Float[Array, "t ..."]:
        """All tokens of a batch, modality by modality."""
        return jnp.take(x.reshape(-1, *x.shape[2:]), self.order, axis=0)

    def restore(self, rows: Float[Array, "t ..."]) -> Float[Array, "b n ..."]:
        """Puts sorted tokens back where they stood."""
        return jnp.take(rows, self.place, axis=0).reshape(*self.ids.shape, *rows.shape[1:])


class ModalDense(nn.Module):
    """A projection of sorted tokens, without bias, with a matrix for each modality.

    Attributes:
      features: size of the output axis, or sizes of several.
      modalities: how many.
      axes: logical names of the axes of one matrix, input axes first.
      inputs: how many trailing axes of the input are contracted.
    """

    features: int | tuple[int, ...]
    modalities: int
    axes: tuple[str | None, ...]
    inputs: int = 1

    @nn.compact
    def __call__(self, rows: Float[Array, "t ..."], sizes: Int[Array, " m"]) -> Float[Array, "t ..."]:
        """Maps `[T, *inputs]` to `[T, *features]`."""
        outs = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        ins = rows.shape[rows.ndim - self.inputs :]
        x = rows.reshape(rows.shape[0], -1)  # [T, I]
        shape = x.shape[1], math.prod(outs)

        def init(key: Array, _: tuple[int, ...], dtype: DTypeLike) -> Array:
            keys = jax.random.split(key, self.modalities)
            return jax.vmap(lambda key: xavier(key, shape, dtype))(keys).reshape(-1, *ins, *outs)

        kernel = self.param(
            "kernel", named(init, ("modality", *self.axes)), (self.modalities, *ins, *outs), jnp.float32
        )
        if self.is_initializing():
            # A stack initialises its layers under vmap, which the grouped product does not know where all
            # layers see the same rows. Nothing but the shape counts here.
            return jnp.zeros((x.shape[0], *outs), x.dtype)
        y = grouped(x, jnp.asarray(kernel).reshape(self.modalities, *shape), sizes)  # [T, O]
        return y.reshape(-1, *outs)


class ModalNorm(nn.Module):
    """A norm over the last axis, whose scale (and bias) are those of a token's modality.

    Attributes:
      kind: `rms` or `layer`.
      epsilon: added to the mean square or to the variance.
      modalities: how many.
    """

    kind: Literal["rms", "layer"]
    epsilon: float
    modalities: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n *rest c"], modality: Modalities) -> Float[Array, "b n *rest c"]:
        """Normalises."""
        shape, dtype = (self.modalities, x.shape[-1]), x.dtype
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "rms":
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        else:
            y = standardised(y, 1, self.epsilon)

        def own(name: str, init: Any) -> Array:
            """The vector of each token's modality."""
            table = jnp.asarray(self.param(name, named(init, ("modality", "norm")), shape, jnp.float32))
            vectors = jnp.take(table, modality.ids, axis=0)  # [B, N, C]
            return vectors.reshape(*x.shape[:2], *(1,) * (x.ndim - 3), x.shape[-1])

        scale = own("scale", nn.initializers.ones)
        y, dtype = y * scale.astype(y.dtype), jnp.promote_types(dtype, scale.dtype)
        if self.kind == "layer":
            y = y + own("bias", zeros).astype(y.dtype)
        return y.astype(dtype)
