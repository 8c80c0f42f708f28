"""FocalNet (Yang et al. 2022, arXiv:2203.11926): focal modulation in place of attention, in Swin's pyramid.

    python -m experiments.train --config=configs/vision/focalnet.py:VARIANT --workdir=runs/focalnet

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    30 epochs of 1,437 digits of 8 x 8 pixels: two and a half minutes on 2 CPU cores, and an accuracy of
    98.6% on the 360 held-out digits.
`tiny-srf`, `tiny-lrf`, `small-srf`, `small-lrf`, `base-srf`, `base-lrf`
    ImageNet-1k at 224 pixels for 300 epochs, with a small (two levels) or large (three) receptive field. Not
    run here; the paper reports 82.1%, 82.3%, 83.4%, 83.5%, 83.7% and 83.9% top-1.
`tiny-overlap`, `small-overlap`, `base-overlap`, `tiny-deep`, `small-deep`, `base-deep`
    The small receptive field with convolutions that overlap in place of patches, and with more and narrower
    blocks as well: 82.4%, 83.4%, 84.0%, 82.7%, 83.5% and 84.1% in the paper.
`tiny-16`, `small-16`, `base-16`
    One resolution, patches of 16, as a ViT: 74.1%, 80.9% and 82.4% in the paper.
`base-22k`, `large-22k`
    Pre-training on ImageNet-22k at 224 pixels for 90 epochs.
`base-224`, `large-224`, `base-384`, `large-384`
    Fine-tuning for 30 epochs of what `--config.train.start` names; after 22k the paper reports 85.6%, 86.5%,
    86.5% and 87.3%.
`large-fl3`, `large-fl4`, `xlarge-fl3`, `xlarge-fl4`, `huge-fl3`, `huge-fl4`
    The networks that the authors published for detection, here to be fine-tuned at 384 pixels (huge: 224),
    and with `-22k` their pre-training. No accuracy was published.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels of the first stage, blocks a stage, stochastic depth in 300 epochs on ImageNet-1k.
SIZES: dict[str, tuple[int, tuple[int, ...], float]] = {
    "tiny": (96, (2, 2, 6, 2), 0.2),
    "small": (96, (2, 2, 18, 2), 0.3),
    "base": (128, (2, 2, 18, 2), 0.5),
}
DEEP: dict[str, tuple[int, tuple[int, ...], float]] = {
    "tiny": (64, (3, 3, 16, 3), 0.2),
    "small": (64, (4, 4, 28, 4), 0.3),
    "base": (96, (4, 4, 28, 4), 0.5),
}
FLAT: dict[str, tuple[int, tuple[int, ...], float]] = {
    "tiny": (192, (12,), 0.2),
    "small": (384, (12,), 0.2),
    "base": (768, (12,), 0.3),
}
WIDTHS = {"base": 128, "large": 192, "xlarge": 256, "huge": 352}
# Convolutions in a row and the side of the first.
FIELDS = {"srf": (2, 3), "lrf": (3, 3), "fl3": (3, 5), "fl4": (4, 3)}
FROM_SCRATCH = tuple(f"{size}-{what}" for what in ("srf", "lrf", "overlap", "deep", "16") for size in SIZES)
TUNED = ("base-224", "large-224", "base-384", "large-384")
LARGE = tuple(f"{size}-{field}" for size in ("large", "xlarge", "huge") for field in ("fl3", "fl4"))
PRETRAINED = ("base-22k", "large-22k", *(f"{name}-22k" for name in LARGE))
VARIANTS = ("smoke", "digits", *FROM_SCRATCH, *TUNED, *LARGE, *PRETRAINED)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant == "smoke":
        return digits(focalnet(16, (1, 2), classes=10, patch=1), smoke=True)
    if variant == "digits":
        return digits(focalnet(48, (2, 4), classes=10, patch=1, unroll=2), smoke=False, steps="30 epochs")
    size, what, *_ = variant.split("-")
    if variant in FROM_SCRATCH:
        return imagenet(_from_scratch(size, what), warmup="20 epochs", clip=5.0, ema=None)
    model, side = _large(size, what), 384 if what == "384" or (what in FIELDS and size != "huge") else 224
    if variant in PRETRAINED:
        model |= dict(classes=21_842 if what in FIELDS else 21_841)
        return imagenet(model, dataset="22k", size=side, epochs=90, batch_size=4096, clip=5.0, ema=None)
    model |= dict(drop_path=0.3)
    finer: dict[str, Any] = dict(epochs=30, lr=3e-5, weight_decay=1e-8, warmup="0%", clip=5.0, ema=None)
    config = imagenet(model, size=side, **finer)
    config.task.mixing = None
    return config


def _from_scratch(size: str, what: str) -> dict:
    """The networks trained on ImageNet-1k alone."""
    if what == "16":
        width, depths, drop_path = FLAT[size]
        scaled: dict[str, Any] = dict(post_norm=True, layer_scale=1e-4) if size == "base" else {}
        return focalnet(width, depths, classes=1000, drop_path=drop_path, patch=16, levels=3, **scaled)
    width, depths, drop_path = (DEEP if what == "deep" else SIZES)[size]
    levels, kernel = FIELDS.get(what, FIELDS["srf"])
    overlap = what in ("overlap", "deep")
    return focalnet(
        width, depths, classes=1000, drop_path=drop_path, overlap=overlap, levels=levels, kernel=kernel
    )


def _large(size: str, what: str) -> dict:
    """The networks pre-trained on ImageNet-22k: those of the paper, and `fl3` and `fl4`."""
    width, depths = WIDTHS[size], (2, 2, 18, 2)
    if what not in FIELDS:
        return focalnet(width, depths, classes=1000, drop_path=0.2, layer_scale=1e-4)
    mixer: dict[str, Any] = dict(zip(("levels", "kernel"), FIELDS[what], strict=True))
    if size == "huge":
        mixer |= dict(kernel=3, norm="layer")
    if (size, what) == ("large", "fl4"):
        mixer |= dict(averaged=True)
    stable: dict[str, Any] = dict(post_norm=True, layer_scale=1e-4, overlap=True)
    return focalnet(width, depths, classes=1000, drop_path=0.5, **stable, **mixer)


def focalnet(
    width: int,
    depths: tuple[int, ...],
    *,
    classes: int,
    drop_path: float = 0.0,
    patch: int = 4,
    post_norm: bool = False,
    layer_scale: float | None = None,
    overlap: bool = False,
    unroll: int = 1,
    **mixer: Any,
) -> dict:
    """The model section of a FocalNet.

    Args:
      width: channels of the first stage.
      depths: blocks a stage.
      classes: outputs.
      drop_path: stochastic depth of the last block.
      patch: side of a patch.
      post_norm: whether norms stand behind the branches.
      layer_scale: initial value of the branches' scales; None leaves them out.
      overlap: whether convolutions that overlap stand in place of patches.
      unroll: cycles of blocks a scan iteration.
      **mixer: fields of the focal modulation.
    """
    dims = tuple(width * 2**i for i in range(len(depths)))
    block = dict(
        kind="metaformer",
        mixer=dict(kind="focal_modulation", **mixer),
        ffn=dict(kind="mlp"),
        epsilon=1e-5,
        layer_scale=layer_scale,
        order="res_post_norm" if post_norm else "pre_norm",
    )

    def coarser(side: int) -> dict:
        if not overlap:
            return dict(kind="patches", patch=side, epsilon=1e-5, edge="crop")
        size = dict(kernel=7, stride=4, padding=2) if side == 4 else dict(kernel=3, stride=2)
        return dict(kind="convs", layers=(dict(norm="layer", use_bias=True, **size),))

    return dict(
        kind="pyramid",
        stem=coarser(patch),
        stages=tuple(
            stage | dict(blocks=(block,)) | (dict(downsample=coarser(2)) if i else {})
            for i, stage in enumerate(stages(depths, dims))
        ),
        classes=classes,
        head=dict(kind="linear", epsilon=1e-5),
        drop_path=drop_path,
        unroll=unroll,
    )
