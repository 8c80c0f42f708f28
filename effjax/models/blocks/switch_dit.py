"""Switch-DiT: every block has experts of its own, and the time alone chooses among them.

    p = softmax(silu(e_t) W_g + b_g)                          e_t the embedding of the time, without a label
    g = p where it is among the `chosen` largest, 0 elsewhere
    m = 1 + sum_e g_e (z W_e + b_e)                              an expert is one matrix, which starts at zero
    z <- block(m z) + (1 - m) z                                  block: adaLN-Zero

All tokens of a picture take the same experts, and as these are linear, their matrices are added up before
they meet a token: one product a picture instead of `chosen`, and nothing is sorted or sent elsewhere.

The diffusion prior draws the paths through all blocks towards those of neighbouring times:

    P[t, u] = 1 for depth * chosen of the units u from round((t / 999)^4 depth (experts - chosen)) on
    pi = argmin over orders of the units  sum_{t, u} |[g[t, u] > 0] - P[t, pi(u)]|
    L = mean over the batch of JSD(p[t] / depth, P[t, pi] / (depth chosen))

where the units are the experts of all blocks together and t runs over 1000 times, whose gates are computed
anew at every step: there is no state.

Source: Park, Go, Kim, Woo, Ham and Kim, "Switch Diffusion Transformer", ECCV 2024, arXiv:2403.09176, and its
code (byeongjun-park/Switch-DiT), which settles what the paper leaves open: experts of one matrix, gates that
are not normalised again, silu before the gate, three experts and two chosen, an exact matching (Hungarian)
and a weight of 1. The windows of P are those of DTR, Park et al., "Denoising Task Routing", ICLR 2024.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax.assignment
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effjax.errors import UsageError
from effjax.layers.dense import named, xavier, zeros
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import DiTBlock, Layer

TIMES = 1000
EXPONENT = 4.0
EPSILON = 1e-6


class SwitchDiTBlock(DiTBlock):
    """The adaLN-Zero block behind experts that the time chooses; a DiT's parameters keep their names.

    To step caches it has the two branches of a DiT's block; its experts are computed at every call.

    Attributes:
      experts: how many there are.
      chosen: how many of them a time takes.
      prior: weight of the diffusion prior in the loss.
    """

    experts: int = 3
    chosen: int = 2
    prior: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chosen <= self.experts:
            raise UsageError(f"chosen={self.chosen} of experts={self.experts}: choose from 1 to all of them.")

    @nn.nowrap
    def router(self, depth: int) -> "TimeRouter":
        """Chooses the experts of `depth` such blocks."""
        return TimeRouter(depth, self.experts, self.chosen, self.prior)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        each: Layer,
        c: Float[Array, "b c"] | None,
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "2 b n c"] | None]:
        """Like `DiTBlock`, with the gates of its experts, `[B, experts]`, in `each.route`."""
        mask = 1 + Experts(self.experts, name="experts")(x, each.route)  # [B, N, C]
        y, kept = super().__call__(mask * x, each, c, context, train)  # [B, N, C]
        return y + (1 - mask) * x, kept


class Experts(nn.Module):
    """A weighted sum of linear maps, with weights of each example's own.

    Attributes:
      experts: how many there are.
    """

    experts: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"], gates: Float[Array, "b e"]) -> Float[Array, "b n c"]:
        """sum_e gates[b, e] (x[b] W_e + b_e), as x[b] (sum_e gates[b, e] W_e) and a bias."""
        width = x.shape[-1]
        axes = ("expert", "embed", "mlp")
        kernel = self.param("kernel", named(zeros, axes), (self.experts, width, width), jnp.float32)
        bias = self.param("bias", named(zeros, ("expert", "mlp")), (self.experts, width), jnp.float32)
        x, kernel, bias, gates = nn.dtypes.promote_dtype(x, kernel, bias, gates, dtype=x.dtype)
        merged = jnp.einsum("be,eio->bio", gates, kernel)  # [B, C, C]
        bias = jnp.sum(gates[:, :, None] * bias[None], axis=1)  # [B, C]
        return jnp.einsum("bni,bio->bno", x, merged) + bias[:, None]  # [B, N, C]


class TimeRouter(nn.Module):
    """The gates of all layers, from the time alone.

    Attributes:
      depth: number of layers.
      experts: of each layer.
      chosen: how many of them a time takes.
      prior: weight of the diffusion prior.
    """

    depth: int
    experts: int
    chosen: int
    prior: float

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " b"],
        time: Float[Array, "b c"],
        embed: Callable[[Float[Array, " n"]], Float[Array, "n c"]],
    ) -> Float[Array, "depth b e"]:
        """Returns the gates, and sows the prior where losses are asked for.

        Args:
          t: times, 0 to 1000.
          time: their embeddings.
          embed: makes embeddings of other times.
        """
        init = named(_each(xavier), ("layers", "embed", None))
        kernel = self.param("kernel", init, (self.depth, time.shape[-1], self.experts))
        bias = self.param("bias", named(zeros, ("layers", None)), (self.depth, self.experts), jnp.float32)

        def probabilities(time: Float[Array, "n c"]) -> Float[Array, "depth n e"]:
            h, weights = nn.dtypes.promote_dtype(nn.silu(time), kernel)
            logits = jnp.einsum("nc,lce->lne", h, weights).astype(jnp.promote_types(h.dtype, jnp.float32))
            return jax.nn.softmax(logits + bias[:, None].astype(logits.dtype), axis=-1)

        p = probabilities(time)  # [depth, B, E]
        if self.prior and self.is_mutable_collection("losses") and not self.is_initializing():
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            every = probabilities(embed(jnp.arange(TIMES, dtype=jnp.float32)))  # [depth, T, E]
            taken = jax.lax.stop_gradient(selected(every, self.chosen) > 0)  # [depth, T, E]
            loss = diffusion_prior(t, _units(p), _units(taken), self.depth, self.chosen, key)
            self.sow("losses", "diffusion_prior", self.prior * loss)
        return selected(p, self.chosen)


def selected(p: Float[Array, "*batch e"], chosen: int) -> Float[Array, "*batch e"]:
    """The `chosen` largest along the last axis, and zeros in place of the others."""
    _, index = jax.lax.top_k(p, chosen)  # [..., K]
    return p * jnp.sum(jax.nn.one_hot(index, p.shape[-1], dtype=p.dtype), axis=-2)


def windows(times: int, depth: int, experts: int, chosen: int) -> Float[np.ndarray, "t u"]:
    """P: which units each time should take. Those in the middle are shared by all times.

    The windows move fast at late times, which are the noisy ones.
    """
    width = depth * chosen
    shift = np.linspace(0, 1, times) ** EXPONENT * (depth * experts - width)  # [T]
    unit = np.arange(depth * experts)[None] - np.round(shift)[:, None]  # [T, U] from the window's start
    return ((unit >= 0) & (unit < width)).astype(np.float32)


def matching(
    taken: Float[Array, "t u"], table: Float[Array, "t u"], key: PRNGKeyArray | None = None
) -> Int[Array, " u"]:
    """pi: for each unit the column of the table that it should follow, all different; both are 0 or 1.

    Which of two units that are taken at the same times gets which column is left to `key`.
    """
    order = jnp.arange(taken.shape[1])
    order = order if key is None else jax.random.permutation(key, order)  # [U]
    rows = taken[:, order]
    # |a - b| = a + b - 2 a b of zeros and ones: exact sums of at most T.
    cost = jnp.sum(rows, axis=0)[:, None] + jnp.sum(table, axis=0)[None] - 2 * rows.T @ table  # [U, U]
    row, column = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros_like(order).at[order[row]].set(column.astype(order.dtype))


def diffusion_prior(
    t: Float[Array, " b"],
    p: Float[Array, "b u"],
    taken: Float[Array, "t u"],
    depth: int,
    chosen: int,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """L: how far the paths of a batch are from those of the prior.

    Args:
      t: times, 0 to 1000.
      p: probabilities of all experts of all layers.
      taken: 1 where one of 1000 times takes an expert.
      depth: number of layers.
      chosen: experts that a time takes of each.
      key: breaks ties of the matching.
    """
    table = jnp.asarray(windows(TIMES, depth, p.shape[-1] // depth, chosen))  # [T, U]
    place = jnp.clip(t.astype(jnp.int32), 0, TIMES - 1)  # [B]
    wanted = table[place][:, matching(taken, table, key)]  # [B, U]
    return jnp.mean(jensen_shannon(p / depth, wanted / (depth * chosen)))


def jensen_shannon(a: Float[Array, "b u"], b: Float[Array, "b u"]) -> Float[Array, " b"]:
    """JSD(a, b) = (KL(a, (a + b) / 2) + KL(b, (a + b) / 2)) / 2 in nats, 1e-6 inside every logarithm."""
    middle = jnp.log((a + b) / 2 + EPSILON)
    terms = a * (jnp.log(a + EPSILON) - middle) + b * (jnp.log(b + EPSILON) - middle)  # [B, U]
    return jnp.sum(terms, axis=-1) / 2


def _units(of_layers: Array) -> Array:
    """`[depth, N, E]` as `[N, depth E]`, numbers in place of truth values."""
    wide = of_layers.astype(jnp.promote_types(of_layers.dtype, jnp.float32))
    return jnp.moveaxis(wide, 0, 1).reshape(of_layers.shape[1], -1)


def _each(init: Callable[..., Array]) -> Callable[..., Array]:
    """Initialises every layer by itself, so that the fan is that of one layer."""

    def stacked(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
        return jax.vmap(lambda key: init(key, shape[1:], jnp.float32))(jax.random.split(key, shape[0]))

    return stacked
