"""A memory of n^2 slots beside a perceptron: a token reads the few slots that its query finds.

    q = norm(x W_q),    r = K_r q_r,    c = K_c q_c               scores of n rows and n columns
    T, s = the `chosen` best slots and their scores               see `effjax.ffn.product_keys`
    y = sum_{i in T} s_i act(<W_read x, u_i>) v_i,    out = y W_out + perceptron(x)

Each slot is a perceptron of a single neuron (PEER, He 2024, arXiv:2407.04153), u_i its input and v_i its
output; one projection carries what was read back to the width. Every block of the model has such a layer:
UltraMemV2, Huang et al. 2025, arXiv:2508.18756. With several cores each weighs its own share of a value's
channels. `score="sum"` is the memory with product keys, whose scores go through a softmax: Lample et al.
2019, arXiv:1907.05242; without inputs (`read_dim=0`) its slots are values alone.

The slots of all layers may be one pool. Each layer has keys of its own for a part of it, and slot i of layer
l is number (i + l stride) mod pool. Where n^2 is `share` of depth x stride slots, each slot is within the
reach of share x depth layers.

At the start keys and queries are as in the published code, and values are scaled so that the read has the
root mean square `initial` for inputs of unit variance, however many slots are read. In the sum over a deep
model `initial = a / sqrt(depth)` keeps the variance.

    L = rank_penalty spread(C) + balance n sum_i (f_i p_i)

are sown as losses: `spread` keeps the preselection good; f is the share of all preselected places that a row
(or column) takes, p the mean of its softmax.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.product_keys import best_sums, best_tucker, rank_one, spread
from effjax.layers.activations import activation
from effjax.layers.dense import Dense, named


class Memory(nn.Module):
    """A product-key memory, and a gated perceptron beside it.

    Attributes:
      rows: of keys, and columns; there are `rows^2` slots.
      chosen: slots that a head reads.
      key_dim: channels of a key of a row or column.
      value_dim: channels of what a slot says.
      read_dim: channels of what a slot reads; 0 means that it says its value to whoever finds it.
      heads: each with keys and cores of its own; they share the query and the slots.
      score: how rows and columns give the score of a slot.
      rank: numbers that a row or column scores, with `tucker`.
      cores: with `tucker`; each weighs as many channels of a value.
      activation: of the neurons, a name in `effjax.layers.activations`; None leaves them linear.
      hidden: channels of the gated perceptron beside the memory; 0 means there is none.
      initial: root mean square of the read at the start.
      rank_penalty: weight of the loss `tucker_rank`.
      balance: weight of the loss `key_balance`.
      pool: slots of the tables that all layers share, see `LM.shared`; 0 means that each has its own.
      stride: by how many slots the part of each layer lies behind that of the one before.
    """

    rows: int
    chosen: int
    key_dim: int
    value_dim: int
    read_dim: int = 0
    heads: int = 1
    score: Literal["tucker", "sum"] = "tucker"
    rank: int = 2
    cores: int = 2
    activation: str | None = None
    hidden: int = 0
    initial: float = 0.1
    rank_penalty: float = 0.001
    balance: float = 0.0
    pool: int = 0
    stride: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chosen <= self.rows**2:
            raise UsageError(f"chosen={self.chosen} of rows^2={self.rows**2} slots: read from 1 to all.")
        if self.pool and self.pool < self.rows**2:
            raise UsageError(f"rows^2={self.rows**2} slots are not in a pool of {self.pool}: make it larger.")
        if self.score == "tucker" and (self.rank < 1 or self.cores < 1 or self.value_dim % self.cores):
            raise UsageError(
                f"rank={self.rank} and cores={self.cores} must be at least 1, and cores divide "
                f"value_dim={self.value_dim}."
            )

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch c"], train: bool = False, layer: Int[Array, ""] | None = None
    ) -> Float[Array, "*batch c"]:
        """Reads for each token, and mixes its channels; `layer` says which part of a pool is the layer's."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, C]
        rows, columns = self.key_scores(tokens)  # [T, H, n, R]
        cores = None
        if self.score == "tucker":
            cores = jnp.asarray(self.param("cores", named(_uniform, (None,) * 4), self.shape))
        if train and self.is_mutable_collection("losses") and not self.is_initializing():
            self.sow_losses(rows, columns, cores)
        scores, slots = self.retrieve(rows, columns, cores)  # [T, H, k, M], [T, H, k]
        if self.pool and layer is not None:
            slots = (slots + layer * self.stride) % self.pool
        read = self.read(tokens, scores, slots)  # [T, V]
        draw = nn.initializers.normal(self.value_dim**-0.5)
        out = Dense(x.shape[-1], ("mlp", "embed"), use_bias=False, kernel_init=draw, name="output")(read)
        out = out.reshape(x.shape)
        return out + Gated(self.hidden, name="beside")(x) if self.hidden else out

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the cores."""
        return self.cores, self.heads, self.rank, self.rank

    @nn.nowrap
    def key_scores(
        self, tokens: Float[Array, "t c"]
    ) -> tuple[Float[Array, "t h n r"], Float[Array, "t h n r"]]:
        """What the query of each token scores with the keys of rows and of columns."""
        rank = self.rank if self.score == "tucker" else 1
        draw, scale = nn.initializers.normal(self.key_dim**-0.5), self.key_dim**-0.4
        query = Dense((2, self.key_dim), ("embed", None, None), 1, False, draw, name="query")(tokens)
        query = self.unit(query, "query_norm", scale)  # [T, 2, D]
        shape = (self.heads, 2, self.rows, rank, self.key_dim)
        keys = self.param("keys", named(draw, (None, None, None, None, "embed")), shape, jnp.float32)
        keys = self.unit(jnp.asarray(keys).astype(query.dtype), "keys_norm", scale)
        scores = jnp.einsum("tad,hanrd->athnr", query, keys, preferred_element_type=jnp.float32)
        return scores[0], scores[1]

    @nn.nowrap
    def unit(self, x: Float[Array, "*batch d"], name: str, scale: float) -> Float[Array, "*batch d"]:
        """An RMS norm over the channels of a key, whose scale starts small."""
        init = named(nn.initializers.constant(scale), ("norm",))
        return nn.RMSNorm(epsilon=1e-5, scale_init=init, dtype=x.dtype, name=name)(x)

    @nn.nowrap
    def retrieve(
        self,
        rows: Float[Array, "t h n r"],
        columns: Float[Array, "t h n r"],
        cores: Float[Array, "m h r r"] | None,
    ) -> tuple[Float[Array, "t h k m"], Int[Array, "t h k"]]:
        """The weights of the slots that are read, and which they are."""
        if cores is not None:
            return best_tucker(rows, columns, cores.astype(rows.dtype), self.chosen)
        scores, slots = best_sums(rows[..., 0], columns[..., 0], self.chosen)
        return jax.nn.softmax(scores, axis=-1)[..., None], slots

    @nn.nowrap
    def read(
        self, tokens: Float[Array, "t c"], scores: Float[Array, "t h k m"], slots: Int[Array, "t h k"]
    ) -> Float[Array, "t v"]:
        """The weighted sum of what the slots say."""
        count, cores = self.pool or self.rows**2, scores.shape[-1]
        weights = scores.reshape(len(tokens), -1, cores).astype(tokens.dtype)  # [T, K, M]
        slots = slots.reshape(len(tokens), -1)  # [T, K]
        if self.read_dim:
            draw = nn.initializers.normal(tokens.shape[-1] ** -0.5)
            told = Dense(self.read_dim, ("embed", None), use_bias=False, kernel_init=draw, name="reader")(
                tokens
            )
            init = named(nn.initializers.normal(self.read_dim**-0.5), ("slots", "embed"))
            table = self.param("inputs", init, (count, self.read_dim), jnp.float32)
            inputs = jnp.take(jnp.asarray(table), slots, axis=0)  # [T, K, U]
            neurons = jnp.einsum("tu,tku->tk", told, inputs)
            act = activation(self.activation) if self.activation else lambda a: a
            weights = weights * act(neurons)[..., None].astype(weights.dtype)
        table = self.param(
            "values", named(self.value_init, ("slots", "embed")), (count, self.value_dim), jnp.float32
        )
        values = jnp.take(jnp.asarray(table), slots, axis=0).astype(weights.dtype)  # [T, K, V]
        values = values.reshape(*slots.shape, cores, -1)  # [T, K, M, V / M]
        return jnp.einsum("tkm,tkmv->tmv", weights, values).reshape(len(tokens), -1)  # [T, V]

    @nn.nowrap
    def value_init(self, key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Values whose weighted sum has the root mean square `initial`.

        How large the scores of the best slots are depends on how many there are and how many are read: it is
        asked of random scores with the variance that normalised keys and queries give.
        """
        draw, probe, cores = jax.random.split(key, 3)
        rank = self.rank if self.score == "tucker" else 1
        scores = jax.random.normal(probe, (2, 256, self.heads, self.rows, rank)) * self.key_dim**-0.3
        start = _uniform(cores, self.shape) if self.score == "tucker" else None
        found, _ = self.retrieve(scores[0], scores[1], start)
        energy = jnp.mean(jnp.sum(found**2, axis=(1, 2)))
        if self.read_dim and self.activation:
            neurons = activation(self.activation)(jax.random.normal(probe, (4096,)))
            energy = energy * jnp.mean(neurons**2)
        return jax.random.normal(draw, shape, dtype) * (self.initial * jax.lax.rsqrt(energy)).astype(dtype)

    @nn.nowrap
    def sow_losses(
        self,
        rows: Float[Array, "t h n r"],
        columns: Float[Array, "t h n r"],
        cores: Float[Array, "m h r r"] | None,
    ) -> None:
        """The two losses of a batch."""
        if cores is not None and self.rank_penalty:
            self.sow("losses", "tucker_rank", self.rank_penalty * spread(cores))
        if self.balance:
            if cores is None:
                first, second = rows[..., 0], columns[..., 0]
            else:
                u, v = rank_one(jnp.sum(jax.lax.stop_gradient(cores), axis=0).astype(rows.dtype))
                first, second = jnp.einsum("thnr,hr->thn", rows, u), jnp.einsum("thnr,hr->thn", columns, v)
            self.sow("losses", "key_balance", self.balance * (self.uneven(first) + self.uneven(second)))

    @nn.nowrap
    def uneven(self, scores: Float[Array, "t h n"]) -> Float[Array, ""]:
        """How unevenly keys are preselected: 1 where all alike."""
        _, taken = jax.lax.top_k(scores, min(self.chosen, self.rows))
        used = jnp.bincount(taken.reshape(-1), length=self.rows) / taken.size  # [n]
        return self.rows * jnp.sum(used * jnp.mean(jax.nn.softmax(scores, axis=-1), axis=(0, 1)))


def _uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Cores start positive, so that the vectors of their rank-one part are."""
    return jax.random.uniform(key, shape, dtype)
