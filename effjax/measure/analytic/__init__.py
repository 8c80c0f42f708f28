"""Small closed-form models of what inference costs, each after one paper; nothing is compiled or run.

`serving`: users, latency and context switches of a decoder. `inference`: parameters, FLOPs, bytes and
roofline of any transformer. `gemm`: tiles and waves of a matrix product. `near_memory`: attention in the
memory's banks. `bit_weight`: integer products digit by digit.
"""

from effjax.measure.analytic.serving import Compression, Serving, serve
from effjax.measure.analytic.shape import Chip, DecoderShape

__all__ = ["Chip", "Compression", "DecoderShape", "Serving", "serve"]
