"""A transformer small enough to run in a test."""

import jax

from effjax.ffn import MLP
from effjax.mixers import Attention
from effjax.models import ViT
from effjax.models.blocks.metaformer import Block


def vit(reduce=None, **more):
    """16 patches and a class token in four blocks of 16 channels."""
    settings = dict(patch=2, dim=16, depth=4, classes=5) | more
    return ViT(Block(Attention(heads=2), MLP(ratio=2.0)), reduce=reduce, **settings)


def images(count=2):
    return jax.random.normal(jax.random.key(7), (count, 8, 8, 1))
