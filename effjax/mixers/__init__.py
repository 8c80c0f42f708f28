"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention
from effjax.mixers.depthwise import Depthwise
from effjax.mixers.focal_modulation import FocalModulation
from effjax.mixers.identity import Identity
from effjax.mixers.mamba import Mamba
from effjax.mixers.pooling import Pooling
from effjax.mixers.shifted_window import ShiftedWindow
from effjax.mixers.spatial import RandomMatrix, SpatialFC

KINDS = {
    "attention": Attention,
    "depthwise": Depthwise,
    "focal_modulation": FocalModulation,
    "identity": Identity,
    "mamba": Mamba,
    "pooling": Pooling,
    "random_matrix": RandomMatrix,
    "shifted_window": ShiftedWindow,
    "spatial_fc": SpatialFC,
}
