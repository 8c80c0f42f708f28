"""Multiply-accumulates of reading a prompt, whole or through GemFilter.

    whole(N) = m ((N - 1) B + 2 H d (N - 1) S)                   B: a block's matrices
    filtered(N) = r (N B + 2 H d N^2) + C d (H + G N) + G d N + whole(k)

The last token of a prompt is left to decoding, and nobody reads the prompt's logits; S slots of the cache are
attended to, those of the tokens to come included. Of m layers r come before the one that chooses, which has
H query and G key heads of d channels for C of the model. For long prompts the ratio of the two is r / m.

Source: the algorithm of `effjax.decoding.gemfilter`; Shi et al. 2024, arXiv:2409.17422, section 3.4, compares
the orders.
"""

from effjax.decoding.gemfilter import GemFilter
from effjax.errors import UsageError
from effjax.measure.analytic.shape import DecoderShape


def prefill_macs(shape: DecoderShape, prompt: int, gems: GemFilter | None = None, new: int = 1) -> int:
    """Counts what stands before the first token that is written, for one prompt.

    Args:
      shape: of the model, `DecoderShape.of(model)`.
      prompt: tokens.
      gems: what chooses among them; None reads all.
      new: tokens that the cache has room for behind the prompt, of which the last needs none.

    Raises:
      UsageError: for no tokens, or a layer that the model does not have.
    """
    if prompt < 1 or new < 1:
        raise UsageError(f"prompt={prompt}, new={new}: both are at least 1 token.")
    inner = shape.heads * shape.head_dim
    if gems is None or gems.keep >= prompt:
        read, slots = prompt - 1, prompt + new - 1
        return shape.depth * (read * shape.block_matrices + 2 * inner * read * slots)
    if gems.layer >= shape.depth:
        raise UsageError(f"layer={gems.layer} of {shape.depth}: the last one is {shape.depth - 1}.")
    before = gems.layer * (prompt * shape.block_matrices + 2 * inner * prompt**2)
    keys = shape.kv_heads * shape.head_dim
    chosen = shape.dim * (inner + keys * prompt) + keys * prompt
    return before + chosen + prefill_macs(shape, gems.keep, new=new)
