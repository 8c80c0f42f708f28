"""Next-ViT's two blocks: convolution for what is near, convolution and attention for what is far.

    NCB   x <- transition(x)
          x <- x + drop(mhca(x))
          x <- x + drop(ffn(norm(x)))

    NTB   x <- transition(x)                            onto the channels of the attention
          x <- x + drop(e_mhsa(norm(x)))
          z = transition(x);  z <- z + drop(mhca(z))    onto the channels that are left
          x <- [x, z]
          x <- x + drop(ffn(norm(x)))

A transition is average pooling where the map becomes coarser, a projection of 1 x 1 and a norm; where neither
map nor channels change it is nothing. Norms are batch norms.

Source: Li et al. 2022, "Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic
Industrial Scenarios", equations 1 and 5, figure 2, and its code.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense
from effjax.layers.drop import stochastic_depth
from effjax.layers.norms import norm
from effjax.mixers.context import Context
from effjax.mixers.multi_head_conv import MultiHeadConv
from effjax.mixers.pooled_attention import PooledAttention
from effjax.models.blocks.mbconv import average_pool


class Transition(nn.Module):
    """Pools, projects and normalises, where anything changes.

    Attributes:
      dim: channels of the output.
      stride: of the pooling.
      epsilon: of the batch norm.
    """

    dim: int
    stride: int = 1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h2 w2 o"]:
        """Maps to `dim` channels."""
        if self.stride == 1 and x.shape[-1] == self.dim:
            return x
        if self.stride > 1:
            x = average_pool(x, self.stride, self.stride)  # [B, H/s, W/s, C]
        x = Dense(self.dim, (None, "embed"), use_bias=False, name="project")(x)  # [B, H/s, W/s, O]
        return norm("batch", self.epsilon, "norm", train=train)(x)


class NextConv(nn.Module):
    """The convolution block, NCB.

    Attributes:
      dim: channels of the output.
      stride: of the transition.
      head_dim: channels of a head of the convolution.
      ratio: expansion of the perceptron.
      activation: a name in `effjax.layers.activations`.
      epsilon: of the norms.
    """

    dim: int
    stride: int = 1
    head_dim: int = 32
    ratio: float = 3.0
    activation: str = "relu"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rate: Float[Array, ""],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b h2 w2 o"], None]:
        """Returns `(x, None)`; `drop_rate` is this layer's stochastic depth."""
        x = Transition(self.dim, self.stride, self.epsilon, name="transition")(x, train=train)
        h = MultiHeadConv(self.head_dim, self.activation, self.epsilon, name="mhca")(x, context, train=train)
        x = x + stochastic_depth(self, h, drop_rate, train)  # [B, H/s, W/s, O]
        h = norm("batch", self.epsilon, "ffn_norm", train=train)(x)
        h = MLP(int(self.dim * self.ratio), activation=self.activation, name="ffn")(h)
        return constrain(x + stochastic_depth(self, h, drop_rate, train)), None


class NextTransformer(nn.Module):
    """The transformer block, NTB.

    Attributes:
      dim: channels of the output.
      attention_dim: how many of them are those of the attention; the others are those of the convolution.
      pool: of the keys and values, see `PooledAttention`.
      stride: of the transition.
      head_dim: channels of a head.
      ratio: expansion of the perceptron.
      activation: a name in `effjax.layers.activations`.
      epsilon: of the norms.
    """

    dim: int
    attention_dim: int
    pool: int = 1
    stride: int = 1
    head_dim: int = 32
    ratio: float = 2.0
    activation: str = "relu"
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.attention_dim < self.dim:
            raise UsageError(
                f"attention_dim={self.attention_dim} must leave some of dim={self.dim} channels."
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_rate: Float[Array, ""],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b h2 w2 o"], None]:
        """Returns `(x, None)`; each branch is dropped at `drop_rate` times its share of the channels."""
        far, near, share = self.attention_dim, self.dim - self.attention_dim, self.attention_dim / self.dim
        heads = max(far // self.head_dim, 1)
        x = Transition(far, self.stride, self.epsilon, name="transition")(x, train=train)
        h = norm("batch", self.epsilon, "mixer_norm", train=train)(x)  # [B, H/s, W/s, far]
        h = PooledAttention(heads, self.pool, self.epsilon, name="mhsa")(h, context, train=train)
        x = x + stochastic_depth(self, h, drop_rate * share, train)
        z = Transition(near, 1, self.epsilon, name="projection")(x, train=train)  # [B, H/s, W/s, near]
        h = MultiHeadConv(self.head_dim, self.activation, self.epsilon, name="mhca")(z, context, train=train)
        z = z + stochastic_depth(self, h, drop_rate * (1 - share), train)
        x = jnp.concatenate([x, z], axis=-1)  # [B, H/s, W/s, O]
        h = norm("batch", self.epsilon, "ffn_norm", train=train)(x)
        h = MLP(int(self.dim * self.ratio), activation=self.activation, name="ffn")(h)
        return constrain(x + stochastic_depth(self, h, drop_rate, train)), None
