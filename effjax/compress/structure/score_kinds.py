"""What units may be worth, by the name that a config gives it."""

from effjax.compress.structure.optin import Optin
from effjax.compress.structure.scores import Magnitude, Random, Taylor

KINDS = {"random": Random, "magnitude": Magnitude, "taylor": Taylor, "optin": Optin}
