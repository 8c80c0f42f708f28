"""ConvNeXt (Liu et al. 2022, arXiv:2201.03545): a convolutional pyramid with the proportions of Swin.

    python -m experiments.train --config=configs/vision/convnext.py:VARIANT --workdir=runs/convnext

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.38M parameters, 30 epochs of 1,437 digits of 8 x 8 pixels: 98.6% of the 360 held-out digits.
`tiny`, `small`, `base`, `large`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the paper reports 82.1%, 83.1%, 83.8% and 84.3%.
`tiny-22k`, `small-22k`, `base-22k`, `large-22k`, `xlarge-22k`
    Pre-training on ImageNet-22k at 224 pixels for 90 epochs.
`xlarge`, and `tiny-384`, `small-384`, `base-384`, `large-384`, `xlarge-384`
    Fine-tuning for 30 epochs of what `--config.train.start` names, without the learning rates that fall from
    layer to layer in the paper. Not run here; after 22k the authors report 87.0% for xlarge, and 84.1%,
    85.8%, 86.8%, 87.5% and 87.8% at 384 pixels.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels of the first stage, and blocks a stage.
SIZES = {
    "tiny": (96, (3, 3, 9, 3)),
    "small": (96, (3, 3, 27, 3)),
    "base": (128, (3, 3, 27, 3)),
    "large": (192, (3, 3, 27, 3)),
    "xlarge": (256, (3, 3, 27, 3)),
}
# Stochastic depth on ImageNet-1k, in pre-training on ImageNet-22k, and in fine-tuning after that.
DROP_PATH = {"tiny": 0.1, "small": 0.4, "base": 0.5, "large": 0.5}
DROP_PATH_22K = {"tiny": 0.0, "small": 0.0, "base": 0.1, "large": 0.1, "xlarge": 0.2}
DROP_PATH_TUNED = {"tiny": 0.1, "small": 0.1, "base": 0.2, "large": 0.3, "xlarge": 0.4}
VARIANTS = ("smoke", "digits", *SIZES, *(f"{size}-384" for size in SIZES), *(f"{size}-22k" for size in SIZES))


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant == "smoke":
        return digits(convnext(16, (1, 2), classes=10, patch=1), smoke=True)
    if variant == "digits":
        return digits(convnext(48, (2, 4), classes=10, patch=1, unroll=2), smoke=False, steps="30 epochs")
    size, _, what = variant.partition("-")
    width, depths = SIZES[size]
    if what == "22k":
        model = convnext(width, depths, classes=21_841, drop_path=DROP_PATH_22K[size])
        return imagenet(model, dataset="22k", epochs=90, batch_size=4096, lr=4e-3, ema=None)
    if what == "384" or size not in DROP_PATH:
        model = convnext(width, depths, classes=1000, drop_path=DROP_PATH_TUNED[size])
        config = imagenet(
            model,
            size=384 if what else 224,
            epochs=30,
            batch_size=512,
            lr=5e-5,
            weight_decay=1e-8,
            warmup="0%",
            ema=0.9999 if size == "xlarge" else None,
        )
        config.task.mixing = None
        return config
    model = convnext(width, depths, classes=1000, drop_path=DROP_PATH[size])
    return imagenet(model, batch_size=4096, lr=4e-3, warmup="20 epochs", ema=0.9999)


def convnext(
    width: int,
    depths: tuple[int, ...],
    *,
    classes: int,
    drop_path: float = 0.0,
    patch: int = 4,
    kernel: int = 7,
    **more: object,
) -> dict:
    """The model section of a ConvNeXt."""
    dims = tuple(width * 2**i for i in range(len(depths)))
    block = dict(
        kind="metaformer",
        order="one_branch",
        mixer=dict(kind="depthwise", kernel=kernel),
        ffn=dict(kind="mlp"),
        layer_scale=1e-6,
    )
    halve = dict(kind="patches", patch=2, norm_first=True, edge="crop")
    return dict(
        kind="pyramid",
        stem=dict(kind="patches", patch=patch, edge="crop"),
        stages=tuple(
            stage | dict(blocks=(block,)) | (dict(downsample=halve) if i else {})
            for i, stage in enumerate(stages(depths, dims))
        ),
        classes=classes,
        head=dict(kind="linear", place="after_pool"),
        drop_path=drop_path,
        **more,
    )
