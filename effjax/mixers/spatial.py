"""Mixing by one matrix over all places, the same for every channel.

    spatial_fc      y = W x + b,    x [N, C], W [N, N], b [N]              Touvron et al. 2021, ResMLP
    random_matrix   y = W x,        W = softmax over rows of uniform(0, 1), never trained

The second shows how little a mixer needs to learn: MetaFormer Is Actually What You Need for Vision, Yu et
al. 2022, section 4.4. N is the number of places, so a network with either serves pictures of one size.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import named, xavier, zeros
from effjax.mixers.context import Context


class SpatialFC(nn.Module):
    """A learned matrix and bias over places."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *places c"], context: Context, train: bool = False
    ) -> Float[Array, "b *places c"]:
        """Mixes all places."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, N, C]
        count = tokens.shape[1]
        kernel = self.param("kernel", named(xavier, (None, None)), (count, count), jnp.float32)
        bias = self.param("bias", named(zeros, (None,)), (count,), jnp.float32)
        tokens, kernel, bias = nn.dtypes.promote_dtype(tokens, kernel, bias)
        y = jnp.einsum("bnc,nm->bmc", tokens, kernel) + bias[None, :, None]  # [B, N, C]
        return y.reshape(x.shape)


class RandomMatrix(nn.Module):
    """A matrix over places that stays as it was drawn, in the collection `constants`."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *places c"], context: Context, train: bool = False
    ) -> Float[Array, "b *places c"]:
        """Mixes all places.

        Raises:
          UsageError: for a map of another size than the matrix was drawn for.
        """
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, N, C]
        count = tokens.shape[1]

        def draw() -> Float[Array, "n n"]:
            return jax.nn.softmax(jax.random.uniform(self.make_rng("params"), (count, count)), axis=-1)

        matrix = self.variable("constants", "matrix", draw).value  # [N, N]
        if len(matrix) != count:
            raise UsageError(
                f"a random matrix over {len(matrix)} places cannot mix a map of {count}: it serves pictures "
                "of the one size that the network was made with."
            )
        return jnp.einsum("mn,bnc->bmc", matrix.astype(x.dtype), tokens).reshape(x.shape)
