"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention
from effjax.mixers.bidirectional_mamba2 import BidirectionalMamba2
from effjax.mixers.conv_query import ConvQueryAttention
from effjax.mixers.cross_shaped_window import CrossShapedWindow
from effjax.mixers.depthwise import Depthwise
from effjax.mixers.focal_modulation import FocalModulation
from effjax.mixers.hyena import Hyena
from effjax.mixers.identity import Identity
from effjax.mixers.large_small import LargeSmall
from effjax.mixers.lowtention import Lowtention
from effjax.mixers.mamba import Mamba
from effjax.mixers.mamba2 import Mamba2
from effjax.mixers.mate import Mate
from effjax.mixers.multi_head_conv import MultiHeadConv
from effjax.mixers.neighborhood import Neighborhood
from effjax.mixers.pooled_attention import PooledAttention
from effjax.mixers.pooling import Pooling
from effjax.mixers.pyramid_attention import PyramidAttention
from effjax.mixers.reparam_depthwise import ReparamDepthwise
from effjax.mixers.shifted_volume import ShiftedVolume
from effjax.mixers.shifted_window import ShiftedWindow
from effjax.mixers.sigmoid_attention import SigmoidAttention
from effjax.mixers.simplified_linear import SimplifiedLinear
from effjax.mixers.sliding_window import SlidingWindow
from effjax.mixers.spark_attention import SparkAttention
from effjax.mixers.spatial import RandomMatrix, SpatialFC
from effjax.mixers.spatial_reduction import SpatialReduction
from effjax.mixers.subspace_attention import SubspaceAttention
from effjax.mixers.token_parameter import TokenParameterAttention
from effjax.mixers.vision_mamba import VisionMamba

KINDS = {
    "attention": Attention,
    "bidirectional_mamba2": BidirectionalMamba2,
    "conv_query": ConvQueryAttention,
    "cross_shaped_window": CrossShapedWindow,
    "depthwise": Depthwise,
    "focal_modulation": FocalModulation,
    "hyena": Hyena,
    "identity": Identity,
    "large_small": LargeSmall,
    "lowtention": Lowtention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mate": Mate,
    "multi_head_conv": MultiHeadConv,
    "neighborhood": Neighborhood,
    "pooled_attention": PooledAttention,
    "pooling": Pooling,
    "pyramid_attention": PyramidAttention,
    "random_matrix": RandomMatrix,
    "reparam_depthwise": ReparamDepthwise,
    "shifted_volume": ShiftedVolume,
    "shifted_window": ShiftedWindow,
    "sigmoid_attention": SigmoidAttention,
    "simplified_linear": SimplifiedLinear,
    "sliding_window": SlidingWindow,
    "spark_attention": SparkAttention,
    "spatial_fc": SpatialFC,
    "spatial_reduction": SpatialReduction,
    "subspace_attention": SubspaceAttention,
    "token_parameter_attention": TokenParameterAttention,
    "vision_mamba": VisionMamba,
}
