"""The residual blocks that a stage repeats. Each maps `(x, drop_rate, context, train)` to `(x, None)`."""

from effjax.models.blocks.large_kernel import LargeKernel
from effjax.models.blocks.lean import Lean
from effjax.models.blocks.metaformer import Block

KINDS = {"large_kernel": LargeKernel, "lean": Lean, "metaformer": Block}
