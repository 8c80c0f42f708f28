"""A bag of tokens with mass: what every method that changes which tokens exist takes and returns."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from effjax.errors import UsageError
from effjax.mixers.context import Context


@flax.struct.dataclass
class Tokens:
    """`n` tokens that stand for `n0` original ones.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      x: `[B, N, C]`, the tokens.
      size: `[B, N]` float32, how many original tokens each stands for.
      origin: `[B, N0]` int, the place among the tokens of the one that holds most of each original token; -1
        where none does.
      mask: `[B, N]` bool, tokens that exist; the others are padding. None where all exist.
      back: `[B, N0, N]` float, how the original tokens are made of these; None copies each from `origin`.
      carried: what a method keeps for its next layer, such as a graph of the tokens.
      ends: how many tokens before and how many behind are no patches, and stay: class, distillation and
        register tokens, the text around a picture.
      held: original places inside that stay too, such as a class token in the middle.
      grid: rows and columns of the original patches, row by row between the ends.
      whole: whether every original token is still there, in its place.
      lossy: whether some originals may be held by no token.
      proportional: whether attention counts a token as often as its size says.
    """

    x: Any
    size: Any
    origin: Any
    mask: Any = None
    back: Any = None
    carried: Any = None
    ends: tuple[int, int] = flax.struct.field(pytree_node=False, default=(0, 0))
    held: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    grid: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)
    whole: bool = flax.struct.field(pytree_node=False, default=True)
    lossy: bool = flax.struct.field(pytree_node=False, default=False)
    proportional: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def count(self) -> int:
        """Tokens between the ends: those that a method may change."""
        return self.x.shape[1] - sum(self.ends)

    @property
    def original(self) -> int:
        """Original tokens between the ends."""
        return self.origin.shape[1] - sum(self.ends)

    def inner(self, values: Shaped[Array, "b n *rest"]) -> Shaped[Array, "b m *rest"]:
        """What belongs to the tokens between the ends."""
        return values[:, self.ends[0] : values.shape[1] - self.ends[1]]

    def fixed(self) -> Bool[Array, "b n"] | None:
        """Which tokens between the ends must stay as they are: those that are held, and padding."""
        fixed = None
        if self.held:
            places = self.origin[:, jnp.array(self.held)] - self.ends[0]  # [B, held]
            at = jnp.arange(self.count)
            fixed = jnp.any(places[:, :, None] == at[None, None], axis=1)  # [B, N]
        if self.mask is not None:
            padding = ~self.inner(self.mask)
            fixed = padding if fixed is None else fixed | padding
        return fixed

    def sources(self) -> Int[Array, "b n"]:
        """The original place that each token is centred on: of several the last one."""
        b, original = self.origin.shape
        target = jnp.where(self.origin < 0, self.x.shape[1], self.origin)  # dropped ones fall out
        places = jnp.broadcast_to(jnp.arange(original)[None], (b, original))
        empty = jnp.zeros(self.x.shape[:2], places.dtype)
        return jax.vmap(lambda row, at, value: row.at[at].max(value, mode="drop"))(empty, target, places)

    def context(self, context: Context) -> Context:
        """What a mixer has to know of these tokens."""
        if self.whole:
            return context
        return dataclasses.replace(
            context,
            size=self.size if self.proportional else None,
            valid=self.mask,
            positions=self.sources(),
            grid=None,
        )

    def restored(self) -> "Tokens":
        """One token for every original one again: a copy, or a mixture, of what holds it.

        Raises:
          UsageError: where tokens were dropped, so that some originals have nothing to be made of.
        """
        if self.whole:
            return self
        if self.lossy:
            raise UsageError("tokens that were dropped cannot be restored: use a method that merges.")
        if self.back is None:
            x = rows(self.x, self.origin)  # [B, N0, C]
        else:
            weights = self.back.astype(self.x.dtype)
            x = jax.lax.dot_general(weights, self.x, (((2,), (1,)), ((0,), (0,))))  # [B, N0, C]
        return Tokens.of(x, ends=self.ends, held=self.held, grid=self.grid)

    @classmethod
    def of(
        cls,
        x: Float[Array, "b n c"],
        ends: tuple[int, int] = (0, 0),
        held: tuple[int, ...] = (),
        grid: tuple[int, int] | None = None,
    ) -> "Tokens":
        """Tokens that stand each for itself."""
        places = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        size = jnp.ones(x.shape[:2], jnp.float32)
        return cls(x, size, places, ends=ends, held=held, grid=grid)


def rows(x: Shaped[Array, "b n *rest"], index: Int[Array, "b m"]) -> Shaped[Array, "b m *rest"]:
    """Of each example the rows at its own places."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="clip"))(x, index)
