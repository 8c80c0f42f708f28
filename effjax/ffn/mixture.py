"""Mixture of experts: each token is sent to the few experts that a router chooses for it.

    p = softmax(x W_router),   T = the `chosen` largest entries of p
    y = sum_{e in T} g_e expert_e(x),    g_e = p_e,  or p_e / sum_{T} p where `normalised`

Every expert is a gated perceptron, or where not `gated` a plain one, act(x W_1 + b_1) W_2. Tokens are sorted
by expert and all experts run as one grouped product (`jax.lax.ragged_dot`), so that no place is computed that
no token takes. Without a `capacity` no token is dropped; with one see `effjax.ffn.routing`.
Shazeer et al. 2017, eqs. 1 to 5. Mixtral, Jiang et al. 2024, section 2.1, takes the softmax over the chosen
logits alone: the same numbers as `normalised`. OLMoE, Muennighoff et al. 2024, does not normalise. A shared
expert sees every token, through a sigmoid gate of its own where `shared_gate`: Qwen2-MoE, 2024; several of
DeepSeekMoE (Dai et al. 2024) are one with as many times the channels. DeepSeek-V3, 2024, scores by a sigmoid.

In training noise may be added to the logits,

    + (noise / experts) eps,   eps ~ N(0, 1)                   Riquelme et al. 2021 (V-MoE), noise = 1
    + softplus(x W_noise) eps                                  Shazeer et al. 2017, eq. 4, noise = "learned"

and experts are kept in even use by losses (`balance`, `z_loss`) or by a bias (`balance_rate`), whose state is
the collection `routing`: see `effjax.ffn.balance`.

With `choice="expert"` experts choose tokens (Zhou et al. 2022). Which ones an expert takes depends on all
tokens, also on later ones, so that nothing generated token by token can follow what was trained: `causal` is
False then, and a causal language model refuses such a layer. Where tokens come all at once (pictures,
diffusion) nothing is against it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jaxtyping import Array, DTypeLike, Float, Int

from effjax.config import part
from effjax.errors import UsageError
from effjax.ffn import router as routers
from effjax.ffn.balance import load_balance, nudged, router_z
from effjax.ffn.gated import Gated
from effjax.ffn.mlp import MLP
from effjax.ffn.routing import (
    Routes,
    Scores,
    affinities,
    by_experts,
    by_tokens,
    choose,
    collected,
    runs,
    spread,
)
from effjax.ffn.routing import capacity as capacity_of
from effjax.layers.activations import activation
from effjax.layers.dense import Dense, named, xavier, zeros
from effjax.layers.grouped_product import grouped
from effjax.layers.stored import array, kernel_of

# The collection of what training changes without a gradient.
STATE = "routing"


class Mixture(nn.Module):
    """A mixture of perceptrons.

    To whoever asks for `intermediates`, it sows the `routes`.

    Attributes:
      experts: how many there are.
      chosen: how many of them a token is sent to; where experts choose, on average.
      hidden: channels of each expansion of one expert.
      activation: a name in `effjax.layers.activations`.
      normalised: whether the weights of a token's experts add up to one.
      shared: channels of an expert that sees every token; 0 means there is none.
      shared_gate: whether a sigmoid of the token weighs the shared expert.
      gated: whether experts are gated perceptrons.
      use_bias: biases of perceptrons that are not gated: on the expansions, and on what the shared one gives.
      scale: factor of the weights.
      balance: weight of the load balance in the loss; 0 leaves it out.
      choice: whether tokens choose experts, or experts tokens.
      router: from a token to a logit of each expert, a kind in `effjax.ffn.router`.
      scores: what the logits become.
      capacity: factor of the tokens that an expert takes at most; None sets no bound, and where experts
        choose it is 1.
      eval_capacity: the same in evaluation; None means `capacity`, and `experts / chosen` drops nothing.
      priority: which tokens are served first: those that come first, or those of the best scores.
      noise: of the logits in training, in units of one over `experts`, or "learned".
      z_loss: weight of the router's z-loss; 0 leaves it out.
      balance_rate: step of the bias that balances without a loss; 0 leaves it out.
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
    choice: Literal["token", "expert"] = "token"
    router: nn.Module = part(routers.KINDS, default=routers.Linear)
    scores: Scores = "softmax"
    capacity: float | None = None
    eval_capacity: float | None = None
    priority: Literal["place", "score"] = "place"
    noise: float | Literal["learned"] = 0.0
    z_loss: float = 0.0
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_bias and self.gated:
            raise UsageError("gated experts have no biases: set use_bias=False, or gated=False.")
        if not 1 <= self.chosen <= self.experts:
            raise UsageError(f"chosen={self.chosen} of experts={self.experts}: choose from 1 to all of them.")
        factors = [factor for factor in (self.capacity, self.eval_capacity) if factor is not None]
        for factor in factors:
            capacity_of(factor, 1, self.chosen, self.experts)
        if self.priority == "score" and not factors:
            raise UsageError("priority='score' says who is dropped first: it needs a capacity.")
        if self.choice == "token":
            return
        if self.balance or self.balance_rate:
            raise UsageError(
                "experts that choose are used evenly: leave balance and balance_rate out, or choose "
                "choice='token'."
            )
        if self.chosen * max(factors, default=1.0) > self.experts:
            raise UsageError(
                f"an expert cannot take more tokens than there are: chosen={self.chosen} times "
                f"capacity={max(factors):g} must be at most experts={self.experts}."
            )

    @property
    def run(self) -> int:
        """How many experts a token is run through; where experts choose, on average."""
        return self.chosen

    @property
    def causal(self) -> bool:
        """Whether a token's experts depend on nothing behind it."""
        return self.choice == "token"

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, C]
        routes = self.routes(tokens, train)
        if not self.is_initializing():
            self.sow("intermediates", "routes", routes)
        rows = self.perceptrons(spread(tokens, routes), routes)  # [M, C]
        y = collected(rows, routes, len(tokens)).reshape(x.shape)
        return y + self.common(x) if self.shared else y

    @nn.nowrap
    def routes(self, tokens: Float[Array, "t c"], train: bool) -> Routes:
        """Who goes where; sows the losses and moves the bias."""
        noisy = self.logits(tokens, train)  # [T, E]
        if self.choice == "expert":
            factor = self.factor(train) or 1.0
            taken = capacity_of(factor, len(tokens), self.chosen, self.experts)
            routes = by_experts(affinities(noisy, self.scores), taken, self.normalised)
            return dataclasses.replace(routes, weight=self.scale * routes.weight)
        return self.served(noisy, *self.best(noisy, train), train)

    @nn.nowrap
    def factor(self, train: bool) -> float | None:
        """Of the capacity, in training or evaluation."""
        return self.capacity if train or self.eval_capacity is None else self.eval_capacity

    @nn.nowrap
    def logits(self, tokens: Float[Array, "t c"], train: bool) -> Float[Array, "t e"]:
        """What the router says, with noise in training; sows its z-loss."""
        logits = self.router(tokens, self.experts)  # [T, E]
        noisy = self._noisy(tokens, logits, train)  # [T, E]
        if self.z_loss and self._learns(train) and self.is_mutable_collection("losses"):
            self.sow("losses", "router_z", self.z_loss * router_z(logits))
        return noisy

    @nn.nowrap
    def best(self, logits: Float[Array, "t e"], train: bool) -> tuple[Float[Array, "t k"], Int[Array, "t k"]]:
        """Weights of each token's experts and which they are, best first; sows and moves what balances."""
        learns = self._learns(train)
        state = self._bias() if self.balance_rate else None
        bias = None if state is None else state.value
        weights, index = choose(logits, self.chosen, self.normalised, self.scores, bias)  # [T, K]
        if self.balance and learns and self.is_mutable_collection("losses"):
            self.sow("losses", "load_balance", self.balance * load_balance(logits, index, self.scores))
        if state is not None and learns and self.is_mutable_collection(STATE):
            state.value = nudged(state.value, index, self.balance_rate)
        return self.scale * weights, index

    @nn.nowrap
    def served(
        self, logits: Float[Array, "t e"], weights: Float[Array, "t k"], index: Int[Array, "t k"], train: bool
    ) -> Routes:
        """The rows of the experts that tokens chose, as far as there is place."""
        factor, (tokens, chosen) = self.factor(train), index.shape
        limit = None if factor is None else capacity_of(factor, tokens, chosen, self.experts)
        return by_tokens(weights, index, self.experts, limit, self.first(logits))

    @nn.nowrap
    def first(self, logits: Float[Array, "t e"]) -> Float[Array, " t"] | None:
        """Tokens with more are served first; None serves them in order."""
        return jnp.max(affinities(logits, self.scores), axis=-1) if self.priority == "score" else None

    @nn.nowrap
    def _learns(self, train: bool) -> bool:
        return train and not self.is_initializing()

    @nn.nowrap
    def _bias(self) -> nn.Variable:
        return self.variable(STATE, "bias", lambda: jnp.zeros((self.experts,), jnp.float32))

    @nn.nowrap
    def _noisy(
        self, tokens: Float[Array, "t c"], logits: Float[Array, "t e"], train: bool
    ) -> Float[Array, "t e"]:
        """The logits, with noise in training."""
        if not self.noise:
            return logits
        deviation: Array | float = 0.0
        if self.noise == "learned":
            axes = "embed", "expert"
            into = Dense(self.experts, axes, use_bias=False, kernel_init=zeros, name="noise_router")
            deviation = jax.nn.softplus(into(tokens))  # [T, E]
        else:
            deviation = self.noise / self.experts
        if not train or not self.has_rng("dropout"):
            return logits
        return logits + deviation * jax.random.normal(self.make_rng("dropout"), logits.shape, logits.dtype)

    @nn.nowrap
    def perceptrons(
        self, rows: Float[Array, "m c"], routes: Routes, factors: Mapping[str, Array] | None = None
    ) -> Float[Array, "m c"]:
        """Runs every row through its expert.

        Args:
          rows: of the experts.
          routes: which is whose.
          factors: of what enters each matrix, by its name; None leaves it.
        """
        return self.run_through(rows, routes.sizes, self.kernels(rows.shape[1], rows.dtype), factors)

    @nn.nowrap
    def kernels(self, width: int, dtype: DTypeLike) -> dict[str, Array]:
        """The arrays of all experts for tokens of so many channels, by name: `[E, ...]` each."""
        into, out = ("embed", "expert_mlp"), ("expert_mlp", "embed")
        held = {"gate": self.kernel("gate", (width, self.hidden), into, dtype)} if self.gated else {}
        held["expand"] = self.kernel("expand", (width, self.hidden), into, dtype)
        held["contract"] = self.kernel("contract", (self.hidden, width), out, dtype)
        if self.use_bias:
            init = named(zeros, ("expert", "expert_mlp"))
            held["bias"] = self.param("expand_bias", init, (self.experts, self.hidden))
        return held

    @nn.nowrap
    def run_through(
        self,
        rows: Float[Array, "m c"],
        sizes: Int[Array, " e"],
        kernels: Mapping[str, Array],
        factors: Mapping[str, Array] | None = None,
    ) -> Float[Array, "m c"]:
        """Runs runs of rows through the experts whose kernels are given.

        Args:
          rows: run after run.
          sizes: rows of each run.
          kernels: of all experts, or of some with as many runs.
          factors: of what enters each matrix, by its name; None leaves it.
        """
        entering = lambda name, x: x if factors is None else x * factors[name].astype(x.dtype)  # noqa: E731
        act, gate = activation(self.activation), kernels.get("gate")
        h = grouped(entering("expand", rows), kernels["expand"], sizes)  # [M, F]
        if "bias" in kernels:
            bias = jnp.take(kernels["bias"], runs(sizes, len(rows)), axis=0, mode="clip")  # [M, F]
            h = h + bias.astype(h.dtype)
        h = act(h) if gate is None else act(grouped(entering("gate", rows), gate, sizes)) * h  # [M, F]
        h = nn.with_logical_constraint(h, (None, "expert_mlp"))
        return grouped(entering("contract", h), kernels["contract"], sizes)  # [M, C]

    @nn.nowrap
    def common(self, x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
        """What the shared expert says."""
        shared: nn.Module
        if self.gated:
            shared = Gated(self.shared, self.activation, name="shared")
        else:
            shared = MLP(self.shared, activation=self.activation, use_bias=self.use_bias, name="shared")
        common = shared(x)
        if self.shared_gate:
            gate = Dense(1, ("embed", None), use_bias=False, name="shared_gate")(x)  # [..., 1]
            common = common * jax.nn.sigmoid(gate)
        return common

    @nn.nowrap
    def kernel(
        self, name: str, shape: tuple[int, int], axes: tuple[str, str], dtype: DTypeLike
    ) -> Float[Array, "e i o"]:
        """The matrices of all experts, stacked."""
        init = kernel_of(_each(xavier), ("expert", *axes), 1, 1)
        return array(self, f"{name}_kernel", init, (self.experts, *shape), jnp.float32, dtype=dtype)


def _each(init: Initializer) -> Initializer:
    """Initialises every expert by itself, so that the fan is that of one expert."""

    def stacked(key: Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
        return jax.vmap(lambda key: init(key, shape[1:], dtype))(jax.random.split(key, shape[0]))

    return stacked
