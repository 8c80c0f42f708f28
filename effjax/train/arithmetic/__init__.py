"""Training whose products run in fewer bits than its weights have.

    y = x W      with codes or rounded numbers in the place of x, of W, and on the way back of dL/dy

Weights, optimiser and checkpoints stay what they are; only while the training step computes its loss, an
object stands in the place of each chosen kernel that multiplies in another arithmetic. Config:

    train = dict(..., arithmetic=dict(kind="int8"))
"""

from effjax.train.arithmetic.products import Arithmetic, InFewerBits, within
from effjax.train.arithmetic.reduced import Reduced
from effjax.train.arithmetic.scaled import Float8, Int8

__all__ = ["KINDS", "Arithmetic", "InFewerBits", "within"]

KINDS = {"int8": Int8, "fp8": Float8, "reduced": Reduced}
