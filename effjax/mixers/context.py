"""What a mixer may know about its tokens besides their values."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Context:
    """Facts about a sequence of `n` tokens, each optional.

    Attributes:
      positions: place of each token in its document or image, for rotary positions.
      segments: tokens attend only within the same segment number (packed documents); 0 marks padding.
      valid: tokens that exist; the others are never attended to.
      size: how many original tokens each stands for; proportional attention adds its logarithm to the logits.
    """

    positions: Int[Array, "b n"] | None = None
    segments: Int[Array, "b n"] | None = None
    valid: Bool[Array, "b n"] | None = None
    size: Float[Array, "b n"] | None = None

    def mask(self) -> Bool[Array, "b 1 n n"] | None:
        """Which keys (last axis) each query may see, by segments and validity; None where all may see all."""
        allowed = None
        if self.segments is not None:
            allowed = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        if self.valid is not None:
            keys = jnp.broadcast_to(
                self.valid[:, None, None, :], (*self.valid.shape[:1], 1, *self.valid.shape[1:] * 2)
            )
            allowed = keys if allowed is None else allowed & keys
        return allowed
