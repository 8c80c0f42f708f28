"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention
from effjax.mixers.mamba import Mamba

KINDS = {"attention": Attention, "mamba": Mamba}
