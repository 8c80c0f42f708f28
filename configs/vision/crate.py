"""CRATE (Yu et al. 2023, arXiv:2306.01129): a transformer whose layers each take a step to a stated goal.

    python -m experiments.train --config=configs/vision/crate.py:VARIANT --workdir=runs/crate

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels: two minutes on 2 CPU cores, and an accuracy of
    98.6% on the 360 held-out digits.
`tiny`, `small`, `base`, `large`
    ImageNet-1k at 224 pixels for 150 epochs with Lion. Not run here; the paper reports 66.7%, 69.2%, 70.8%
    and 71.3% top-1.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

VARIANTS = ("smoke", "digits", "tiny", "small", "base", "large")

# Width, depth and subspaces of the published sizes.
SIZES = {
    "tiny": (384, 12, 6),
    "small": (576, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        dim, depth, heads = (16, 2, 2) if smoke else (96, 4, 6)
        # A norm over the four pixels of a patch would leave nothing of how bright they are.
        model = crate(dim, depth, heads, patch=2, classes=10, pixel_norm=smoke, pool="mean", unroll=depth)
        return digits(model, smoke=smoke)
    config = imagenet(
        crate(*SIZES[variant], patch=16, classes=1000),
        epochs=150,
        batch_size=2048,
        lr=2.4e-4,
        weight_decay=0.5,
        ema=None,
    )
    config.optimizer.kind = "lion"
    # Crops and mirror images alone, and smoothed labels.
    config.task.mixing = None
    config.data.transforms = (
        dict(kind="random_resized_crop", size=224),
        dict(kind="random_flip"),
        dict(kind="normalize"),
    )
    return config


def crate(
    dim: int, depth: int, heads: int, patch: int, classes: int, pixel_norm: bool = True, **more: object
) -> dict:
    """The model section of a CRATE."""
    block = dict(
        mixer=dict(kind="subspace_attention", heads=heads),
        ffn=dict(kind="ista"),
        order="unrolled",
        epsilon=1e-5,
    )
    return dict(
        kind="vit",
        patch=patch,
        dim=dim,
        depth=depth,
        classes=classes,
        block=block,
        pixel_norm=pixel_norm,
        patch_norm=True,
        **more,
    )
