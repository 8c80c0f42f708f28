"""The methods by name: those inside a block, and those between two blocks."""

from typing import Any

from effjax.tokens.ats import ATS
from effjax.tokens.expedit import Expedit
from effjax.tokens.gtp import GTP
from effjax.tokens.pitome import PiToMe
from effjax.tokens.pruning import ClassAttention, RandomDrop
from effjax.tokens.restore import Restore
from effjax.tokens.semantic import Recover, Semantic
from effjax.tokens.slimming import Slimming
from effjax.tokens.token_transforming import TokenTransforming
from effjax.tokens.tome import ToMe
from effjax.tokens.top_vim import ToPViM

METHODS: dict[str, Any] = {
    "ats": ATS,
    "class_attention": ClassAttention,
    "expedit": Expedit,
    "gtp": GTP,
    "pitome": PiToMe,
    "random": RandomDrop,
    "token_transforming": TokenTransforming,
    "tome": ToMe,
    "top_vim": ToPViM,
}

# `(tokens, train) -> tokens`: functions, and Linen modules, whose parameters the model then owns.
BETWEEN: dict[str, Any] = {
    "recover": Recover,
    "restore": Restore,
    "semantic": Semantic,
    "slimming": Slimming,
}
