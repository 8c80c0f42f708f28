"""A mixture of which a token's first experts alone are run, and the others it chose are vectors.

    index, g = the `chosen` best experts of a token, and their weights, best first
    theta    = 1 + sum_{j > main} a_j c_{e_j},       a_j = g_j / sum_{i > main} g_i
    y        = sum_{j <= main} g_j expert_{e_j}
    expert   = (act((theta_1 * x) W_gate) * ((theta_2 * x) W_expand) * theta_3) W_contract

The main experts keep the weights that they have among all the chosen ones: they are not normalised again.
Every expert has its own c for each of its matrices, or one for the token that enters both; they are zero at
the start, where the layer is that of its main experts alone. With `main = chosen` it is its parent.

Source: He, Liu, Liang and Awadalla, "Efficiently Editing Mixture-of-Experts Models with Compressed Experts",
EMNLP Findings 2025, arXiv:2503.00634. The published figure has one vector, on the token; the published code
one a matrix, ones at the start and with a theta that is their weighted mean, which is the same function.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import UsageError
from effjax.ffn.mixture import Mixture
from effjax.ffn.routing import collected, spread
from effjax.layers.dense import named, zeros

Vectors = Literal["matrix", "token", "none"]


class CompressedMixture(Mixture):
    """The mixture with fewer experts run than chosen.

    Attributes:
      main: how many of the chosen experts are run.
      vectors: what the others are: a vector a matrix, one for the token, or nothing.
    """

    main: int = 1
    vectors: Vectors = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.main <= self.chosen:
            raise UsageError(f"main={self.main} of chosen={self.chosen} experts: run from 1 to all of them.")
        if self.choice == "expert":
            raise UsageError("experts that choose have no order a token: choice='token' has.")

    @property
    def run(self) -> int:
        """How many experts a token is run through."""
        return self.main

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, C]
        logits = self.logits(tokens, train)  # [T, E]
        weights, index = self.best(logits, train)  # [T, K]
        routes = self.served(logits, weights[:, : self.main], index[:, : self.main], train)
        if not self.is_initializing():
            self.sow("intermediates", "routes", routes)
        factors = None
        if self.main < self.chosen and self.vectors != "none":
            every = self._factors(weights[:, self.main :], index[:, self.main :], x.shape[-1])
            factors = {name: spread(theta, routes) for name, theta in every.items()}  # [M, C] or [M, F]
        rows = self.perceptrons(spread(tokens, routes), routes, factors)  # [M, C]
        y = collected(rows, routes, len(tokens)).reshape(x.shape)
        return y + self.common(x) if self.shared else y

    @nn.nowrap
    def _factors(
        self, weights: Float[Array, "t a"], index: Int[Array, "t a"], width: int
    ) -> dict[str, Float[Array, "t _"]]:
        """theta of every matrix, by its name."""
        total = jnp.sum(weights, axis=-1, keepdims=True)  # [T, 1]
        # Scores so small that they vanish are alike.
        share = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 1 / weights.shape[1])  # [T, A]
        if self.vectors == "token":
            theta = self._theta("compressed", share, index, width, "embed")
            return {
                "gate": theta,
                "expand": theta,
                "contract": jnp.ones((len(index), self.hidden), theta.dtype),
            }
        made = {"expand": self._theta("compressed_expand", share, index, width, "embed")}
        made["contract"] = self._theta("compressed_contract", share, index, self.hidden, "expert_mlp")
        if self.gated:
            made["gate"] = self._theta("compressed_gate", share, index, width, "embed")
        return made

    @nn.nowrap
    def _theta(
        self, name: str, share: Float[Array, "t a"], index: Int[Array, "t a"], size: int, axis: str
    ) -> Float[Array, "t s"]:
        vectors = self.param(
            name, named(zeros, ("expert", axis)), (self.experts, size), jnp.float32
        )  # [E, S]
        own = jnp.take(vectors, index, axis=0)  # [T, A, S]
        return 1 + jnp.einsum("ta,tas->ts", share.astype(own.dtype), own)  # [T, S]
