"""Which tokens exist: methods that merge, drop, mix and restore them, on any backbone that lets them.

fast = model.clone(reduce=PiToMe(keep=0.925))
logits = fast.apply(variables, images)
"""

from effjax.tokens.ats import ATS
from effjax.tokens.expedit import Expedit
from effjax.tokens.gtp import GTP
from effjax.tokens.methods import METHODS
from effjax.tokens.pitome import PiToMe
from effjax.tokens.pruning import ClassAttention, RandomDrop
from effjax.tokens.restore import Restore
from effjax.tokens.schedule import Schedule
from effjax.tokens.semantic import Recover, Semantic
from effjax.tokens.slimming import Slimming
from effjax.tokens.token_transforming import TokenTransforming
from effjax.tokens.tokens import Tokens
from effjax.tokens.tome import ToMe
from effjax.tokens.top_vim import ToPViM

KINDS = METHODS | {"schedule": Schedule}

__all__ = [
    "ATS",
    "GTP",
    "KINDS",
    "ClassAttention",
    "Expedit",
    "PiToMe",
    "RandomDrop",
    "Recover",
    "Restore",
    "Schedule",
    "Semantic",
    "Slimming",
    "ToMe",
    "ToPViM",
    "TokenTransforming",
    "Tokens",
]
