"""Vision Mamba (Zhu et al. 2024, arXiv:2401.09417): state spaces in both directions, no attention.

    python -m experiments.train --config=configs/vision/vim.py:VARIANT --workdir=runs/vim

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels: under three minutes on 2 CPU cores, and an accuracy of 99.2%
    on the 360 held-out digits.
`digits-long`
    Four blocks on 49 overlapping patches and a class token, to try pruning on: 98.3% after 40 epochs, 277
    seconds of CPU time.
`tiny`, `small`, `base`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the authors report 76.1%, 80.5% and
    81.9% top-1. For `base` they publish no training script: it has that of `small`.
`tiny-plus`, `small-plus`
    30 epochs more of what `--config.train.start` names, on patches that overlap by half: 730 tokens instead
    of 197. Not run here; the authors report 78.3% and 81.6%.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

# Width, stochastic depth and weight decay of the published sizes; all have 24 blocks.
SIZES = {"tiny": (192, 0.0, 0.1), "small": (384, 0.05, 0.05), "base": (768, 0.05, 0.05)}
VARIANTS = ("smoke", "digits", "digits-long", *SIZES, "tiny-plus", "small-plus")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant == "digits-long":
        return digits(
            vim(48, 4, patch=2, stride=1, classes=10, state=4, unroll=4), smoke=False, steps="40 epochs"
        )
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        dim, depth = (16, 2) if smoke else (48, 3)
        return digits(vim(dim, depth, patch=2, classes=10, state=4, unroll=depth), smoke=smoke)
    name, _, longer = variant.partition("-")
    dim, drop_path, weight_decay = SIZES[name]
    if longer:
        model = vim(dim, 24, patch=16, stride=8, classes=1000)
        config = imagenet(model, epochs=30, lr=1e-5, weight_decay=1e-8)
        config.optimizer.schedule = dict(kind="constant")
    else:
        model = vim(dim, 24, patch=16, classes=1000, drop_path=drop_path)
        batch_size = 1024 if name == "tiny" else 512
        config = imagenet(model, batch_size=batch_size, weight_decay=weight_decay)
    config.train.precision.compute = "float32"
    return config


def vim(dim: int, depth: int, patch: int, classes: int, state: int = 16, **more: object) -> dict:
    """The model section of a Vision Mamba."""
    block = dict(mixer=dict(kind="vision_mamba", state=state), ffn=None, norm="rms", epsilon=1e-5)
    return dict(
        kind="vit",
        patch=patch,
        dim=dim,
        depth=depth,
        classes=classes,
        block=block,
        class_place="middle",
        **more,
    )
