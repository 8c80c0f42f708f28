"""FocalNet (Yang et al. 2022, arXiv:2203.11926): focal modulation in place of attention, in Swin's pyramid.

    python -m experiments.train --config=configs/vision/focalnet.py:VARIANT --workdir=runs/focalnet

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels.
`tiny-srf`, `tiny-lrf`, `small-srf`, `small-lrf`, `base-srf`, `base-lrf`
    ImageNet-1k at 224 pixels for 300 epochs, with a small (two levels) or large (three) receptive field. Not
    run here; the paper reports 82.1%, 82.3%, 83.4%, 83.5%, 83.7% and 83.9% top-1.
`large-fl3-22k`, `large-fl4-22k`, `xlarge-fl3-22k`, `xlarge-fl4-22k`, `huge-fl3-22k`, `huge-fl4-22k`
    Pre-training on ImageNet-22k for 90 epochs with three or four levels, at 384 pixels (huge: 224).
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels of the first stage, blocks a stage, stochastic depth.
SIZES = {
    "tiny": (96, (2, 2, 6, 2), 0.2),
    "small": (96, (2, 2, 18, 2), 0.3),
    "base": (128, (2, 2, 18, 2), 0.5),
    "large": (192, (2, 2, 18, 2), 0.5),
    "xlarge": (256, (2, 2, 18, 2), 0.5),
    "huge": (352, (2, 2, 18, 2), 0.5),
}
# Convolutions in a row and the side of the first.
FIELDS = {"srf": (2, 3), "lrf": (3, 3), "fl3": (3, 5), "fl4": (4, 3)}
VARIANTS = (
    *("smoke", "digits"),
    *(f"{size}-{field}" for size in ("tiny", "small", "base") for field in ("srf", "lrf")),
    *(f"{size}-{field}-22k" for size in ("large", "xlarge", "huge") for field in ("fl3", "fl4")),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant == "smoke":
        return digits(focalnet(16, (1, 2), classes=10, patch=1), smoke=True)
    if variant == "digits":
        return digits(focalnet(48, (2, 4), classes=10, patch=1, unroll=2), smoke=False)
    size, field, *pretraining = variant.split("-")
    width, depths, drop_path = SIZES[size]
    levels, kernel = FIELDS[field]
    if not pretraining:
        model = focalnet(width, depths, levels=levels, kernel=kernel, classes=1000, drop_path=drop_path)
        return imagenet(model, warmup="20 epochs", clip=5.0, ema=None)
    mixer: dict = dict(levels=levels, kernel=3 if size == "huge" else kernel)
    if size == "huge":
        mixer["norm"] = "layer"
    if (size, field) == ("large", "fl4"):
        mixer["averaged"] = True
    model = focalnet(width, depths, classes=21_842, drop_path=drop_path, large=True, **mixer)
    return imagenet(
        model,
        dataset="22k",
        size=224 if size == "huge" else 384,
        epochs=90,
        batch_size=4096,
        clip=5.0,
        ema=None,
    )


def focalnet(
    width: int,
    depths: tuple[int, ...],
    *,
    classes: int,
    drop_path: float = 0.0,
    patch: int = 4,
    large: bool = False,
    unroll: int = 1,
    **mixer: object,
) -> dict:
    """The model section of a FocalNet.

    Args:
      width: channels of the first stage.
      depths: blocks a stage.
      classes: outputs.
      drop_path: stochastic depth of the last block.
      patch: side of a patch.
      large: what keeps large networks stable: norms behind the branches, layer scale, and convolutions that
        overlap in place of patches.
      unroll: cycles of blocks a scan iteration.
      **mixer: fields of the focal modulation.
    """
    dims = tuple(width * 2**i for i in range(len(depths)))
    block = dict(
        kind="metaformer",
        mixer=dict(kind="focal_modulation", **mixer),
        ffn=dict(kind="mlp"),
        epsilon=1e-5,
        **(dict(order="res_post_norm", layer_scale=1e-4) if large else {}),
    )

    def coarser(side: int) -> dict:
        if not large:
            return dict(kind="patches", patch=side, epsilon=1e-5, edge="crop")
        overlap = dict(kernel=7, stride=4, padding=2) if side == 4 else dict(kernel=3, stride=2)
        return dict(kind="convs", layers=(dict(norm="layer", use_bias=True, **overlap),))

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
