"""What a decoder costs for one token where only some neurons and some keys count.

    share of a gated perceptron's weights that is read     1/3 + 2/3 a          a: active share
    multiply-accumulates of a layer                        3 C F + 2 H d n
    of a layer of Spark          r F + (C - r) k + C k + H (r_a n + (2 d - r_a) min(k_a, n))

n keys are seen, H heads of d channels; r and k are those of the perceptron, r_a and k_a those of attention:
`effjax.ffn.spark`, `effjax.mixers.spark_attention`. The gate of CATS is read whole, of the other two matrices
only what belongs to active neurons. Sources: Lee et al. 2024, arXiv:2404.08763; You et al. 2025,
arXiv:2506.06644, which counts the same with r = C/2.

    >>> decode_macs(spark, seen=4096).layers / decode_macs(gemma2, seen=4096).layers
"""

import dataclasses

from effjax.errors import UsageError
from effjax.ffn.cats import CATS
from effjax.ffn.gated import Gated
from effjax.ffn.spark import SparkFFN
from effjax.measure.analytic.shape import Number
from effjax.mixers.attention import Attention
from effjax.mixers.spark_attention import SparkAttention
from effjax.models.lm import LM


def read_share(active: Number) -> Number:
    """Of the weights of a gated perceptron, those that a token reads.

    Args:
      active: share of the neurons that count, one minus the sparsity.
    """
    if not 0 <= active <= 1:
        raise UsageError(f"active={active} is a share of the neurons, from 0 to 1.")
    return 1 / 3 + 2 / 3 * active


@dataclasses.dataclass(frozen=True)
class DecodeMacs:
    """Multiply-accumulates of one token, all layers together."""

    projections: Number
    """Queries, keys, values and what leads out of attention."""
    attention: Number
    """Queries with keys, weights with values."""
    ffn: Number
    head: Number
    """The logits."""

    @property
    def layers(self) -> Number:
        """Without the head, which no sparsity here touches."""
        return self.projections + self.attention + self.ffn

    @property
    def total(self) -> Number:
        """With it."""
        return self.layers + self.head


def decode_macs(model: LM, seen: int, active: Number = 1.0) -> DecodeMacs:
    """Counts one decoding step that reads only what is active.

    Args:
      model: with attention or Spark attention, and gated, CATS or Spark perceptrons.
      seen: tokens that attention looks at, itself included; fewer in layers with a window.
      active: share of CATS' neurons that count.

    Raises:
      UsageError: for other parts.
    """
    mixer, ffn, dim = model.block.mixer, model.block.ffn, model.dim
    if not isinstance(mixer, Attention | SparkAttention) or not isinstance(ffn, Gated | CATS | SparkFFN):
        raise UsageError(f"no closed form for {type(mixer).__name__} with {type(ffn).__name__}.")
    groups, size = mixer.sizes(dim)
    windows = [layer.window for layer in model.layers] or [mixer.window]
    seen_by = [min(seen, windows[i % len(windows)] or seen) for i in range(model.depth)]
    if isinstance(mixer, SparkAttention):
        r, most = mixer.predictor, mixer.active
        attention = sum(mixer.heads * (r * n + (2 * size - r) * min(most, n)) for n in seen_by)
    else:
        attention = sum(2 * mixer.heads * size * n for n in seen_by)
    return DecodeMacs(
        projections=model.depth * 2 * dim * size * (mixer.heads + groups),
        attention=attention,
        ffn=model.depth * _ffn_macs(ffn, dim, active),
        head=model.vocab * dim,
    )


def _ffn_macs(ffn: Gated | CATS | SparkFFN, dim: int, active: Number) -> Number:
    if isinstance(ffn, SparkFFN):
        return ffn.predictor * ffn.hidden + (2 * dim - ffn.predictor) * ffn.active
    return 3 * dim * ffn.hidden * (read_share(active) if isinstance(ffn, CATS) else 1)
