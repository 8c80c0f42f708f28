"""How what enters a kernel is rounded, by the name that a config gives it."""

from effjax.compress.storage.grouped_inputs import Grouped
from effjax.compress.storage.inputs import Static, Tensor, Token

KINDS = {"token": Token, "tensor": Tensor, "static": Static, "grouped": Grouped}
