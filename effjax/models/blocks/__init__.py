"""The residual blocks that a stage repeats. Each maps `(x, drop_rate, context, train)` to `(x, None)`."""

from effjax.models.blocks.lowformer import LowFormer
from effjax.models.blocks.mbconv import MBConv
from effjax.models.blocks.metaformer import Block
from effjax.models.blocks.moat import MOAT
from effjax.models.blocks.nextvit import NextConv, NextTransformer

KINDS = {
    "metaformer": Block,
    "mbconv": MBConv,
    "moat": MOAT,
    "lowformer": LowFormer,
    "next_conv": NextConv,
    "next_transformer": NextTransformer,
}
