"""Mixture of experts: each token is sent to the few experts that a router chooses for it.

    p = softmax(x W_router),   T = the `chosen` largest entries of p
    y = sum_{e in T} g_e expert_e(x),    g_e = p_e,  or p_e / sum_{T} p where `normalised`

Every expert is a gated perceptron, or where not `gated` a plain one, act(x W_1 + b_1) W_2. No token is
dropped: tokens are sorted by expert and all experts run as one grouped product (`jax.lax.ragged_dot`).
Shazeer et al. 2017, eqs. 1 to 5 without noise. Mixtral, Jiang et al. 2024, section 2.1, takes the softmax
over the chosen logits alone: the same numbers as `normalised`. OLMoE, Muennighoff et al. 2024, does not
normalise. A shared expert sees every token, through a sigmoid gate of its own where `shared_gate`: Qwen2-MoE,
2024.

    L = balance experts sum_e f_e P_e

draws routers towards an even use: f_e is the share of all places that expert e takes, P_e the mean of p_e. It
is `balance` where both are even. Fedus et al., "Switch Transformers", 2021, section 2.2.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.layers.activations import activation
from effjax.layers.dense import Dense, named, xavier, zeros


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
      gated: whether experts are gated perceptrons.
      use_bias: biases of perceptrons that are not gated: on the expansions, and on what the shared one gives.
      scale: factor of the weights.
      balance: weight of the load balance in the loss; 0 leaves it out.
    """

    experts: int
    chosen: int
    hidden: int
    activation: str = "silu"
    normalised: bool = True
    shared: int = 0
    shared_gate: bool = False
    gated: bool = True
    use_bias: bool = False
    scale: float = 1.0
    balance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_bias and self.gated:
            raise UsageError("gated experts have no biases: set use_bias=False, or gated=False.")

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        if not 1 <= self.chosen <= self.experts:
            raise UsageError(f"chosen={self.chosen} of experts={self.experts}: choose from 1 to all of them.")
        tokens = x.reshape(-1, x.shape[-1])  # [T, C]
        router = Dense(self.experts, ("embed", "expert"), use_bias=False, name="router")
        logits = router(tokens)  # [T, E]
        weights, index = choose(logits, self.chosen, self.normalised)  # [T, K]
        if self.balance and train and self.is_mutable_collection("losses") and not self.is_initializing():
            self.sow("losses", "load_balance", self.balance * load_balance(logits, index))
        y = self.dispatch(tokens, self.scale * weights, index).reshape(x.shape)
        if self.shared:
            if self.gated:
                common = Gated(self.shared, self.activation, name="shared")(x)
            else:
                common = MLP(self.shared, activation=self.activation, use_bias=self.use_bias, name="shared")(
                    x
                )
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
        act = activation(self.activation)
        gate = self.kernel("gate", (width, self.hidden), ("embed", "mlp")) if self.gated else None
        expand = self.kernel("expand", (width, self.hidden), ("embed", "mlp"))
        contract = self.kernel("contract", (self.hidden, width), ("mlp", "embed"))
        h = grouped(rows, expand, sizes)  # [T K, F]
        if self.use_bias:
            bias = self.param("expand_bias", named(zeros, ("expert", "mlp")), (self.experts, self.hidden))
            h = h + jnp.take(bias, jnp.take(expert, order), axis=0).astype(h.dtype)
        h = act(h) if gate is None else act(grouped(rows, gate, sizes)) * h  # [T K, F]
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


def load_balance(logits: Float[Array, "t e"], index: Int[Array, "t k"]) -> Float[Array, ""]:
    """How uneven the use of experts is: 1 where it is even, `experts` over `k` where all choose the same."""
    experts = logits.shape[-1]
    used = jnp.bincount(index.reshape(-1), length=experts) / index.size  # [E]
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    return experts * jnp.sum(used * jnp.mean(jax.nn.softmax(logits.astype(wide), axis=-1), axis=0))


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
