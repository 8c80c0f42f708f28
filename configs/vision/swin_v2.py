"""Swin Transformer V2 (Liu et al. 2022, arXiv:2111.09883): norms behind the branches, cosine attention, and a
bias that goes from one window to another.

    python -m experiments.train --config=configs/vision/swin_v2.py:VARIANT --workdir=runs/swin_v2

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.24M parameters, 80 epochs of 1,437 digits of 8 x 8 pixels in windows of 4 x 4: about three minutes on 2
    CPU cores, and an accuracy of 98.9% on the 360 held-out digits.
`tiny-8`, `tiny-16`, `small-8`, `small-16`, `base-8`, `base-16`
    ImageNet-1k at 256 pixels for 300 epochs, in windows of 8 or 16. Not run here; the authors report 81.8%,
    82.8%, 83.7%, 84.1%, 84.2% and 84.6% top-1.
`base-22k`, `large-22k`
    Pre-training on ImageNet-22k at 192 pixels for 90 epochs, in windows of 12.
`base-256`, `large-256`, `base-384`, `large-384`
    Fine-tuning of those for 30 epochs, in windows of 16 and 24: give what to start from as
    `--config.train.start`. Not run here; the authors report 86.2%, 86.9%, 87.1% and 87.6%.
`giant`
    The network of three billion parameters, with a norm of the residual stream behind every sixth block.
    The paper does not say all of its training: the settings are those of `large-22k`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels of the first stage, blocks a stage, stochastic depth; heads have 32 channels everywhere.
SIZES = {
    "tiny": (96, (2, 2, 6, 2), 0.2),
    "small": (96, (2, 2, 18, 2), 0.3),
    "base": (128, (2, 2, 18, 2), 0.5),
    "large": (192, (2, 2, 18, 2), 0.2),
    "giant": (512, (2, 2, 42, 4), 0.2),
}
FROM_SCRATCH = tuple(f"{size}-{window}" for size in ("tiny", "small", "base") for window in (8, 16))
FINER = tuple(f"{size}-{pixels}" for size in ("base", "large") for pixels in (256, 384))
VARIANTS = ("smoke", "digits", *FROM_SCRATCH, "base-22k", "large-22k", *FINER, "giant")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        toy: dict[str, Any] = dict(window=4, patch=1, classes=10, head_dim=8, drop_path=0.0, unroll=2)
        model = swin_v2(16, (2, 2), hidden=64, **toy) if smoke else swin_v2(32, (2, 4), hidden=64, **toy)
        return _decayed(digits(model, smoke=smoke))
    size, _, what = variant.partition("-")
    width, depths, drop_path = SIZES[size]
    if what == "22k" or size == "giant":
        model = swin_v2(
            width,
            depths,
            window=12,
            classes=21_841 if what else 1000,
            drop_path=0.2,
            extra=6 if not what else None,
        )
        pre: dict[str, Any] = dict(epochs=90, batch_size=4096, weight_decay=0.1, clip=5.0, ema=None)
        return _decayed(imagenet(model, size=192, dataset="22k" if what else "1k", **pre))
    if what in ("256", "384"):
        window: dict[str, Any] = dict(window=16 if what == "256" else 24, trained=(12, 12, 12, 6))
        model = swin_v2(width, depths, classes=1000, drop_path=0.2, **window)
        finer: dict[str, Any] = dict(epochs=30, lr=4e-5, weight_decay=1e-8, clip=5.0, ema=None)
        return _decayed(imagenet(model, size=int(what), **finer))
    model = swin_v2(width, depths, window=int(what), classes=1000, drop_path=drop_path)
    return _decayed(imagenet(model, size=256, warmup="20 epochs", clip=5.0, ema=None))


def _decayed(config: ConfigDict) -> ConfigDict:
    """Leaves the networks of the position bias without weight decay."""
    config.optimizer.decay = ((".*/mixer/bias/.*", 0.0),)
    return config


def swin_v2(
    width: int,
    depths: tuple[int, ...],
    *,
    window: int,
    classes: int,
    drop_path: float,
    patch: int = 4,
    head_dim: int = 32,
    hidden: int = 512,
    trained: tuple[int | None, ...] | None = None,
    extra: int | None = None,
    **more: object,
) -> dict:
    """The model section; `trained`: windows of pre-training, `extra`: how often the stream is normed."""

    def block(dim: int, trained: int | None, i: int, normed: bool) -> dict:
        bias = dict(kind="log_spaced_continuous", hidden=hidden, trained=trained)
        mixer = dict(
            kind="shifted_window",
            heads=dim // head_dim,
            window=window,
            shifted=i % 2 == 1,
            key_bias=False,
            similarity="cosine",
            bias=bias,
        )
        order = dict(order="res_post_norm", norm_scale=0.0, stream_norm=normed)
        return dict(kind="metaformer", mixer=mixer, ffn=dict(kind="mlp"), epsilon=1e-5, **order)

    def cycle(depth: int, dim: int, trained: int | None) -> tuple[dict, ...]:
        length = extra if extra and depth >= extra else 2
        return tuple(block(dim, trained, i, normed=i + 1 == extra) for i in range(length))

    dims = tuple(width * 2**i for i in range(len(depths)))
    rows = stages(depths, dims, trained=trained or (None,) * len(depths))
    return dict(
        kind="pyramid",
        stem=dict(kind="patches", patch=patch, epsilon=1e-5, edge="pad"),
        stages=tuple(
            dict(depth=row["depth"], dim=row["dim"], blocks=cycle(row["depth"], row["dim"], row["trained"]))
            | (dict(downsample=dict(kind="merge", norm_first=False)) if i else {})
            for i, row in enumerate(rows)
        ),
        classes=classes,
        head=dict(kind="linear", epsilon=1e-5),
        drop_path=drop_path,
        **more,
    )
