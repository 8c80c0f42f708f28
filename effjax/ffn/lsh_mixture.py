"""LSH-MoE: of tokens that look alike one, their mean, travels to an expert.

    code(x)  = (argmax_j |(R_1 x)_j| and its sign, ..., argmax_j |(R_H x)_j| and its sign)
    c_b      = the mean of the tokens for one expert that share a code b
    y        = sum_{e in T} g_e (expert_e(c_b) + x - c_b),     b of x at e

R_h are `hashes` random projections, and the largest coordinate says which corner of a cross-polytope a token
is nearest to. Only means travel; the difference, `compensated`, stays on the device. Where an expert is the
identity nothing is lost, and gradients arrive by the mean and by the difference.

Only training is compressed: a mean holds tokens that come later in a text, so that a language model would be
judged by what it cannot know when it writes. An evaluation sends every token.

The number of places is static, S = ceil(rate K t / E) for each expert and group of t tokens:
    at most S tokens                 each has its own, and the mixture is exact
    at most S codes                  a place a code
    more                             codes that follow one another in order share a place; they agree in
                                     their first hashes

Source: Nie et al., "LSH-MoE: Communication-efficient MoE Training via Locality-Sensitive Hashing", NeurIPS
2024, arXiv:2411.08446. There the number of means is what the data make it. The static number, the order in
which codes share places, Gaussian projections and their `directions` are our own; its ablation has 2 to 10
hashes, and rates of 10, 15 and 20%.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.ffn.exchange import ExchangedMixture
from effjax.ffn.routing import capacity


class LSHMixture(ExchangedMixture):
    """The mixture whose experts see means of similar tokens.

    Attributes:
      rate: places, of as many as there were rows if all experts were used alike.
      hashes: that must agree for two tokens to be alike.
      directions: of each random projection; a hash has twice as many values.
      compensated: whether a token keeps its difference to the mean.
      group: tokens that are clustered together; None clusters all of a device, as the paper does, so that
        what comes out depends on the mesh.
      seed: of the projections.
    """

    rate: float = 0.2
    hashes: int = 6
    directions: int = 32
    compensated: bool = True
    group: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.room is not None:
            raise UsageError(
                "lsh_mixture has the places that rate gives, and drops no token: leave room out."
            )
        if self.hashes < 1 or self.directions < 1 or (self.group is not None and self.group < 1):
            raise UsageError(
                f"hashes={self.hashes}, directions={self.directions}, group={self.group}: give 1 or more."
            )
        capacity(self.rate, 1, self.chosen, self.experts)

    def placed(
        self, x: Float[Array, "t c"], index: Int[Array, "t k"], train: bool
    ) -> tuple[Float[Array, "e s c"], Int[Array, "t k"], Float[Array, "t k c"] | None]:
        """Lays means of the tokens of a device out by expert: see `ExchangedMixture.placed`."""
        if not train:
            return super().placed(x, index, train)
        count, width = x.shape
        size = min(self.group or count, count)
        groups = -(-count // size)
        space = capacity(self.rate, size, self.chosen, self.experts)
        empty = ((0, groups * size - count), (0, 0))
        grouped = jnp.pad(x, empty).reshape(groups, size, width)  # [G, t, C]
        index = jnp.pad(index, empty, constant_values=self.experts).reshape(groups, size, -1)  # [G, t, K]
        codes = self.codes(lax.stop_gradient(grouped))  # [G, t, H]
        place = jax.vmap(lambda index, codes: clusters(index, codes, self.experts, space))(index, codes)
        means = jax.vmap(lambda x, place: mean(x, place, self.experts * space))(grouped, place)  # [G, E S, C]
        left = None
        if self.compensated:
            own = jax.vmap(lambda means, place: jnp.take(means, place, axis=0, mode="fill", fill_value=0))
            left = (grouped[:, :, None] - own(means, place)).reshape(groups * size, -1, width)[:count]
        rows = means.reshape(groups, self.experts, space, width).swapaxes(0, 1)  # [E, G, S, C]
        expert, slot = place // space, place % space
        over_all = (expert * groups + jnp.arange(groups)[:, None, None]) * space + slot  # [G, t, K]
        over_all = jnp.where(expert < self.experts, over_all, self.experts * groups * space)
        return (
            rows.reshape(self.experts, groups * space, width),
            over_all.reshape(groups * size, -1)[:count],
            left,
        )

    def codes(self, x: Float[Array, "*batch c"]) -> Int[Array, "*batch h"]:
        """The nearest corner of each cross-polytope, from 0 to twice the `directions`."""
        shape = x.shape[-1], self.hashes * self.directions
        projections = jax.random.normal(jax.random.key(self.seed), shape)  # [C, H D]
        z = jnp.dot(x.astype(jnp.float32), projections).reshape(*x.shape[:-1], self.hashes, self.directions)
        nearest = jnp.argmax(jnp.abs(z), axis=-1)  # [..., H]
        largest = jnp.take_along_axis(z, nearest[..., None], axis=-1)[..., 0]
        return 2 * nearest + (largest < 0)


def clusters(
    index: Int[Array, "t k"], codes: Int[Array, "t h"], experts: int, space: int
) -> Int[Array, "t k"]:
    """Which place each token takes at each of its experts, counted over all experts.

    Args:
      index: of each token's experts; `experts` for none.
      codes: tokens with the same ones are alike.
      experts: how many there are.
      space: places of each; `experts` times that stands for none.
    """
    total, chosen = index.size, index.shape[1]
    every = [jnp.repeat(code, chosen) for code in codes.T]  # [M] each
    *keys, at = lax.sort((index.reshape(-1), *every, jnp.arange(total)), num_keys=1 + len(every))
    expert, first = keys[0], jnp.arange(total) == 0
    for key in keys:
        first = first | (key != jnp.roll(key, 1))  # [M], where a code begins
    sizes = jnp.bincount(expert, length=experts + 1)  # [E + 1]
    start = jnp.take(jnp.cumsum(sizes) - sizes, expert)  # [M], where its expert begins
    place = jnp.arange(total) - start
    code = jnp.cumsum(first) - 1
    code = code - jnp.take(code, start)  # [M], which code of its expert's
    used = jnp.take(jnp.zeros((experts + 1,), jnp.int32).at[expert].add(first), expert)  # [M]
    shared = jnp.minimum((code * (space / used)).astype(jnp.int32), space - 1)
    slot = jnp.where(jnp.take(sizes, expert) <= space, place, jnp.where(used <= space, code, shared))
    found = jnp.where(expert < experts, expert * space + slot, experts * space)
    return jnp.zeros_like(found).at[at].set(found).reshape(index.shape)


def mean(x: Float[Array, "t c"], place: Int[Array, "t k"], places: int) -> Float[Array, "p c"]:
    """The mean of the tokens of each place, 0 where there is none."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows = jnp.repeat(x, place.shape[1], axis=0).astype(wide)  # [M, C]
    total = jnp.zeros((places, x.shape[1]), wide).at[place.reshape(-1)].add(rows, mode="drop")
    count = jnp.zeros((places,), wide).at[place.reshape(-1)].add(1.0, mode="drop")
    return (total / jnp.maximum(count, 1.0)[:, None]).astype(x.dtype)
