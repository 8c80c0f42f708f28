"""The residual blocks that a stage repeats. Each maps `(x, drop_rate, context, train)` to `(x, None)`."""

from effjax.models.blocks.dumbbell import Dumbbell, SemanticWindows
from effjax.models.blocks.large_kernel import LargeKernel
from effjax.models.blocks.lean import Lean
from effjax.models.blocks.lowformer import LowFormer
from effjax.models.blocks.mbconv import MBConv
from effjax.models.blocks.metaformer import Block
from effjax.models.blocks.moat import MOAT
from effjax.models.blocks.nextvit import NextConv, NextTransformer

KINDS = {
    "dumbbell": Dumbbell,
    "large_kernel": LargeKernel,
    "lean": Lean,
    "lowformer": LowFormer,
    "mbconv": MBConv,
    "metaformer": Block,
    "moat": MOAT,
    "next_conv": NextConv,
    "next_transformer": NextTransformer,
    "semantic_windows": SemanticWindows,
}
