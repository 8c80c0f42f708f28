"""Steps of a recipe, by the name that a config gives them."""

from effjax.compress.steps.abq_llm import ABQ
from effjax.compress.steps.efficientqat import EfficientQAT
from effjax.compress.steps.finequant import FineQuant
from effjax.compress.steps.round import Round

KINDS = {"abq_llm": ABQ, "efficientqat": EfficientQAT, "finequant": FineQuant, "round": Round}
