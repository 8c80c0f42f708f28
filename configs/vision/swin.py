"""Swin Transformer (Liu et al. 2021, arXiv:2103.14030): attention in shifted windows, in a pyramid.

    python -m experiments.train --config=configs/vision/swin.py:VARIANT --workdir=runs/swin

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.24M parameters, 80 epochs of 1,437 digits of 8 x 8 pixels in windows of 4 x 4: under three minutes on 2
    CPU cores, and an accuracy of 98.1% on the 360 held-out digits.
`tiny`, `small`, `base`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the paper reports 81.3%, 83.0% and 83.5% top-1.
`base-22k`, `large-22k`
    Pre-training on ImageNet-22k at 224 pixels for 90 epochs.
`base-384`, `large`, `large-384`
    Fine-tuning for 30 epochs, in windows of 12 at 384 pixels, of what `--config.train.start` names. Not run
    here; after 22k the paper reports 86.4% for base-384, 86.3% for large and 87.3% for large-384.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels of the first stage, blocks a stage, stochastic depth; heads have 32 channels everywhere.
SIZES = {
    "tiny": (96, (2, 2, 6, 2), 0.2),
    "small": (96, (2, 2, 18, 2), 0.3),
    "base": (128, (2, 2, 18, 2), 0.5),
    "large": (192, (2, 2, 18, 2), 0.2),
}
VARIANTS = ("smoke", "digits", *SIZES, "base-384", "large-384", "base-22k", "large-22k")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        toy: dict[str, Any] = dict(window=4, patch=1, classes=10, head_dim=8, drop_path=0.0, unroll=2)
        return digits(swin(16, (2, 2), **toy) if smoke else swin(32, (2, 4), **toy), smoke=smoke)
    size, _, what = variant.partition("-")
    width, depths, drop_path = SIZES[size]
    if what == "22k":
        model = swin(width, depths, window=7, classes=21_841, drop_path=0.2)
        return imagenet(
            model, dataset="22k", epochs=90, batch_size=4096, weight_decay=0.01, clip=5.0, ema=None
        )
    if what == "384" or size == "large":
        model = swin(width, depths, window=12 if what else 7, classes=1000, drop_path=0.2)
        pixels = 384 if what else 224
        return imagenet(
            model, size=pixels, epochs=30, lr=1e-5, weight_decay=1e-8, warmup="0%", clip=5.0, ema=None
        )
    model = swin(width, depths, window=7, classes=1000, drop_path=drop_path)
    return imagenet(model, warmup="20 epochs", clip=5.0, ema=None)


def swin(
    width: int,
    depths: tuple[int, ...],
    *,
    window: int,
    classes: int,
    drop_path: float,
    patch: int = 4,
    head_dim: int = 32,
    **more: object,
) -> dict:
    """The model section of a Swin Transformer."""
    dims = tuple(width * 2**i for i in range(len(depths)))

    def block(dim: int, shifted: bool) -> dict:
        mixer = dict(kind="shifted_window", heads=dim // head_dim, window=window, shifted=shifted)
        return dict(kind="metaformer", mixer=mixer, ffn=dict(kind="mlp"), epsilon=1e-5)

    return dict(
        kind="pyramid",
        stem=dict(kind="patches", patch=patch, epsilon=1e-5, edge="pad"),
        stages=tuple(
            stage
            | dict(blocks=(block(stage["dim"], False), block(stage["dim"], True)))
            | (dict(downsample=dict(kind="merge")) if i else {})
            for i, stage in enumerate(stages(depths, dims))
        ),
        classes=classes,
        head=dict(kind="linear", epsilon=1e-5),
        drop_path=drop_path,
        **more,
    )
