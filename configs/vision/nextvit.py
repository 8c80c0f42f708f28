"""Next-ViT (Li et al. 2022, arXiv:2207.05501): convolution blocks, and an attention block now and then.

    python -m experiments.train --config=configs/vision/nextvit.py:VARIANT --workdir=runs/nextvit

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.08M parameters, 80 epochs of 1,437 digits of 8 x 8 pixels: 99.7% of the 360 held-out digits.
`small`, `base`, `large`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the paper reports 82.5%, 83.2% and 83.6% top-1.
`small-384`, `base-384`, `large-384`
    Fine-tuning for 30 epochs at 384 pixels of what `--config.train.start` names. Not run here; the paper
    reports 83.6%, 84.3% and 84.7%.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

# Blocks a stage, stochastic depth.
SIZES = {
    "small": ((3, 4, 10, 3), 0.1),
    "base": ((3, 4, 20, 3), 0.2),
    "large": ((3, 4, 30, 3), 0.2),
}
VARIANTS = ("smoke", "digits", *SIZES, *(f"{size}-384" for size in SIZES))


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        widths = ((8, None), (8, 16)) if smoke else ((24, None), (32, 64))
        model = nextvit(
            (1, 5) if smoke else (2, 5),
            widths,
            pools=(1, 1),
            periods=(1, 5),
            stem=((widths[0][0], 1),),
            head_dim=8,
            classes=10,
            drop_path=0.0,
        )
        return digits(model, smoke=smoke)
    size, _, what = variant.partition("-")
    depths, drop_path = SIZES[size]
    model = nextvit(depths, classes=1000, drop_path=drop_path)
    if what == "384":
        finer: dict[str, Any] = dict(epochs=30, lr=1e-5, weight_decay=1e-8, warmup="0%")
        return imagenet(model, size=384, batch_size=1024, clip=5.0, ema=None, **finer)
    return imagenet(model, batch_size=2048, lr=2e-3, weight_decay=0.1, clip=5.0, warmup="20 epochs", ema=None)


def nextvit(
    depths: tuple[int, ...],
    widths: tuple[tuple[int, int | None], ...] = ((96, None), (192, 256), (384, 512), (768, 1024)),
    *,
    classes: int,
    drop_path: float,
    pools: tuple[int, ...] = (8, 4, 2, 1),
    periods: tuple[int, ...] | None = None,
    stem: tuple[tuple[int, int], ...] = ((64, 2), (32, 1), (64, 1), (64, 2)),
    head_dim: int = 32,
    share: float = 0.75,
) -> dict:
    """The model section of a Next-ViT.

    A stage repeats its period: convolution blocks of a narrow width, then one attention block of a wide one.

    Args:
      depths: blocks a stage.
      widths: channels of the convolution blocks and of the attention blocks; None where there is none.
      classes: outputs.
      drop_path: stochastic depth of the last block.
      pools: of keys and values a stage.
      periods: blocks of a period; None is 5 in the third stage, and the depth elsewhere.
      stem: channels and stride of the stem's convolutions.
      head_dim: channels of a head.
      share: of an attention block's channels that are those of the attention.
    """
    periods = periods or tuple(5 if i == 2 else depth for i, depth in enumerate(depths))
    stages = []
    for i, (depth, (narrow, wide)) in enumerate(zip(depths, widths, strict=True)):
        conv = dict(kind="next_conv", dim=narrow, head_dim=head_dim)
        blocks: tuple[dict, ...] = (conv,)
        if wide is not None:
            far = int(wide * share) // head_dim * head_dim
            attention = dict(
                kind="next_transformer", dim=wide, attention_dim=far, pool=pools[i], head_dim=head_dim
            )
            # The first block stands apart, so the cycle begins with the second and ends with the next first.
            blocks = (conv,) * (periods[i] - 2) + (attention, conv)
        first = conv | dict(stride=2 if i else 1)
        stages.append(dict(depth=depth, dim=narrow, first=first, blocks=blocks))
    return dict(
        kind="pyramid",
        stem=dict(
            kind="convs",
            layers=tuple(dict(features=dim, stride=stride, activation="relu") for dim, stride in stem),
        ),
        stages=tuple(stages),
        classes=classes,
        head=dict(kind="linear", norm="batch", epsilon=1e-5),
        drop_path=drop_path,
    )
