"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention
from effjax.mixers.depthwise import Depthwise
from effjax.mixers.mamba import Mamba
from effjax.mixers.pooling import Pooling
from effjax.mixers.shifted_window import ShiftedWindow

KINDS = {
    "attention": Attention,
    "depthwise": Depthwise,
    "mamba": Mamba,
    "pooling": Pooling,
    "shifted_window": ShiftedWindow,
}
