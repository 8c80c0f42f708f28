"""Blocks of diffusion transformers by the name a config gives them.

A block maps `(x [B, N, C], each, c [B, C] | None, context, train)` to `(x, kept)`; `each` is a `Layer`.
"""

from effjax.models.blocks.denoising_layer import LAYERS
from effjax.models.blocks.several import Cycle, Parallel

KINDS = LAYERS | {"cycle": Cycle, "parallel": Parallel}
