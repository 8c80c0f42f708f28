"""How channels mix. Each kind is a Linen module on `[..., C]`."""

from effjax.ffn.gated import Gated
from effjax.ffn.mixture import Mixture
from effjax.ffn.mlp import MLP
from effjax.ffn.normed import NormedMLP

KINDS = {"mlp": MLP, "gated": Gated, "mixture": Mixture, "normed_mlp": NormedMLP}
