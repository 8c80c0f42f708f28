"""SLAB (Guo et al. 2024, arXiv:2405.11582): norms that fold away after training, and linear attention.

    python -m experiments.train --config=configs/vision/slab.py:VARIANT --workdir=runs/slab

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels, the layer norms gone after half of them:
    99.4% of the 360 held-out digits.
`deit-tiny`, `deit-small`, `swin-tiny`, `swin-small`, `pvt-tiny`, `cswin-tiny`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the authors report 74.3%, 80.0%, 81.8%, 83.6%,
    76.5% and 82.8%.
`swin-base`, `pvt-small`, `pvt-medium`, `cswin-small`
    The same, with settings in the published code and no figure beside it.
`prepbn-deit-tiny`, `prepbn-deit-small`, `prepbn-swin-tiny`, `prepbn-pvt-tiny`, `prepbn-pvt-small`,
`prepbn-pvt-medium`
    The norms alone, with softmax attention. Not run here; the authors report 73.6%, 80.2%, 81.4%, 76.0%,
    80.1% and 81.7%.

`effjax.compress.slab.fold_norms` folds the norms of what was trained.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.cswin import cswin
from configs.vision.recipes import digits, imagenet, stages
from configs.vision.swin import swin
from configs.vision.vit import vit

# Width and heads.
DEIT = {"tiny": (192, 3), "small": (384, 6)}
# Channels of the first stage, blocks a stage, stochastic depth.
SWIN = {
    "tiny": (96, (2, 2, 6, 2), 0.2),
    "small": (96, (2, 2, 18, 2), 0.3),
    "base": (128, (2, 2, 18, 2), 0.5),
}
# Blocks a stage, stochastic depth.
PVT = {"tiny": ((2, 2, 2, 2), 0.0), "small": ((3, 4, 6, 3), 0.1), "medium": ((3, 4, 18, 3), 0.3)}
CSWIN = {"tiny": ((2, 4, 18, 1), 0.1), "small": ((2, 4, 32, 2), 0.3)}
# Passes until the layer norm is gone, and where the published code has its default for that.
STEPS, STEPS_OF_CSWIN, STEPS_BY_DEFAULT = 60_000, 120_000, 300_000
# Eight devices with 128 examples each, but for these.
BATCH = {"swin-base": 512, "pvt-small": 512, "prepbn-pvt-small": 512, "pvt-medium": 512, "cswin-tiny": 2048}
VARIANTS = (
    *("smoke", "digits"),
    *(f"deit-{name}" for name in DEIT),
    *(f"swin-{name}" for name in SWIN),
    *(f"pvt-{name}" for name in PVT),
    *(f"cswin-{name}" for name in CSWIN),
    *("prepbn-deit-tiny", "prepbn-deit-small", "prepbn-swin-tiny"),
    *(f"prepbn-pvt-{name}" for name in PVT),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        dim, depth, heads, steps = (16, 2, 2, 10) if smoke else (64, 4, 4, 900)
        model = slab_deit(dim, depth, heads, patch=2, classes=10, steps=steps, unroll=depth)
        return digits(model, smoke=smoke)
    linear = not variant.startswith("prepbn-")
    family, _, name = variant.removeprefix("prepbn-").partition("-")
    steps = STEPS if linear else STEPS_BY_DEFAULT
    recipe: dict[str, Any] = dict(warmup="20 epochs", clip=5.0)
    if family == "deit":
        dim, heads = DEIT[name]
        model = slab_deit(dim, 12, heads, patch=16, classes=1000, steps=steps, linear=linear)
    elif family == "swin":
        width, depths, drop_path = SWIN[name]
        drop_path = drop_path if linear else 0.1
        model = slab_swin(width, depths, steps=steps, linear=2 if linear else 0, drop_path=drop_path)
    elif family == "pvt":
        depths, drop_path = PVT[name]
        recipe = dict(warmup="5 epochs", clip=1.0 if name == "medium" else None)
        model = slab_pvt(
            depths, steps=STEPS_BY_DEFAULT, linear=4 if linear else 0, drop_path=drop_path, classes=1000
        )
    else:
        depths, drop_path = CSWIN[name]
        recipe["clip"] = None
        model = slab_cswin(depths, steps=STEPS_OF_CSWIN, drop_path=drop_path, classes=1000)
    batch_size = BATCH.get(variant, 1024)
    return imagenet(model, batch_size=batch_size, lr=1e-3 * batch_size / 1024, ema=None, **recipe)


def slab_deit(
    dim: int,
    depth: int,
    heads: int,
    patch: int,
    classes: int,
    steps: int,
    linear: bool = True,
    **more: object,
) -> dict:
    """The model section of SLAB-DeiT: patches alone and their mean; with softmax attention, a class token."""
    model = vit(dim, depth, heads, patch, classes, pool="mean" if linear else "token", **more)
    model["block"]["norm"] = progressive(steps)
    if linear:
        model["block"]["mixer"] = dict(kind="simplified_linear", heads=heads)
    return model


def slab_swin(
    width: int,
    depths: tuple[int, ...],
    *,
    steps: int,
    linear: int,
    drop_path: float,
    classes: int = 1000,
    window: int = 7,
    patch: int = 4,
    head_dim: int = 32,
    **more: object,
) -> dict:
    """The model section of SLAB-Swin: linear attention over the whole map in the first `linear` stages."""
    options = dict(window=window, classes=classes, drop_path=drop_path, patch=patch, head_dim=head_dim)
    return slab(swin(width, depths, **options, **more), steps, linear)  # type: ignore[arg-type]


def slab_pvt(
    depths: tuple[int, ...],
    *,
    steps: int,
    linear: int,
    drop_path: float,
    classes: int,
    dims: tuple[int, ...] = (64, 128, 320, 512),
    heads: tuple[int, ...] = (1, 2, 5, 8),
    ratios: tuple[int, ...] = (8, 8, 4, 4),
    reductions: tuple[int, ...] = (8, 4, 2, 1),
    patch: int = 4,
    **more: object,
) -> dict:
    """The model section of SLAB-PVT: patches with positions in every stage, and their mean.

    The Pyramid Vision Transformer, Wang et al. 2021, has a class token in the last stage and a norm behind
    it; SLAB's has neither.
    """

    def block(heads: int, ratio: int, reduction: int) -> dict:
        mixer = dict(kind="spatial_reduction", heads=heads, reduction=reduction)
        return dict(kind="metaformer", mixer=mixer, ffn=dict(kind="mlp", ratio=float(ratio)))

    def patches(patch: int) -> dict:
        return dict(kind="patches", patch=patch, positions=True, edge="crop")

    rows = stages(depths, dims, heads=heads, ratio=ratios, reduction=reductions)
    model = dict(
        kind="pyramid",
        stem=patches(patch),
        stages=tuple(
            dict(depth=row.pop("depth"), dim=row.pop("dim"), blocks=(block(**row),))
            | (dict(downsample=patches(2)) if i else {})
            for i, row in enumerate(rows)
        ),
        classes=classes,
        head=dict(kind="linear", norm=None),
        drop_path=drop_path,
        **more,
    )
    return slab(model, steps, linear)


def slab_cswin(
    depths: tuple[int, ...],
    *,
    steps: int,
    drop_path: float,
    classes: int,
    width: int = 64,
    heads: tuple[int, ...] = (2, 4, 8, 16),
    stripes: tuple[int | None, ...] = (None, None, 7, None),
    linear: int = 2,
    **more: Any,
) -> dict:
    """The model section of SLAB-CSWin: linear attention over the whole map in the first `linear` stages."""
    model = cswin(width, depths, heads, stripes=stripes, classes=classes, drop_path=drop_path, **more)
    return slab(model, steps, linear, lepe=True)


def slab(model: dict, steps: int, linear: int, **mixer: object) -> dict:
    """A pyramid with other norms, and linear attention over the whole map in its first stages.

    Args:
      model: the section of a pyramid.
      steps: passes until its layer norms are gone.
      linear: how many stages get linear attention, a block of one kind each.
      **mixer: more of that attention.
    """
    norm = progressive(steps)

    def block(section: dict, linear: bool) -> dict:
        own = section["mixer"]
        if linear:
            own = dict(kind="simplified_linear", heads=own["heads"], **mixer)
        elif own["kind"] == "spatial_reduction":
            own = own | dict(norm=norm)
        return section | dict(mixer=own, norm=norm)

    def coarser(section: dict) -> dict:
        if section["kind"] == "convs":
            return section | dict(layers=tuple(layer | dict(norm=norm) for layer in section["layers"]))
        return section | dict(norm=norm)

    def stage(i: int, section: dict) -> dict:
        kinds = section["blocks"][:1] if i < linear else section["blocks"]
        before = dict(downsample=coarser(section["downsample"])) if "downsample" in section else {}
        return section | dict(blocks=tuple(block(kind, i < linear) for kind in kinds)) | before

    head = model["head"]
    return model | dict(
        stem=coarser(model["stem"]),
        stages=tuple(stage(i, section) for i, section in enumerate(model["stages"])),
        head=head if head.get("norm", norm) is None else head | dict(norm=norm),
    )


def progressive(steps: int) -> dict:
    """PRepBN whose layer norm is gone after so many passes."""
    return dict(kind="progressive", steps=steps)
