"""How channels mix. Each kind is a Linen module on `[..., C]`."""

from effjax.ffn.gated import Gated
from effjax.ffn.hyena import HyenaFFN
from effjax.ffn.ista import ISTA
from effjax.ffn.mixture import Mixture
from effjax.ffn.mlp import MLP
from effjax.ffn.normed import NormedMLP

KINDS = {
    "gated": Gated,
    "hyena": HyenaFFN,
    "ista": ISTA,
    "mixture": Mixture,
    "mlp": MLP,
    "normed_mlp": NormedMLP,
}
