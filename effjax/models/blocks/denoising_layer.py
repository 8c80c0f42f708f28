"""Blocks of diffusion transformers that are one layer, by the name a config gives them; see `denoising`."""

from effjax.models.blocks.adaln import DiTBlock

LAYERS = {"adaln_zero": DiTBlock}
