"""Where tokens go: the two forms that every reduction takes, and what each does to a bag of tokens.

    Assignment   y_m = sum of the x_n that are sent to m, weighed by their sizes; what is sent nowhere is lost
    Mixture      y_m = sum_n W_mn x_n, any W

Both speak of the tokens between the ends alone; what stands at the ends stays as it is.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.scipy.linalg import block_diag
from jaxtyping import Array, Float, Int, Shaped

from effjax.tokens.tokens import Tokens, rows


@flax.struct.dataclass
class Assignment:
    """A token stays, moves into one that stays, or goes.

    Attributes:
      keep: `[B, M]` int, places of the tokens that stay, in their new order.
      gone: `[B, R]` int, places of the others.
      into: `[B, R]` int, the new place whose token each of the others moves into; None drops them.
      exists: `[B, M]` bool, which of the tokens that stay are no padding; None says all.
      carried: what the method keeps for its next layer.
    """

    keep: Any
    gone: Any
    into: Any = None
    exists: Any = None
    carried: Any = None

    def places(self) -> Int[Array, "b n"]:
        """The new place of every token, -1 for what goes."""
        b, kept = self.keep.shape
        there = jnp.broadcast_to(jnp.arange(kept)[None], (b, kept))
        if self.exists is not None:
            there = jnp.where(self.exists, there, -1)
        into = jnp.full(self.gone.shape, -1) if self.into is None else self.into
        at = jnp.concatenate([self.keep, self.gone], axis=1)  # [B, N]
        new = jnp.concatenate([there, into.astype(there.dtype)], axis=1)  # [B, N]
        return jax.vmap(lambda at, new: jnp.zeros(at.shape, new.dtype).at[at].set(new))(at, new)

    def total(self, x: Float[Array, "b n c"]) -> Float[Array, "b m c"]:
        """The sum of what comes together at each new place."""
        y = rows(x, self.keep)  # [B, M, C]
        if self.into is None:
            return y
        # A product with ones and zeros: a scatter runs one row after another on every backend.
        sent = (jnp.arange(y.shape[1])[None, :, None] == self.into[:, None, :]).astype(x.dtype)  # [B, M, R]
        return y + jax.lax.dot_general(sent, rows(x, self.gone), (((2,), (1,)), ((0,), (0,))))


@flax.struct.dataclass
class Mixture:
    """Every new token is a weighted sum of old ones.

    Attributes:
      weights: `[B, M, N]` float.
      sizes: `[B, M]` float, how many original tokens each new one stands for; None keeps them even, so that
        their total is what it was.
      back: `[B, N, M]` float, how the old tokens are made of the new; None copies what holds most.
      carried: what the method keeps for its next layer.
    """

    weights: Any
    sizes: Any = None
    back: Any = None
    carried: Any = None


Plan = Assignment | Mixture


def apply(plan: Plan, tokens: Tokens, proportional: bool) -> Tokens:
    """Makes the new bag; the total size is what it was, less the size of what is dropped.

    Args:
      plan: where tokens go.
      tokens: the bag.
      proportional: whether attention counts sizes from here on.
    """
    if isinstance(plan, Mixture):
        x, size, places = _mixed(plan, tokens)
        mask, back, lossy = None, plan.back, False
    else:
        x, size, places = _assigned(plan, tokens)
        mask, back, lossy = _mask(plan, tokens), None, plan.into is None
    before, kept = tokens.ends[0], x.shape[1]
    inner = jnp.where(places < 0, -1, places + before)  # [B, N] of the old tokens between the ends
    b = x.shape[0]
    first = jnp.broadcast_to(jnp.arange(before)[None], (b, before))
    last = jnp.broadcast_to(jnp.arange(kept - tokens.ends[1], kept)[None], (b, tokens.ends[1]))
    moved = jnp.concatenate([first, inner, last], axis=1)  # [B, N], new place of each old token
    origin = jnp.where(tokens.origin < 0, -1, rows(moved, jnp.maximum(tokens.origin, 0)))  # [B, N0]
    return dataclasses.replace(
        tokens,
        x=x,
        size=size,
        origin=origin,
        mask=mask,
        back=_back(back, tokens, moved, kept),
        carried=plan.carried,
        whole=False,
        lossy=tokens.lossy or lossy,
        proportional=proportional,
    )


def between(
    tokens: Tokens, inner: Shaped[Array, "b m *rest"], values: Shaped[Array, "b n *rest"]
) -> Shaped[Array, "b k *rest"]:
    """New values between the ends, the old ones at them."""
    before, behind = tokens.ends
    parts = values[:, :before], inner, values[:, values.shape[1] - behind :]
    return jnp.concatenate([part for part in parts if part.shape[1]], axis=1)


def with_ends(tokens: Tokens, index: Int[Array, "b m"]) -> Int[Array, "b n"]:
    """Places among all tokens, the ends among them, of places counted between the ends."""
    b, (before, behind) = index.shape[0], tokens.ends
    first = jnp.broadcast_to(jnp.arange(before)[None], (b, before))
    last = jnp.broadcast_to(jnp.arange(tokens.x.shape[1] - behind, tokens.x.shape[1])[None], (b, behind))
    return jnp.concatenate([first, index + before, last], axis=1)


def _assigned(plan: Assignment, tokens: Tokens) -> tuple[Array, Array, Array]:
    size = tokens.size[:, :, None]  # [B, N, 1]
    if plan.into is None:
        x, new = rows(tokens.inner(tokens.x), plan.keep), rows(tokens.inner(size), plan.keep)
        if plan.exists is not None:
            new = new * plan.exists[:, :, None]
    else:
        new = plan.total(tokens.inner(size))  # [B, M, 1]
        weighed = tokens.inner(tokens.x) * tokens.inner(size).astype(tokens.x.dtype)
        x = plan.total(weighed) / new.astype(tokens.x.dtype)  # [B, M, C]
    return between(tokens, x, tokens.x), between(tokens, new, size)[:, :, 0], plan.places()


def _mixed(plan: Mixture, tokens: Tokens) -> tuple[Array, Array, Array]:
    weights = plan.weights.astype(tokens.x.dtype)
    x = jax.lax.dot_general(weights, tokens.inner(tokens.x), (((2,), (1,)), ((0,), (0,))))  # [B, M, C]
    new = plan.sizes
    if new is None:
        new = jnp.sum(tokens.inner(tokens.size), axis=1, keepdims=True) / weights.shape[1]
        new = jnp.broadcast_to(new, weights.shape[:2])
    size = between(tokens, new[:, :, None].astype(jnp.float32), tokens.size[:, :, None])[:, :, 0]
    return between(tokens, x, tokens.x), size, jnp.argmax(plan.weights, axis=1)


def _mask(plan: Assignment, tokens: Tokens) -> Array | None:
    if plan.exists is None and tokens.mask is None:
        return None
    old = jnp.ones(tokens.x.shape[:2], bool) if tokens.mask is None else tokens.mask
    exists = rows(tokens.inner(old), plan.keep)
    return between(tokens, exists if plan.exists is None else exists & plan.exists, old)


def _back(back: Array | None, tokens: Tokens, moved: Array, kept: int) -> Array | None:
    """How the original tokens are made of the new ones, where copying is not the way."""
    if back is None and tokens.back is None:
        return None
    if back is None:
        step = (moved[:, :, None] == jnp.arange(kept)[None, None, :]).astype(jnp.float32)  # [B, N, M]
    else:
        first, last = map(jnp.eye, tokens.ends)
        step = jax.vmap(lambda inner: block_diag(first, inner, last))(back)  # [B, N, M]
    return rows(step, tokens.origin) if tokens.back is None else tokens.back @ step  # [B, N0, M]
