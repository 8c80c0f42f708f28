"""Shapes that depthwise convolutions are measured and compiled at, with the configs they come from."""

import jax

from pallas_kernels.shape import Shape, array


def _shape(
    name: str, config: str, batch: int, side: int, channels: int, kernel: int, trained: bool = True
) -> Shape:
    def arrays(batch: int, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (
            array((batch, side, side, channels)),
            array((kernel, kernel, channels)),
            array((channels,)),
        )

    # A program has some channels of one map, or of eight where rows are narrow.
    maps = 8 if side % 8 and batch % 8 == 0 else 1
    lanes = min(channels, 128)
    parts = batch // maps * (channels // lanes)
    return Shape(
        name,
        config,
        arrays(batch, channels),
        {},
        lambda count: arrays(maps * count, lanes),
        parts,
        trained,
    )


SHAPES = (
    # The kernels of LSNet's and of UniRepLKNet's third stage, and of ConvNeXt's first, at 224 pixels.
    _shape("lsnet_3", "configs/vision/lsnet.py:tiny", 16, 14, 256, 3),
    _shape("convnext_7", "configs/vision/convnext.py:tiny", 16, 56, 96, 7),
    _shape("unireplknet_13", "configs/vision/unireplknet.py:small", 16, 14, 384, 13),
    # RepLKNet's largest kernel, on a third stage at 384 pixels. XLA compiles its gradients for many minutes.
    _shape("replknet_31", "configs/vision/unireplknet.py:base", 16, 24, 512, 31, trained=False),
)
