"""No mixing at all: y = x.

MetaFormer Is Actually What You Need for Vision, Yu et al. 2022, section 4.4, puts it in place of pooling to
see what the rest of a network does alone: its downsampling still mixes neighbours.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.mixers.context import Context


class Identity(nn.Module):
    """Hands every token on."""

    def __call__(
        self, x: Float[Array, "b *places c"], context: Context, train: bool = False
    ) -> Float[Array, "b *places c"]:
        """Returns its input."""
        return x
