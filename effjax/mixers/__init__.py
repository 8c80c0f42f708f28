"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention
from effjax.mixers.mamba import Mamba
from effjax.mixers.shifted_window import ShiftedWindow
from effjax.mixers.simplified_linear import SimplifiedLinear
from effjax.mixers.subspace_attention import SubspaceAttention
from effjax.mixers.vision_mamba import VisionMamba

KINDS = {
    "attention": Attention,
    "mamba": Mamba,
    "shifted_window": ShiftedWindow,
    "simplified_linear": SimplifiedLinear,
    "subspace_attention": SubspaceAttention,
    "vision_mamba": VisionMamba,
}
