"""The methods by name."""

from typing import Any

from effjax.tokens.ats import ATS
from effjax.tokens.gtp import GTP
from effjax.tokens.pitome import PiToMe
from effjax.tokens.pruning import ClassAttention, RandomDrop
from effjax.tokens.restore import Restore
from effjax.tokens.token_transforming import TokenTransforming
from effjax.tokens.tome import ToMe

METHODS: dict[str, Any] = {
    "ats": ATS,
    "class_attention": ClassAttention,
    "gtp": GTP,
    "pitome": PiToMe,
    "random": RandomDrop,
    "restore": Restore,
    "token_transforming": TokenTransforming,
    "tome": ToMe,
}
