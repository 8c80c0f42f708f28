"""What a network spends on each picture where the number of tokens depends on the picture.

    MACs = MACs of the whole network + sum_layers f(n_l, m_l) - f(N, N)

A layer that n tokens enter and m leave costs a polynomial f of the second degree in n and m, whatever it is
made of: projections are linear in them, and attention has n n + m n products. Its six coefficients are
counted from the program of the block itself.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.measure.cost import count
from effjax.mixers.context import Context
from effjax.mixers.stats import Stats
from effjax.models.vit import ViT
from effjax.tokens.assignment import Assignment
from effjax.tokens.point import Place, Point, Where
from effjax.tokens.schedule import inside_blocks
from effjax.tokens.tokens import Tokens

# Tokens in and out, as many pairs as a polynomial of the second degree has coefficients.
PAIRS = ((4, 4), (8, 4), (8, 8), (16, 4), (16, 8), (16, 16))


def macs_by_example(
    model: ViT, variables: Any, images: Float[Array, "b height width c"]
) -> Int[np.ndarray, " b"]:
    """Multiply-accumulates of each picture, of the tokens alone that exist.

    Args:
      model: one that reduces tokens.
      variables: its weights.
      images: the pictures.

    Raises:
      UsageError: for a model that reduces nothing.
    """
    if model.reduce is None:
        raise UsageError("this model reduces no tokens: every picture costs the same.")
    _, told = jax.jit(functools.partial(model.apply, mutable="tokens"))(variables, images)
    left = {int(name.rpartition("_")[2]): np.asarray(origin) for name, (origin,) in told["tokens"].items()}
    whole = count(model.clone(reduce=None).apply, variables, images[:1]).macs
    points = inside_blocks(model.reduce, model.depth)
    return whole + _saved(model, points, left)


def existing(origin: Int[np.ndarray, "b n0"]) -> Int[np.ndarray, " b"]:
    """How many tokens of each example hold some original one."""
    return np.array([len(np.unique(row[row >= 0])) for row in origin])


def layer_macs(model: ViT, place: Place, needs: tuple[str, ...]) -> Float[np.ndarray, " 6"]:
    """The coefficients of 1, n, n^2, m, n m and m^2 in what a block costs that n tokens enter and m leave."""
    drop_rate, key = jnp.zeros(()), jax.random.key(0)

    def tokens(n: int) -> Tokens:
        return Tokens.of(jnp.zeros((1, n, model.dim)))

    variables = jax.eval_shape(model.block.init, key, tokens(4), drop_rate, Context())

    def macs(n: int, m: int) -> int:
        first: Any = _First(m, needs, place)
        point = Point(first, Where(0, 1))
        run = functools.partial(model.block.apply, point=point)
        return count(run, variables, tokens(n), drop_rate, Context()).macs

    counted = [macs(n, m) for n, m in PAIRS]
    return np.linalg.solve(np.array([_powers(n, m) for n, m in PAIRS]), np.array(counted, np.float64))


def _saved(model: ViT, points: Mapping[int, Point], left: Mapping[int, np.ndarray]) -> np.ndarray:
    """What the layers of each example cost more than whole ones."""
    weights = {
        point.method.place: layer_macs(model, point.method.place, point.method.needs)
        for point in points.values()
    }
    examples, original = next(iter(left.values())).shape
    entering, more = np.full(examples, original), np.zeros(examples)
    for layer in range(model.depth):
        leaving = existing(left[layer]) if layer in left else entering
        at = points[layer].method.place if layer in points else next(iter(weights))
        more += (_powers(entering, leaving).T - _powers(original, original)) @ weights[at]
        entering = leaving
    return np.rint(more).astype(np.int64)


def _powers(n: Any, m: Any) -> np.ndarray:
    return np.array(np.broadcast_arrays(1, n, n * n, m, n * m, m * m), np.float64)


@dataclasses.dataclass(frozen=True)
class _First:
    """Keeps the first tokens: as many as are to be counted."""

    keep: int
    needs: tuple[str, ...]
    place: Place
    proportional: bool = False

    def points(self, depth: int) -> dict[int, "_First"]:
        return dict.fromkeys(range(depth), self)

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Assignment:
        places = jnp.broadcast_to(jnp.arange(tokens.count)[None], tokens.x.shape[:2])
        return Assignment(places[:, : self.keep], places[:, self.keep :])
