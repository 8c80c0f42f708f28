"""Parameters and multiply-accumulates of one mixer on `n` tokens of `C` channels, from its fields alone.

    attention           4 C^2 + biases                                     4 n C^2 + 2 n^2 C
    in windows of M     4 C^2 + biases                                     4 n C^2 + 2 n M C
    Mamba-2             C (3 I + 2 G S + H) + what is no matrix            n of them + n (Q (G S + I) + 2 S I)

I = 2 C channels in H heads, G groups, S numbers of state a channel, and chunks of Q tokens, the last one
full. All but the first is linear in the number of tokens. A layer that looks both ways has its convolutions
and its scan twice; MATE is that, on an eighth more tokens, and windows. What is convolved is not counted,
being no product of matrices here, as in `effjax.measure.count`, which gives the same numbers.

Sources: the mixers' own files. `lingen` is the model of Wang et al. 2025 with any of them in its blocks.
"""

import dataclasses
import functools
import math
from typing import Any

from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.measure.analytic.shape import mixer_biases
from effjax.mixers import volumes
from effjax.mixers.attention import Attention
from effjax.mixers.bidirectional_mamba2 import BidirectionalMamba2
from effjax.mixers.duality import Duality
from effjax.mixers.mamba2 import Mamba2
from effjax.mixers.mate import Mate
from effjax.mixers.shifted_volume import ShiftedVolume
from effjax.models.lingen import LinGen

Grid = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What a mixer has, and does for one example."""

    parameters: int
    macs: int

    def __add__(self, other: "Mixing") -> "Mixing":
        return Mixing(self.parameters + other.parameters, self.macs + other.macs)


@functools.singledispatch
def mixing(mixer: Any, dim: int, grid: Grid) -> Mixing:
    """Evaluates the closed form.

    Args:
      mixer: a definition.
      dim: channels of a token.
      grid: how tokens are laid out: their number, or frames, rows and columns.

    Raises:
      UsageError: for a mixer without one.
    """
    raise UsageError(f"no closed form for {type(mixer).__name__}: count it with effjax.measure.count.")


@mixing.register
def _attention(mixer: Attention, dim: int, grid: Grid) -> Mixing:
    tokens, (kv_heads, size) = math.prod(grid), mixer.sizes(dim)
    matrices = 2 * dim * size * (mixer.heads + kv_heads)
    seen = 2 * tokens**2 * mixer.heads * size
    return Mixing(matrices + mixer_biases(mixer, dim), tokens * matrices + seen)


@mixing.register
def _windows(mixer: ShiftedVolume, dim: int, grid: Grid) -> Mixing:
    volume = grid[0], grid[1], grid[2]
    window = volumes.fitted(mixer.window, volume)
    tokens = math.prod(volumes.tiled(volume, window))  # padding is projected too
    matrices = 4 * dim**2
    macs = tokens * (matrices + 2 * math.prod(window) * dim)
    return Mixing(matrices + dim * (4 if mixer.qkv_bias else 1), macs)


@mixing.register
def _mamba2(mixer: Mamba2, dim: int, grid: Grid) -> Mixing:
    tokens = math.prod(grid)
    inner, heads, selected = mixer.sizes(dim, mixer.expand, mixer.inner)
    matrices = dim * (3 * inner + selected + heads)
    biases = 2 * inner + selected + heads + dim if mixer.use_bias else 0
    own = _direction(mixer, inner, heads, selected)
    macs = tokens * matrices + _scan(mixer, inner, tokens)
    return Mixing(matrices + biases + own + inner, macs)


@mixing.register
def _both_ways(mixer: BidirectionalMamba2, dim: int, grid: Grid, overview: int = 0) -> Mixing:
    tokens = math.prod(grid)
    way = Duality(mixer.state, mixer.head, mixer.groups, mixer.width, chunk=mixer.chunk)
    inner, heads, selected = way.sizes(dim, mixer.expand)
    read, given = dim * (inner + selected + heads), 2 * dim * inner  # those of the overview are not given out
    macs = (overview + tokens) * read + tokens * given + 2 * _scan(way, inner, overview + tokens)
    return Mixing(read + given + 2 * _direction(way, inner, heads, selected) + inner, macs)


@mixing.register
def _mate(mixer: Mate, dim: int, grid: Grid) -> Mixing:
    overview = 0
    if mixer.review is not None:
        overview = math.prod(-(-n // m) for n, m in zip(grid, mixer.review, strict=True))
    if not isinstance(mixer.scan, BidirectionalMamba2):
        return mixing(mixer.scan, dim, grid)
    return _both_ways(mixer.scan, dim, grid, overview) + mixing(mixer.local, dim, grid)


def _direction(way: Duality, inner: int, heads: int, selected: int) -> int:
    """Convolutions, rates, skips and biases of step sizes."""
    return (way.width + way.conv_bias) * (inner + selected) + 3 * heads


def _scan(way: Duality, inner: int, tokens: int) -> int:
    """Products of one direction's scan, over whole chunks; the state behind a single one is not used."""
    chunk = min(way.chunk, tokens)
    padded = -(-tokens // chunk) * chunk
    states = 1 if chunk == tokens else 2
    return padded * (chunk * (way.groups * way.state + inner) + states * way.state * inner)


def lingen(model: LinGen, video: tuple[int, int, int, int], text: tuple[int, int]) -> Mixing:
    """The whole network on one video.

    Args:
      model: its definition.
      video: frames, height, width and channels.
      text: words and their features.

    Raises:
      UsageError: for blocks without a closed form.
    """
    block, dim, (words, features) = model.block, model.dim, text
    if not isinstance(block.ffn, MLP) or not block.ffn.use_bias:
        raise UsageError(
            f"no closed form for {type(block.ffn).__name__}: count it with effjax.measure.count."
        )
    frames, height, width, channels = video
    grid = frames, height // model.patch, width // model.patch
    tokens, hidden = math.prod(grid), block.ffn.hidden or round(dim * block.ffn.ratio)
    pixels = model.patch**2 * channels
    out = pixels * (2 if model.learned_sigma else 1)
    reading = Mixing(4 * dim**2 + 4 * dim, 2 * (tokens + words) * dim**2 + 2 * tokens * words * dim)
    feeding = Mixing(2 * dim * hidden + hidden + dim, 2 * tokens * dim * hidden)
    steering = Mixing(6 * dim**2 + 6 * dim, 6 * dim**2)
    layer = mixing(block.mixer, dim, grid) + reading + feeding + steering
    embedded = Mixing((pixels + 1) * dim, tokens * pixels * dim)
    given = Mixing((dim + 1) * out, tokens * dim * out)
    timed = (model.frequencies + dim) * dim
    told = (features + dim) * dim
    outside = Mixing(timed + told + 2 * dim**2 + 6 * dim, timed + words * told + 2 * dim**2)
    each = Mixing(model.depth * layer.parameters, model.depth * layer.macs)
    return each + embedded + given + outside
