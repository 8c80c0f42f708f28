"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention
from effjax.mixers.lowtention import Lowtention
from effjax.mixers.mamba import Mamba
from effjax.mixers.multi_head_conv import MultiHeadConv
from effjax.mixers.pooled_attention import PooledAttention
from effjax.mixers.shifted_window import ShiftedWindow

KINDS = {
    "attention": Attention,
    "lowtention": Lowtention,
    "mamba": Mamba,
    "multi_head_conv": MultiHeadConv,
    "pooled_attention": PooledAttention,
    "shifted_window": ShiftedWindow,
}
