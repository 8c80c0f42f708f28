"""MATE: in place of attention in a video, a state space over all of it beside attention in small windows.

    r = tokens averaged over blocks of the video, the review tokens
    MA = in_place(mamba2([in_line(r), in_line(x)]))          the order of tokens rotates with the layer
    TE = attention in windows of a few frames and places     shifted in every other layer
    y = MA + TE

The state space carries what is far apart; two neighbours that the order of the layer tears apart meet in a
window. An overview stands before the sequence, so that its first tokens know of its last. All cost is linear
in the number of tokens.

Source: Wang et al., "LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear
Computational Complexity", CVPR 2025, figures 2 to 5. What was read of the paper are its abstract, captions
and tables: the size of windows, the blocks that are averaged, the sum of the branches and the overview of the
backward scan are choices made here. Blocks of 2 x 2 x 2 are an eighth more tokens, about what review tokens
cost by its table 2: 4 of the 37 seconds of the MA-branch.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.config import part
from effjax.layers.axes import constrain
from effjax.mixers.bidirectional_mamba2 import BidirectionalMamba2
from effjax.mixers.context import Context
from effjax.mixers.scan_orders import ORDERS, in_line, in_place
from effjax.mixers.shifted_volume import ShiftedVolume

# Layers after which order of tokens and windows are the same again.
PERIOD = len(ORDERS)


class Mate(nn.Module):
    """The MA-branch and the TE-branch on one video; `Context.turn` says which layer of a period this is.

    Attributes:
      local: the TE-branch; it is called with `shifted`.
      scan: the MA-branch; it is called with the `overview`.
      review: frames, rows and columns whose mean is a review token; None reviews nothing.
    """

    local: nn.Module = part({"shifted_volume": ShiftedVolume})
    scan: nn.Module = part({"bidirectional_mamba2": BidirectionalMamba2}, default=BidirectionalMamba2)
    review: tuple[int, int, int] | None = (2, 2, 2)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b f h w c"], context: Context, train: bool = False
    ) -> Float[Array, "b f h w c"]:
        """Mixes the tokens of whole videos."""
        turn, grid = context.turn or 0, (x.shape[1], x.shape[2], x.shape[3])
        order = ORDERS[turn % PERIOD]
        overview = None if self.review is None else in_line(averaged(x, self.review), order)  # [B, M, C]
        far = self.scan(in_line(x, order), Context(), train=train, overview=overview)  # [B, F H W, C]
        near = self.local(x, Context(), train=train, shifted=turn % 2 == 1)  # [B, F, H, W, C]
        return constrain(in_place(far, grid, order) + near)


def averaged(x: Float[Array, "b f h w c"], block: tuple[int, int, int]) -> Float[Array, "b f2 h2 w2 c"]:
    """Means over blocks; those at the far ends are of what is there."""
    ends = [(0, -n % m) for n, m in zip(x.shape[1:4], block, strict=True)]
    return nn.avg_pool(x, block, strides=block, padding=ends, count_include_pad=False)
