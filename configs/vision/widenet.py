"""WideNet (Xue et al. 2022): a ViT whose blocks share one attention and one mixture of experts.

    python -m experiments.train --config=configs/vision/widenet.py:VARIANT --workdir=runs/widenet

Every block has norms of its own. They alone make a token look different to the router from block to block,
and so it takes other experts:

    x <- x + attention(norm_l(x)),   x <- x + mixture(norm'_l(x)),   l = 1 .. depth

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    The ViT of `vit.py:digits`, with four experts of its FFN's size for all four blocks: 0.15M parameters
    in the place of 0.20M, 98.3% of the 360 held-out digits, where the ViT has 98.9%.
`b16`, `l16`, `h14`
    ViT's shapes on ImageNet at 224 pixels. Not run here.

Four experts, two chosen, a capacity of 1.2 and a balance of 0.01 are the paper's. So is noise in training;
how much of it is V-MoE's, and the recipe is that of `vit.py`, as the paper's was not at hand. In evaluation
no token is dropped, so that the answer to a picture does not depend on others.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet
from configs.vision.vit import vit

VARIANTS = ("smoke", "digits", "b16", "l16", "h14")

SIZES = {
    "b16": dict(dim=768, depth=12, heads=12, patch=16),
    "l16": dict(dim=1024, depth=24, heads=16, patch=16),
    "h14": dict(dim=1280, depth=32, heads=16, patch=14),
}


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in SIZES:
        return imagenet(widenet(**SIZES[variant], classes=1000))
    smoke = variant == "smoke"
    size = dict(dim=16, depth=2, heads=2) if smoke else dict(dim=64, depth=4, heads=4)
    return digits(widenet(**size, patch=2, classes=10, pool="mean", unroll=size["depth"]), smoke=smoke)


def widenet(dim: int, experts: int = 4, chosen: int = 2, **more: Any) -> dict:
    """The model section of a WideNet."""
    model = vit(dim=dim, shared=("(mixer|ffn)/.*",), **more)
    model["block"]["ffn"] = dict(
        kind="mixture",
        experts=experts,
        chosen=chosen,
        hidden=4 * dim,
        activation="gelu",
        gated=False,
        use_bias=True,
        normalised=False,
        capacity=1.2,
        eval_capacity=experts / chosen,
        noise=1.0,
        balance=0.01,
    )
    return model
