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
`digits-swin`
    0.19M parameters: Swin on 64 places of digits in windows of 4 x 4, with a block and a dumbbell of five
    layers on 4 semantic tokens a window. 96.9% of the 360 held-out digits after 60 epochs, three and a
    quarter minutes on 2 CPU cores.
`swin-t`, `swin-s`, `swin-b`
    ImageNet at 224 pixels for 300 epochs with Swin's recipe: behind the first block of the third stage 16
    semantic tokens take the place of the 49 of each window. Not run here.
`swin-t-r`, `swin-s-r`, `swin-b-r`
    One or three dumbbells in the third stage, with 9 semantic tokens a window, as the published code has
    them. Not run here; the authors report 82.7% top-1 for S and 83.2% for B.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet
from configs.vision.swin import swin

# What Swin has: channels of the first stage, layers a stage, stochastic depth.
SWIN = {
    "swin-t": (96, (2, 2, 6, 2), 0.2),
    "swin-s": (96, (2, 2, 18, 2), 0.3),
    "swin-b": (128, (2, 2, 18, 2), 0.4),
}
VARIANTS = (
    *("smoke", "digits", "digits-swin", "deit-t", "deit-s", "deit-b", "deit-s-r"),
    *SWIN,
    *(f"{size}-r" for size in SWIN),
)

SIZES = {
    "deit-t": dict(dim=192, heads=3),
    "deit-s": dict(dim=384, heads=6),
    "deit-b": dict(dim=768, heads=12),
}

# Stochastic depth of DeiT: linear over the twelve layers, of which two are the generator's.
DROP = 0.1


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant == "digits-swin":
        toy: dict[str, Any] = dict(window=4, side=2, reach=6, head_dim=8, stem=dict(kind="patches", patch=1))
        model = windowed(32, (6, 2), recover=True, classes=10, drop_path=0.0, **toy)
        return digits(model, smoke=False, steps="60 epochs")
    size, recover = variant.removesuffix("-r"), variant.endswith("-r")
    if size in SWIN:
        width, depths, drop_path = SWIN[size]
        windows: dict[str, Any] = dict(window=7, side=3 if recover else 4, reach=10, recover=recover)
        model = windowed(width, depths, **windows, classes=1000, drop_path=drop_path)
        return imagenet(model, warmup="20 epochs", clip=5.0, ema=None)
    deit = dict(patch=16, classes=1000)
    if variant == "deit-s-r":
        return imagenet(dumbbells(**SIZES["deit-s"], units=2, side=4, drop_path=DROP, **deit))
    if variant in SIZES:
        generator = dict(side=4, drop_path=DROP * 4.5 / 11)
        return imagenet(
            semantic(**SIZES[variant], depth=10, at=4, generator=generator, drop_path=DROP, **deit)
        )
    smoke = variant == "smoke"
    toy = dict(dim=16, heads=2, depth=2, at=1) if smoke else dict(dim=64, heads=4, depth=4, at=2)
    model = semantic(**toy, generator=dict(side=2), patch=2, classes=10, unroll=toy["depth"])
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


def windowed(
    width: int,
    depths: tuple[int, ...],
    *,
    window: int,
    side: int,
    reach: int,
    recover: bool,
    classes: int,
    drop_path: float,
    head_dim: int = 32,
    stem: dict | None = None,
) -> dict:
    """The model section of a Swin Transformer with `side x side` semantic tokens for each window.

    They are generated behind the first block of the stage before the last. Without recovery all that follows
    runs on them; with it, every six layers of that stage are a block on image tokens and a dumbbell of five.
    """
    model = swin(width, depths, window=window, classes=classes, drop_path=drop_path, head_dim=head_dim)
    *early, stage, last = model["stages"]
    heads = stage["dim"] // head_dim
    image = stage["blocks"][0]
    generate = dict(heads=heads, window=window, side=side, reach=reach)
    mixers = (
        dict(kind="shifted_window", heads=heads, window=side, bias=None),
        dict(kind="attention", heads=heads),
    )
    process = tuple(
        dict(mixer=mixer, ffn=dict(kind="mlp"), epsilon=1e-5, layer_scale=1e-5) for mixer in mixers
    )
    if recover:
        middle = [stage | dict(blocks=(image, dict(kind="dumbbell", generate=generate, process=process)))]
    else:
        blocks = tuple(dict(kind="metaformer", **block) for block in process)
        first = dict(kind="semantic_windows", **generate)
        dim, depth = stage["dim"], stage["depth"]
        middle = [
            stage | dict(depth=1, blocks=(image,)),
            dict(dim=dim, depth=depth - 1, first=first, blocks=blocks),
        ]
    bend = dict(kernel=3, stride=2, activation="hard_swish")
    convs = dict(kind="convs", layers=(bend | dict(features=width // 2), bend))
    return model | dict(stages=(*early, *middle, last), stem=stem or convs)
