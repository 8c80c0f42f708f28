"""How tokens mix. Each kind is a Linen module with the same shape in and out."""

from effjax.mixers.attention import Attention

KINDS = {"attention": Attention}
