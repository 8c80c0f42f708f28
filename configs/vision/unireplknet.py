"""UniRepLKNet (Ding et al. 2024, arXiv:2311.15599): large kernels, trained as branches and used as one.

    python -m experiments.train --config=configs/vision/unireplknet.py:VARIANT --workdir=runs/unireplknet

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.19M parameters, 25 epochs of 1,437 digits of 8 x 8 pixels with kernels of 7 x 7 and 3 x 3: 99.4% of
    the 360 held-out digits.
`atto`, `femto`, `pico`, `nano`, `tiny`, `small`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the paper reports 77.0%, 78.6%, 80.2%, 81.6%,
    83.2% and 83.9% top-1.
`small-22k`, `base-22k`, `large-22k`, `xlarge-22k`
    Pre-training on ImageNet-22k for 90 epochs, the two larger at 192 pixels.
`small-384`, `base-384`, `large-384`, `xlarge-384`
    Fine-tuning at 384 pixels of what `--config.train.start` names, without the learning rates that fall from
    layer to layer in the published command. Not run here; reported are 86.4%, 87.4%, 87.9% and 88.0%.
`VARIANT-merged`
    The form for use of any of them on ImageNet-1k, into which `effjax.compress.merge` turns what was trained;
    the published parameters and MACs are those of this form.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels of the first stage, and blocks a stage.
SIZES = {
    "atto": (40, (2, 2, 6, 2)),
    "femto": (48, (2, 2, 6, 2)),
    "pico": (64, (2, 2, 6, 2)),
    "nano": (80, (2, 2, 8, 2)),
    "tiny": (80, (3, 3, 18, 3)),
    "small": (96, (3, 3, 27, 3)),
    "base": (128, (3, 3, 27, 3)),
    "large": (192, (3, 3, 27, 3)),
    "xlarge": (256, (3, 3, 27, 3)),
}
# Kernels of the third stage, in turn; the first has 3 x 3, the second and the fourth 13 x 13.
TURNS = {6: (13,), 8: (13,), 18: (13, 3), 27: (13, 3, 3)}
# On ImageNet-1k: stochastic depth, mixup, CutMix.
RECIPES = {
    "atto": (0.0, 0.3, 0.3),
    "femto": (0.0, 0.3, 0.3),
    "pico": (0.1, 0.3, 0.3),
    "nano": (0.1, 0.5, 0.5),
    "tiny": (0.2, 0.8, 1.0),
    "small": (0.4, 0.8, 1.0),
}
# On ImageNet-22k: side of the pictures, stochastic depth, batch size, learning rate.
RECIPES_22K = {
    "small": (224, 0.1, 4096, 4e-3),
    "base": (224, 0.1, 4096, 4e-3),
    "large": (192, 0.1, 4096, 1e-3),
    "xlarge": (192, 0.2, 4096, 1e-3),
}
# After that: stochastic depth, epochs, smoothing, averaging.
RECIPES_TUNED = {
    "small": (0.2, 30, 0.1, None),
    "base": (0.2, 30, 0.1, None),
    "large": (0.3, 20, 0.3, 0.9999),
    "xlarge": (0.3, 20, 0.3, 0.9999),
}
TRAINED = (*RECIPES, *(f"{size}-384" for size in RECIPES_TUNED))
VARIANTS = (
    *("smoke", "digits"),
    *TRAINED,
    *(f"{size}-22k" for size in RECIPES_22K),
    *(f"{variant}-merged" for variant in TRAINED),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    variant, merged, _ = variant.partition("-merged")
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        toy_width, toy_depths = (16, (1, 2)) if smoke else (32, (1, 4))
        model = unireplknet(
            toy_width, toy_depths, ((3,), (7, 3)), classes=10, small_pictures=True, merged=bool(merged)
        )
        return digits(model, smoke=smoke, steps="25 epochs")
    size, _, what = variant.partition("-")
    width, depths = SIZES[size]
    kernels = (3,), (13,), TURNS[depths[2]], (13,)
    if what == "22k":
        side, drop_path, batch_size, lr = RECIPES_22K[size]
        model = unireplknet(width, depths, kernels, classes=21_841, drop_path=drop_path, merged=bool(merged))
        return imagenet(model, size=side, epochs=90, batch_size=batch_size, lr=lr, ema=None, dataset="22k")
    if what == "384":
        drop_path, epochs, smoothing, ema = RECIPES_TUNED[size]
        model = unireplknet(width, depths, kernels, classes=1000, drop_path=drop_path, merged=bool(merged))
        config = imagenet(
            model, size=384, epochs=epochs, batch_size=512, lr=5e-5, weight_decay=1e-8, warmup="0%", ema=ema
        )
        config.task.mixing = None
        config.task.smoothing = smoothing
        return config
    drop_path, mixup, cutmix = RECIPES[size]
    model = unireplknet(width, depths, kernels, classes=1000, drop_path=drop_path, merged=bool(merged))
    config = imagenet(model, batch_size=4096, lr=4e-3, warmup="20 epochs", ema=None)
    config.task.mixing.mixup, config.task.mixing.cutmix = mixup, cutmix
    return config


def unireplknet(
    width: int,
    depths: tuple[int, ...],
    kernels: tuple[tuple[int, ...], ...],
    *,
    classes: int,
    drop_path: float = 0.0,
    small_pictures: bool = False,
    merged: bool = False,
) -> dict:
    """The model section of a UniRepLKNet; `small_pictures` come in at their full size."""
    dims = tuple(width * 2**i for i in range(len(depths)))
    halve = dict(kernel=3, stride=2, use_bias=True, norm="layer", epsilon=1e-6)
    begin = halve | dict(stride=1 if small_pictures else 2)

    def block(kernel: int) -> dict:
        # Beside a small kernel there are no branches.
        mixer = dict(kernel=kernel, merged=merged, **({} if kernel > 5 else dict(branches=())))
        return dict(kind="large_kernel", mixer=mixer, merged=merged)

    return dict(
        kind="pyramid",
        stem=dict(kind="convs", layers=(begin | dict(features=width // 2, activation="gelu"), begin)),
        stages=tuple(
            stage
            | dict(blocks=tuple(map(block, turn)))
            | (dict(downsample=dict(kind="convs", layers=(halve,))) if i else {})
            for i, (stage, turn) in enumerate(zip(stages(depths, dims), kernels, strict=True))
        ),
        classes=classes,
        head=dict(kind="linear", place="after_pool"),
        drop_path=drop_path,
    )
