"""Neighbourhood attention transformers: DiNAT (Hassani and Shi 2022, arXiv:2209.15001) and, without dilation,
NAT (Hassani et al. 2023, arXiv:2204.07143).

    python -m experiments.train --config=configs/vision/dinat.py:VARIANT --workdir=runs/dinat

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.21M parameters, 80 epochs of 1,437 digits of 8 x 8 pixels in neighbourhoods of 3 x 3: under three
    minutes on 2 CPU cores, and all of the 360 held-out digits are right.
`mini`, `tiny`, `small`, `base`
    DiNAT on ImageNet-1k at 224 pixels for 300 epochs. Not run here; the authors report 81.8%, 82.7%, 83.8%
    and 84.4% top-1.
`nat-mini`, `nat-tiny`, `nat-small`, `nat-base`
    The same without dilation; the authors report 81.8%, 83.2%, 83.7% and 84.3%.
`large-22k`
    Pre-training on ImageNet-22k at 224 pixels. The authors' settings were not found: these are Swin's.
`large`, `large-384`, `large-384-11`
    Fine-tuning of that for 30 epochs, the last in neighbourhoods of 11 x 11: give what to start from as
    `--config.train.start`. Not run here; the authors report 86.6%, 87.4% and 87.5%.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

DEPTHS = (3, 4, 18, 5)
# Channels of the first stage, blocks a stage, expansion of the FFN, stochastic depth, initial layer scale.
SIZES: dict[str, tuple[int, tuple[int, ...], float, float, float | None]] = {
    "mini": (64, (3, 4, 6, 5), 3.0, 0.2, None),
    "tiny": (64, DEPTHS, 3.0, 0.2, None),
    "small": (96, DEPTHS, 2.0, 0.3, None),
    "base": (128, DEPTHS, 2.0, 0.5, 1e-5),
    "large": (192, DEPTHS, 2.0, 0.35, None),
    "nat-mini": (64, (3, 4, 6, 5), 3.0, 0.2, None),
    "nat-tiny": (64, DEPTHS, 3.0, 0.2, None),
    "nat-small": (96, DEPTHS, 2.0, 0.3, 1e-5),
    "nat-base": (128, DEPTHS, 2.0, 0.5, 1e-5),
}
VARIANTS = ("smoke", "digits", *SIZES, "large-384", "large-384-11", "large-22k")

MERGE = dict(kernel=3, stride=2, use_bias=False, norm="layer")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        stem = (dict(kernel=3, stride=1, use_bias=True, norm="layer"),)
        toy: dict[str, Any] = dict(
            dilations=(2, 1), kernel=3, classes=10, drop_path=0.0, stem=stem, head_dim=8
        )
        model = dinat(16, (2, 1), 2.0, **toy) if smoke else dinat(32, (2, 4), 3.0, unroll=2, **toy)
        return digits(model, smoke=smoke)
    size = next(name for name in sorted(SIZES, key=len, reverse=True) if variant.startswith(name))
    width, depths, ratio, drop_path, scale = SIZES[size]
    what = variant.removeprefix(size)
    dilations = (1, 1, 1, 1) if size.startswith("nat") else (13, 6, 3, 1) if what == "-384" else (8, 4, 2, 1)
    model = dinat(
        width,
        depths,
        ratio,
        kernel=11 if what == "-384-11" else 7,
        dilations=dilations,
        classes=21_841 if what == "-22k" else 1000,
        drop_path=0.2 if what == "-22k" else drop_path,
        layer_scale=scale,
    )
    if what == "-22k":
        return imagenet(model, dataset="22k", epochs=90, batch_size=4096, clip=5.0, ema=None)
    if size == "large":
        finer: dict[str, Any] = dict(epochs=30, batch_size=512, lr=5e-5, warmup="0%", ema=None)
        return imagenet(model, size=384 if what else 224, weight_decay=1e-10 if what else 1e-4, **finer)
    return imagenet(model, warmup="20 epochs", ema=None)


def dinat(
    width: int,
    depths: tuple[int, ...],
    ratio: float,
    *,
    kernel: int,
    dilations: tuple[int, ...],
    classes: int,
    drop_path: float,
    layer_scale: float | None = None,
    head_dim: int = 32,
    stem: tuple[dict, ...] | None = None,
    **more: object,
) -> dict:
    """The model section; every other block of a stage has its dilation, the others have none."""

    def block(dim: int, dilation: int) -> dict:
        mixer = dict(kind="neighborhood", heads=dim // head_dim, kernel=kernel, dilation=dilation)
        ffn = dict(kind="mlp", ratio=ratio)
        return dict(kind="metaformer", mixer=mixer, ffn=ffn, epsilon=1e-5, layer_scale=layer_scale)

    def cycle(dim: int, dilation: int) -> tuple[dict, ...]:
        return (block(dim, 1),) if dilation == 1 else (block(dim, 1), block(dim, dilation))

    if stem is None:
        halves = (width // 2, None), (width, "layer")
        stem = tuple(dict(features=f, kernel=3, stride=2, use_bias=True, norm=norm) for f, norm in halves)
    rows = stages(depths, tuple(width * 2**i for i in range(len(depths))), dilation=dilations)
    return dict(
        kind="pyramid",
        stem=dict(kind="convs", layers=stem),
        stages=tuple(
            dict(depth=row["depth"], dim=row["dim"], blocks=cycle(row["dim"], row["dilation"]))
            | (dict(downsample=dict(kind="convs", layers=(MERGE,))) if i else {})
            for i, row in enumerate(rows)
        ),
        classes=classes,
        head=dict(kind="linear", epsilon=1e-5),
        drop_path=drop_path,
        **more,
    )
