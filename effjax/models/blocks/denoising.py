"""Blocks of diffusion transformers by the name a config gives them.

A block maps `(x [B, N, C], each, c [B, C] | None, context, train)` to `(x, kept)`; `each` is a `Layer`.
"""

from effjax.models.blocks.adaln import DiTBlock

KINDS = {"adaln_zero": DiTBlock}
