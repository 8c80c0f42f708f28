"""The methods by name."""

from typing import Any

from effjax.tokens.expedit import Expedit
from effjax.tokens.pitome import PiToMe
from effjax.tokens.pruning import ClassAttention, RandomDrop
from effjax.tokens.restore import Restore
from effjax.tokens.tome import ToMe

METHODS: dict[str, Any] = {
    "class_attention": ClassAttention,
    "expedit": Expedit,
    "pitome": PiToMe,
    "random": RandomDrop,
    "restore": Restore,
    "tome": ToMe,
}
