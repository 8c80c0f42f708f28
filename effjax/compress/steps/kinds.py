"""Steps of a recipe, by the name that a config gives them."""

from effjax.compress.steps.efficientqat import EfficientQAT
from effjax.compress.steps.finequant import FineQuant
from effjax.compress.steps.round import Round

KINDS = {"efficientqat": EfficientQAT, "finequant": FineQuant, "round": Round}
