"""Blocks of diffusion transformers by the name a config gives them.

A block maps `(x [B, N, C], each, c [B, C] | None, context, train)` to `(x, kept)`; `each` is a `Layer`.
Where the time alone decides what a layer does, `block.router(depth)` is a module that decides it for all
layers: `(t [B], its embedding [B, C], embed) -> route`, whose slices are each layer's `each.route`. `embed`
makes embeddings of other times.
"""

from effjax.models.blocks.denoising_layer import LAYERS
from effjax.models.blocks.mixture import MixtureOfBlocks
from effjax.models.blocks.several import Cycle, Parallel
from effjax.models.blocks.switch_dit import SwitchDiTBlock

KINDS = LAYERS | {
    "cycle": Cycle,
    "mixture_of_blocks": MixtureOfBlocks,
    "parallel": Parallel,
    "switch_dit": SwitchDiTBlock,
}
