"""Few tokens that look where they want: SparseFormers that start from ViTs, Gao et al. 2024.

    python -m experiments.train --config=configs/vision/sparseformer.py:VARIANT --workdir=runs/sparseformer

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    9 latent tokens on 8 x 8 pixels, learned from the labels alone.
`augreg-base`, `augreg-large`
    49 tokens in the place of the 197 or 577 of ViT-B/16 and ViT-L/16, on ImageNet at 224 pixels. In the
    paper the large one reaches 84.9% top-1 from AugReg weights at 384 pixels, whose class token it learns to
    make. Here they train from the labels with DeiT's recipe, and
    `effjax.models.sparseformer.bootstrapped` puts the weights of a ViT in. Not run here.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

VARIANTS = ("smoke", "digits", "augreg-base", "augreg-large")

# Width and depth of the cortex, and the width of the focusing part.
SIZES: dict[str, dict[str, Any]] = {
    "augreg-base": dict(dim=768, depth=8, heads=12, focus_dim=384),
    "augreg-large": dict(dim=1024, depth=16, heads=16, focus_dim=512),
}


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in SIZES:
        return imagenet(sparseformer(**SIZES[variant], classes=1000, drop_path=0.1))
    smoke = variant == "smoke"
    size: dict[str, Any] = dict(
        dim=32, depth=2, heads=2, focus_dim=32, tokens=4, features=16, points=4, turns=2, hidden=16
    )
    if not smoke:
        size = dict(
            dim=64, depth=3, heads=4, focus_dim=64, tokens=9, features=32, points=9, turns=2, hidden=32
        )
    model = sparseformer(**size, classes=10, early_stride=1, early_pool=False, unroll=size["depth"])
    return digits(model, smoke=smoke)


def sparseformer(dim: int, depth: int, heads: int, **more: object) -> dict:
    """The model section of a SparseFormer."""
    block = dict(mixer=dict(kind="attention", heads=heads), ffn=dict(kind="mlp"), epsilon=1e-5)
    return dict(kind="sparseformer", dim=dim, depth=depth, block=block, **more)
