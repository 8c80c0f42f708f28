"""What a mixer may know about its tokens besides their values."""

from typing import Any

import flax.struct
from jaxtyping import Array, Bool


@flax.struct.dataclass
class Context:
    """Facts about a sequence of `n` tokens, each optional.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      positions: `[B, N]` int, place of each token in its document or image, for rotary positions.
      segments: `[B, N]` int, tokens attend only within the same segment (packed documents); 0 marks padding.
      valid: `[B, N]` bool, tokens that exist; the others are never attended to.
      size: `[B, N]` float, how many original tokens each stands for; proportional attention adds its
        logarithm to the logits.
      window: `[]` int, how many tokens back a token of this layer sees, itself included; in place of the
        mixer's own `window` where layers differ.
      rotary: `([D/2], [])` frequencies and amplitude of this layer's rotary positions; in place of the
        mixer's own where layers differ.
      norm_scale: `[]`, factor of the norms before the branches of this layer.
      layer: `[]` int, number of this layer, where its FFN asks for it.
      share: of the weights of each head those that count, the largest; the others are left out of the sum.
        None counts all.
      grid: rows and columns that the tokens are laid out in, row by row, where nothing else is among them;
        frames, rows and columns of a video.
      modality: which modality each token is of, an `effjax.layers.modal.Modalities`.
      cache: which tokens a layer that decodes keeps, an `effjax.decoding.policies.policy.Policy`; None keeps
        all.
      turn: number of the layer among those that do different things in turn.
    """

    positions: Any = None
    segments: Any = None
    valid: Any = None
    size: Any = None
    window: Any = None
    rotary: Any = None
    norm_scale: Any = None
    layer: Any = None
    modality: Any = None
    share: float | None = flax.struct.field(pytree_node=False, default=None)
    grid: Any = flax.struct.field(pytree_node=False, default=None)
    cache: Any = flax.struct.field(pytree_node=False, default=None)
    turn: int | None = flax.struct.field(pytree_node=False, default=None)

    def mask(self) -> Bool[Array, "b 1 _ n"] | None:
        """Which keys (last axis) each query may see, by segments and validity; None where all may see all.

        By validity alone all queries see the same: there is one row of them.
        """
        allowed = None
        if self.segments is not None:
            allowed = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        if self.valid is not None:
            keys = self.valid[:, None, None, :]  # [B, 1, 1, N]
            allowed = keys if allowed is None else allowed & keys
        return allowed
