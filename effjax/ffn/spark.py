"""Spark FFN: the first channels of a token say which neurons it needs, the others what these say.

    y = (sigma(T_k(x[:r] W_gate)) * (x[r:] W_expand)) W_contract

T_k is the statistical top-k of `effjax.layers.statistical_topk`: all but about k neurons are zero, as
sigma(0) = 0. Of the input's channels each meets one matrix instead of two, so that with 3/2 as many neurons
there are as many parameters as in the gated perceptron: 2 C F. A token then costs r F + (C - r) k + C k
multiply-accumulates; with r = C/2 and few k that is a quarter of 2 C F.

You et al., "Spark Transformer: Reactivating Sparsity in FFN and Attention", NeurIPS 2025, arXiv:2506.06644,
section 2. In Gemma-2 2B: C = 2304, F = 13824, r = 1024, k = 8% of F.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.ffn.active import Implementation, perceptron
from effjax.layers.activations import activation
from effjax.layers.statistical_topk import soft_top_k


class SparkFFN(nn.Module):
    """A gated perceptron of whose neurons about `active` count for a token.

    Attributes:
      hidden: number of neurons.
      predictor: r above, the channels that choose among them.
      active: k above; `hidden` leaves all in, and draws no threshold.
      activation: sigma, a name in `effjax.layers.activations`; it must be 0 at 0.
      by_rows: whether every matrix has a row a neuron, for decoding: see `effjax.ffn.active`.
      implementation: of the step that reads the rows of active neurons: see there too.
    """

    hidden: int
    predictor: int
    active: int
    activation: str = "gelu_tanh"
    by_rows: bool = False
    implementation: Implementation = "plain"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.active <= self.hidden:
            raise UsageError(f"active={self.active} of hidden={self.hidden}: choose from 1 to all of them.")

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool = False) -> Float[Array, "*batch c"]:
        """Mixes the channels of each token."""
        width = x.shape[-1]
        if not 1 <= self.predictor < width:
            raise UsageError(
                f"predictor={self.predictor} of {width} channels: take some, and leave some to the values."
            )

        def sparse(products: Float[Array, "*batch f"]) -> Float[Array, "*batch f"]:
            return activation(self.activation)(soft_top_k(products, self.active))

        return perceptron(
            x[..., : self.predictor],
            x[..., self.predictor :],
            sparse,
            hidden=self.hidden,
            width=width,
            by_rows=self.by_rows,
            train=train,
            implementation=self.implementation,
            active=self.active,
        )
