"""The residual blocks that a stage repeats. Each maps `(x, drop_rate, context, train)` to `(x, None)`."""

from effjax.models.blocks.metaformer import Block

KINDS = {"metaformer": Block}
