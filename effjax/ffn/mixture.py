"""Mixture of experts: each token is sent to the few experts that a router chooses for it.

    p = softmax(x W_router),   T = the `chosen` largest entries of p
    y = sum_{e in T} g_e expert_e(x),    g_e = p_e,  or p_e / sum_{T} p where `normalised`

Every expert is a gated perceptron. No token is dropped: tokens are sorted by expert and all experts run as
one grouped product (`jax.lax.ragged_dot`). Shazeer et al. 2017, eqs. 1 to 5 without noise. Mixtral, Jiang
et al. 2024, section 2.1, takes the softmax over the chosen logits alone: the same numbers as `normalised`.
OLMoE, Muennighoff et al. 2024, does not normalise. A shared expert sees every token, through a sigmoid gate
of its own where `shared_gate`: Qwen2-MoE, 2024.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.layers.activations import activation
from effjax.layers.dense import Dense, named, xavier


class Mixture(nn.Module):
    """Token-choice mixture of gated perceptrons.

    Attributes:
      experts: how many there are.
      chosen: how many of them a token is sent to.
      hidden: channels of each expansion of one expert.
      activation: a name in `effjax.layers.activations`.
      normalised: whether the weights of the chosen experts add up to one.
      shared: channels of an expert that sees every token; 0 means there is none.
      shared_gate: whether a sigmoid of the token weighs the shared expert.
    """

    experts: int
    chosen: int
    hidden: int
    activation: str = "silu"
    normalised: bool = True
    shared: int = 0
    shared_gate: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        if not 1 <= self.chosen <= self.experts:
            raise UsageError(f"chosen={self.chosen} of experts={self.experts}: choose from 1 to all of them.")
        tokens = x.reshape(-1, x.shape[-1])  # [T, C]
        router = Dense(self.experts, ("embed", "expert"), use_bias=False, name="router")
        weights, index = choose(router(tokens), self.chosen, self.normalised)  # [T, K]
        y = self.dispatch(tokens, weights, index).reshape(x.shape)
        if self.shared:
            common = Gated(self.shared, self.activation, name="shared")(x)
            if self.shared_gate:
                gate = Dense(1, ("embed", None), use_bias=False, name="shared_gate")(x)  # [..., 1]
                common = common * jax.nn.sigmoid(gate)
            y = y + common
        return y

    @nn.nowrap
    def dispatch(
        self, tokens: Float[Array, "t c"], weights: Float[Array, "t k"], index: Int[Array, "t k"]
    ) -> Float[Array, "t c"]:
        """Runs every token through its experts and adds up what they say."""
        count, width = tokens.shape
        expert = index.reshape(-1)  # [T K]
        order = jnp.argsort(expert, stable=True)  # rows of one expert next to each other
        sizes = jnp.bincount(expert, length=self.experts)  # [E]
        rows = jnp.take(tokens, order // self.chosen, axis=0)  # [T K, C]
        gate = self.kernel("gate", (width, self.hidden), ("embed", "mlp"))
        expand = self.kernel("expand", (width, self.hidden), ("embed", "mlp"))
        contract = self.kernel("contract", (self.hidden, width), ("mlp", "embed"))
        h = activation(self.activation)(grouped(rows, gate, sizes)) * grouped(rows, expand, sizes)  # [T K, F]
        h = nn.with_logical_constraint(h, (None, "mlp"))
        y = grouped(h, contract, sizes)  # [T K, C]
        y = y * jnp.take(weights.reshape(-1), order)[:, None].astype(y.dtype)
        return jnp.zeros((count, width), y.dtype).at[order // self.chosen].add(y)

    @nn.nowrap
    def kernel(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Float[Array, "e i o"]:
        """The matrices of all experts, stacked."""
        init = named(_each(xavier), ("expert", *axes))
        return jnp.asarray(self.param(f"{name}_kernel", init, (self.experts, *shape), jnp.float32))


def choose(
    logits: Float[Array, "t e"], chosen: int, normalised: bool
) -> tuple[Float[Array, "t k"], Int[Array, "t k"]]:
    """Returns the weights of each token's experts, in float32, and which they are, best first."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    weights, index = jax.lax.top_k(jax.nn.softmax(logits.astype(wide), axis=-1), chosen)
    if normalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, index


def grouped(
    rows: Float[Array, "t i"], kernels: Float[Array, "e i o"], sizes: Int[Array, " e"]
) -> Float[Array, "t o"]:
    """Multiplies each run of rows with the matrix of its own expert."""
    rows, kernels = nn.dtypes.promote_dtype(rows, kernels)
    return jax.lax.ragged_dot(rows, kernels, sizes)


def _each(init: Initializer) -> Initializer:
    """Initialises every expert by itself, so that the fan is that of one expert."""

    def stacked(key: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
        return jax.vmap(lambda key: init(key, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return stacked
