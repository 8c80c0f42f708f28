"""CSWin Transformer (Dong et al. 2022, arXiv:2107.00652): attention in cross-shaped windows, in a pyramid.

    python -m experiments.train --config=configs/vision/cswin.py:VARIANT --workdir=runs/cswin

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.25M parameters, 80 epochs of 1,437 digits of 8 x 8 pixels in stripes of 2: under four minutes on 2 CPU
    cores, and an accuracy of 99.4% on the 360 held-out digits.
`tiny`, `small`, `base`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the authors report 82.7%, 83.6% and 84.2% top-1.
`base-22k`, `large-22k`
    Pre-training on ImageNet-22k at 224 pixels. The authors do not publish its settings: these are Swin's.
`base-384`, `large`, `large-384`
    Fine-tuning of what `--config.train.start` names; the authors report 85.4% for base-384, and after 22k
    86.5% for large and 87.5% for large-384.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels of the first stage, blocks and heads a stage, stochastic depth.
SIZES = {
    "tiny": (64, (1, 2, 21, 1), (2, 4, 8, 16), 0.2),
    "small": (64, (2, 4, 32, 2), (2, 4, 8, 16), 0.4),
    "base": (96, (2, 4, 32, 2), (4, 8, 16, 32), 0.5),
    "large": (144, (2, 4, 32, 2), (6, 12, 24, 24), 0.2),
}
VARIANTS = ("smoke", "digits", *SIZES, "base-384", "large-384", "base-22k", "large-22k")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        stem = dict(kernel=3, stride=1, use_bias=True, norm="layer")
        toy: dict[str, Any] = dict(stripes=(2, None), classes=10, drop_path=0.0, stem=stem, unroll=2)
        model = cswin(16, (1, 1), (2, 4), **toy) if smoke else cswin(32, (2, 4), (4, 8), **toy)
        return digits(model, smoke=smoke)
    size, _, what = variant.partition("-")
    width, depths, heads, drop_path = SIZES[size]
    wide = 12 if what == "384" else 7
    model = cswin(
        width,
        depths,
        heads,
        stripes=(1, 2, wide, None),
        classes=21_841 if what == "22k" else 1000,
        drop_path=0.7 if variant == "base-384" else 0.2 if what == "22k" else drop_path,
    )
    if what == "22k":
        return imagenet(model, dataset="22k", epochs=90, batch_size=4096, clip=5.0, ema=None)
    if variant == "base-384":
        return imagenet(
            model, size=384, epochs=20, batch_size=256, lr=5e-6, weight_decay=1e-8, warmup="0%", ema=0.9998
        )
    if size == "large":
        finer: dict[str, Any] = dict(epochs=30, batch_size=512, lr=2.5e-4, weight_decay=1e-8, ema=0.9996)
        return imagenet(model, size=384 if what else 224, warmup="0%", **finer)
    if size == "base":
        return imagenet(model, lr=1e-3, weight_decay=0.1, warmup="20 epochs", ema=0.99992)
    return imagenet(model, batch_size=2048, lr=2e-3, warmup="20 epochs", ema=0.99984)


STEM = dict(kernel=7, stride=4, padding=2, use_bias=True, norm="layer")
MERGE = dict(kernel=3, stride=2, use_bias=True, norm="layer")


def cswin(
    width: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    *,
    stripes: tuple[int | None, ...],
    classes: int,
    drop_path: float,
    stem: dict = STEM,
    **more: object,
) -> dict:
    """The model section of a CSWin Transformer."""
    dims = tuple(width * 2**i for i in range(len(depths)))

    def block(heads: int, stripe: int | None) -> dict:
        mixer = dict(kind="cross_shaped_window", heads=heads, stripe=stripe)
        return dict(kind="metaformer", mixer=mixer, ffn=dict(kind="mlp"), epsilon=1e-5)

    return dict(
        kind="pyramid",
        stem=dict(kind="convs", layers=(stem,)),
        stages=tuple(
            dict(depth=row["depth"], dim=row["dim"], blocks=(block(row["heads"], row["stripe"]),))
            | (dict(downsample=dict(kind="convs", layers=(MERGE,))) if i else {})
            for i, row in enumerate(stages(depths, dims, heads=heads, stripe=stripes))
        ),
        classes=classes,
        head=dict(kind="linear", epsilon=1e-5),
        drop_path=drop_path,
        **more,
    )
