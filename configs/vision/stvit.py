"""Semantic tokens in the place of image tokens: STViT, Chang et al. 2023.

    python -m experiments.train --config=configs/vision/stvit.py:VARIANT --workdir=runs/stvit

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.30M parameters: two blocks on 16 patches of digits, two layers that generate 4 semantic tokens, and two
    blocks on these. 98.9% of the 360 held-out digits after 80 epochs, a minute and a half on 2 busy cores.
`deit-t`, `deit-s`, `deit-b`
    ImageNet at 224 pixels for 300 epochs with DeiT's recipe: 4 of 12 layers on 196 tokens, two that generate,
    and 6 on 16 semantic tokens. Not run here.
`deit-s-r`
    The same width with two dumbbells of six layers, whose end has 196 tokens again, for dense tasks.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

VARIANTS = ("smoke", "digits", "deit-t", "deit-s", "deit-b", "deit-s-r")

SIZES = {
    "deit-t": dict(dim=192, heads=3),
    "deit-s": dict(dim=384, heads=6),
    "deit-b": dict(dim=768, heads=12),
}

# Stochastic depth of DeiT: linear over the twelve layers, of which two are the generator's.
DROP = 0.1


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    deit = dict(patch=16, classes=1000)
    if variant == "deit-s-r":
        return imagenet(dumbbells(**SIZES["deit-s"], units=2, side=4, drop_path=DROP, **deit))
    if variant in SIZES:
        size = SIZES[variant]
        generator = dict(side=4, drop_path=DROP * 4.5 / 11)
        return imagenet(semantic(**size, depth=10, at=4, generator=generator, drop_path=DROP, **deit))
    smoke = variant == "smoke"
    size = dict(dim=16, heads=2, depth=2, at=1) if smoke else dict(dim=64, heads=4, depth=4, at=2)
    model = semantic(**size, generator=dict(side=2), patch=2, classes=10, unroll=size["depth"])
    return digits(model, smoke=smoke)


def semantic(dim: int, heads: int, depth: int, at: int, generator: dict, **more: object) -> dict:
    """The model section: `depth` blocks, with semantic tokens generated before block `at`."""
    entries = {str(at): dict(kind="semantic", heads=heads, **generator)}
    return dict(
        kind="vit",
        dim=dim,
        depth=depth,
        pool="mean",
        block=dict(mixer=dict(kind="attention", heads=heads), ffn=dict(kind="mlp")),
        reduce=dict(kind="schedule", entries=entries),
        **more,
    )


def dumbbells(dim: int, heads: int, units: int, side: int, **more: object) -> dict:
    """The model section of STViT-R: a block, the generator, two blocks on few tokens, recovery, and again."""
    model = semantic(dim, heads, 3 * units, 1, dict(side=side), **more)
    entries = {}
    for unit in range(units):
        generate = dict(kind="semantic", heads=heads, side=side, recoverable=True)
        entries[str(3 * unit + 1)] = generate
        entries[str(3 * unit + 3)] = dict(kind="recover", heads=heads)
    return model | dict(reduce=dict(kind="schedule", entries=entries))
