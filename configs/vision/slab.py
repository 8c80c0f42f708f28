"""SLAB (Guo et al. 2024, arXiv:2405.11582): norms that fold away after training, and linear attention.

    python -m experiments.train --config=configs/vision/slab.py:VARIANT --workdir=runs/slab

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels, the layer norms gone after half of them:
    99.4% of the 360 held-out digits.
`deit-tiny`, `deit-small`, `swin-tiny`, `swin-small`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the authors report 74.3%, 80.0%, 81.8% and 83.6%.
`prepbn-deit-tiny`, `prepbn-deit-small`, `prepbn-swin-tiny`
    The norms alone, with softmax attention. Not run here; the authors report 73.6%, 80.2% and 81.4%.

`effjax.compress.slab.fold_norms` folds the norms of what was trained.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet
from configs.vision.swin import swin
from configs.vision.vit import vit

# Width and heads; blocks a stage and stochastic depth. Passes until the layer norm is gone.
DEIT = {"tiny": (192, 3), "small": (384, 6)}
SWIN = {"tiny": ((2, 2, 6, 2), 0.2), "small": ((2, 2, 18, 2), 0.3)}
STEPS, STEPS_OF_NORMS_ALONE = 60_000, 300_000
VARIANTS = (
    *("smoke", "digits", "deit-tiny", "deit-small", "swin-tiny", "swin-small"),
    *("prepbn-deit-tiny", "prepbn-deit-small", "prepbn-swin-tiny"),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        dim, depth, heads, steps = (16, 2, 2, 10) if smoke else (64, 4, 4, 900)
        model = slab_deit(dim, depth, heads, patch=2, classes=10, steps=steps, unroll=depth)
        return digits(model, smoke=smoke)
    linear = not variant.startswith("prepbn-")
    family, _, name = variant.removeprefix("prepbn-").partition("-")
    steps = STEPS if linear else STEPS_OF_NORMS_ALONE
    if family == "deit":
        dim, heads = DEIT[name]
        model = slab_deit(dim, 12, heads, patch=16, classes=1000, steps=steps, linear=linear)
    else:
        depths, drop_path = SWIN[name]
        model = slab_swin(
            96, depths, steps=steps, linear=2 if linear else 0, drop_path=drop_path if linear else 0.1
        )
    return imagenet(model, lr=1e-3, warmup="20 epochs", clip=5.0, ema=None)


def slab_deit(
    dim: int,
    depth: int,
    heads: int,
    patch: int,
    classes: int,
    steps: int,
    linear: bool = True,
    **more: object,
) -> dict:
    """The model section of SLAB-DeiT: patches alone and their mean; with softmax attention, a class token."""
    model = vit(dim, depth, heads, patch, classes, pool="mean" if linear else "token", **more)
    model["block"]["norm"] = progressive(steps)
    if linear:
        model["block"]["mixer"] = dict(kind="simplified_linear", heads=heads)
    return model


def slab_swin(
    width: int,
    depths: tuple[int, ...],
    *,
    steps: int,
    linear: int,
    drop_path: float,
    classes: int = 1000,
    window: int = 7,
    patch: int = 4,
    head_dim: int = 32,
    **more: object,
) -> dict:
    """The model section of SLAB-Swin: linear attention over the whole map in the first `linear` stages."""
    options = dict(window=window, classes=classes, drop_path=drop_path, patch=patch, head_dim=head_dim)
    model = swin(width, depths, **options, **more)  # type: ignore[arg-type]
    model["stem"]["norm"] = model["head"]["norm"] = progressive(steps)
    for i, stage in enumerate(model["stages"]):
        for block in stage["blocks"]:
            block["norm"] = progressive(steps)
        if i < linear:
            block = stage["blocks"][0]
            mixer = dict(kind="simplified_linear", heads=block["mixer"]["heads"])
            stage["blocks"] = (block | dict(mixer=mixer),)
        if "downsample" in stage:
            stage["downsample"]["norm"] = progressive(steps)
    return model


def progressive(steps: int) -> dict:
    """PRepBN whose layer norm is gone after so many passes."""
    return dict(kind="progressive", steps=steps)
