"""LSNet (Wang et al. 2025, arXiv:2503.23135): see with a large kernel, aggregate with a small one.

    python -m experiments.train --config=configs/vision/lsnet.py:VARIANT --workdir=runs/lsnet

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.26M parameters, 40 epochs of 1,437 digits of 8 x 8 pixels: 99.4% of the 360 held-out digits.
`tiny`, `small`, `base`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the paper reports 74.9%, 77.8% and 80.3% top-1,
    and 76.1%, 79.0% and 81.6% where a RegNetY-16GF teaches the second head that
    `--config.model.head.distillation=True` adds.
`VARIANT-merged`
    The form for use, into which `effjax.compress.merge` turns what was trained.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels and blocks of each stage, weight decay.
SIZES = {
    "tiny": ((64, 128, 256, 384), (0, 2, 8, 10), 0.025),
    "small": ((96, 192, 320, 448), (1, 2, 8, 10), 0.025),
    "base": ((128, 256, 384, 512), (4, 6, 8, 10), 0.05),
}
VARIANTS = ("smoke", "digits", *SIZES, *(f"{size}-merged" for size in SIZES))


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    variant, merged, _ = variant.partition("-merged")
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        toy_dims, toy_depths = ((16, 32), (1, 2)) if smoke else ((48, 96), (2, 4))
        model = lsnet(toy_dims, toy_depths, classes=10, small_pictures=True, merged=bool(merged))
        return digits(model, smoke=smoke, steps="40 epochs")
    dims, depths, weight_decay = SIZES[variant]
    model = lsnet(dims, depths, classes=1000, merged=bool(merged))
    # The published code clips each layer's gradient at 0.02 of its weights' norm; here the global norm is.
    return imagenet(model, batch_size=2048, lr=4e-3, weight_decay=weight_decay, clip=1.0, ema=0.99996)


def lsnet(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    *,
    classes: int,
    side: int = 4,
    small_pictures: bool = False,
    merged: bool = False,
) -> dict:
    """The model section of an LSNet whose last map has up to `side` x `side` places."""
    form = dict(merged=merged)
    inner = () if small_pictures else (dims[0] // 4, dims[0] // 2)
    stem = (
        *(dict(features=features, stride=2, activation="relu", **form) for features in inner),
        dict(stride=1 if small_pictures else 2, **form),
    )
    halve = dict(depthwise=True, stride=2, **form), dict(kernel=1, **form)
    ffn = dict(kind="normed_mlp", **form)
    fixed = dict(kind="reparam_depthwise", kernel=3, branches=((1, 1),), identity=True, **form)
    dynamic = dict(kind="large_small", **form)
    attention = dict(kind="conv_query", heads=4, side=side, **form)

    def blocks(last: bool) -> tuple[dict, ...]:
        return (
            dict(kind="lean", mixer=fixed, ffn=ffn, residual=False, squeeze=0.25),
            dict(kind="lean", mixer=attention if last else dynamic, ffn=ffn),
        )

    return dict(
        kind="pyramid",
        stem=dict(kind="convs", layers=stem),
        stages=tuple(
            stage
            | dict(blocks=blocks(last=i == len(dims) - 1))
            | (dict(downsample=dict(kind="convs", layers=halve)) if i else {})
            for i, stage in enumerate(stages(depths, dims))
        ),
        classes=classes,
        head=dict(kind="linear", norm=None if merged else "batch", place="after_pool", epsilon=1e-5),
    )
