"""How channels mix. Each kind is a Linen module on `[..., C]`."""

from effjax.ffn.cats import CATS
from effjax.ffn.compressed_mixture import CompressedMixture
from effjax.ffn.exchange import ExchangedMixture
from effjax.ffn.gated import Gated
from effjax.ffn.hyena import HyenaFFN
from effjax.ffn.ista import ISTA
from effjax.ffn.lsh_mixture import LSHMixture
from effjax.ffn.memory import Memory
from effjax.ffn.mixture import Mixture
from effjax.ffn.mlp import MLP
from effjax.ffn.normed import NormedMLP
from effjax.ffn.pattention import PattentionFFN
from effjax.ffn.spark import SparkFFN

KINDS = {
    "cats": CATS,
    "compressed_mixture": CompressedMixture,
    "exchanged_mixture": ExchangedMixture,
    "gated": Gated,
    "hyena": HyenaFFN,
    "ista": ISTA,
    "lsh_mixture": LSHMixture,
    "memory": Memory,
    "mixture": Mixture,
    "mlp": MLP,
    "normed_mlp": NormedMLP,
    "pattention": PattentionFFN,
    "spark": SparkFFN,
}
