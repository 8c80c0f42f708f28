"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention
from effjax.mixers.cross_shaped_window import CrossShapedWindow
from effjax.mixers.mamba import Mamba
from effjax.mixers.neighborhood import Neighborhood
from effjax.mixers.shifted_window import ShiftedWindow

KINDS = {
    "attention": Attention,
    "cross_shaped_window": CrossShapedWindow,
    "mamba": Mamba,
    "neighborhood": Neighborhood,
    "shifted_window": ShiftedWindow,
}
