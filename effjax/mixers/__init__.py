"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention
from effjax.mixers.conv_query import ConvQueryAttention
from effjax.mixers.cross_shaped_window import CrossShapedWindow
from effjax.mixers.large_small import LargeSmall
from effjax.mixers.mamba import Mamba
from effjax.mixers.reparam_depthwise import ReparamDepthwise
from effjax.mixers.shifted_window import ShiftedWindow

KINDS = {
    "attention": Attention,
    "conv_query": ConvQueryAttention,
    "cross_shaped_window": CrossShapedWindow,
    "large_small": LargeSmall,
    "mamba": Mamba,
    "reparam_depthwise": ReparamDepthwise,
    "shifted_window": ShiftedWindow,
}
