"""What a LEGO costs, from its shape alone: parameters, and multiply-accumulates of a call and of all calls.

    macs(t) = F C + C C + sum of the bricks that run at t of
              2 C C + N (p p I + p p O) C + L (N B + 6 C C) + 2 L N n C

N tokens of a picture, n of a square; I and O channels in and out, F frequencies, C channels of a token; L
blocks whose matrices B every token meets. A picture's squares share the modulation: 6 C C of a block, and
2 C C behind the last. The time and the blocks are those of `effjax.measure.analytic.inference`.
"""

import dataclasses
from collections.abc import Iterable

from effjax.measure.analytic.inference import Transformer, blocks_of
from effjax.models.lego import Brick, Lego

# What a brick sees of a picture besides its channels.
COORDINATES = 2


def parameters(model: Lego, channels: int = 4) -> int:
    """Number of parameters, for pictures of `channels` channels."""
    dim = model.dim
    time = model.frequencies * dim + dim + dim * dim + dim
    labels = (model.classes + model.null_class) * dim
    bricks = (_network(model, number, channels).parameters for number in range(len(model.bricks)))
    return time + labels + sum(bricks)


def macs(model: Lego, height: int, width: int, channels: int = 4, t: float = 0.0) -> int:
    """Multiply-accumulates of one call at a time, for one picture.

    Raises:
      UsageError: where squares do not tile the picture.
    """
    running = (number for number, brick in enumerate(model.bricks) if brick.at(t))
    condition = model.frequencies * model.dim + model.dim**2
    return condition + sum(_brick_macs(model, number, height, width, channels) for number in running)


def sampling_macs(
    model: Lego, times: Iterable[float], height: int, width: int, channels: int = 4, guided: bool = False
) -> int:
    """Multiply-accumulates of all calls of a sampling run, for one picture.

    Args:
      model: whose bricks say when they run.
      times: what the network is told at each call: `process.network_time` of the sampler's plan.
      height: rows of a picture.
      width: columns.
      channels: of the picture.
      guided: whether every call sees the picture twice.
    """
    return (1 + guided) * sum(macs(model, height, width, channels, t) for t in times)


def _brick_macs(model: Lego, number: int, height: int, width: int, channels: int) -> int:
    brick, network = model.bricks[number], _network(model, number, channels)
    squares, tokens = brick.squares(height, width), (brick.size // brick.patch) ** 2
    return network.matrix_macs(squares * tokens) + squares * network.attention_macs(tokens, tokens)


def _network(model: Lego, number: int, channels: int) -> Transformer:
    """One brick, without the condition."""
    brick: Brick = model.bricks[number]
    dim, block = model.dim, model.block
    seen = channels + COORDINATES + (channels if number else 0)
    stack = blocks_of(block, dim, brick.depth, (6 + 2 * block.ffn_affine) * dim)
    return dataclasses.replace(
        stack,
        conditioning=6 * dim * dim,
        token_matrices=brick.patch**2 * (seen + channels) * dim,
        sample_matrices=2 * dim * dim,
        tables=3 * dim + brick.patch**2 * channels,  # patch bias, two vectors of modulation, output bias
    )
