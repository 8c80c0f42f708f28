"""MOAT (Yang et al. 2023, arXiv:2210.01820): mobile convolution and attention by turns, in a pyramid.

    python -m experiments.train --config=configs/vision/moat.py:VARIANT --workdir=runs/moat

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels: under three minutes on 2 CPU cores, and an accuracy of 99.7%
    on the 360 held-out digits.
`moat0` to `moat3`, `tiny0` to `tiny3`
    ImageNet-1k at 224 pixels for 300 epochs; `tiny0-256` and the others with 256 pixels. Not run here; the
    paper reports 83.3%, 84.2%, 84.7% and 85.3% top-1 at 224 pixels, and 75.5%, 78.3%, 81.0% and 82.7% for the
    tiny ones.
`moat0-22k` to `moat4-22k`
    Pre-training on ImageNet-22k at 224 pixels for 90 epochs.
`moat0-384` to `moat3-384`, `moat1-512` to `moat4-512`
    Fine-tuning for 30 epochs, at 384 or 512 pixels, of what `--config.train.start` names. Attention stays
    global; its tables of positions keep the size of 224 pixels and are interpolated. Not run here; after 22k
    the authors report 87.5% for moat2-384, 88.4% for moat3-512 and 89.1% for moat4-512.

Lengths, sizes and stochastic depth are those of the paper and its code; what else the recipe takes is DeiT's.
For dense tasks on large pictures, `window` makes attention local, with windows that tile and do not shift.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Channels of the stem, channels and blocks a stage, stochastic depth.
SIZES = {
    "moat0": (64, (96, 192, 384, 768), (2, 3, 7, 2), 0.2),
    "moat1": (64, (96, 192, 384, 768), (2, 6, 14, 2), 0.3),
    "moat2": (128, (128, 256, 512, 1024), (2, 6, 14, 2), 0.3),
    "moat3": (160, (160, 320, 640, 1280), (2, 12, 28, 2), 0.6),
    "moat4": (256, (256, 512, 1024, 2048), (2, 12, 28, 2), 0.7),
    "tiny0": (32, (32, 64, 128, 256), (2, 3, 7, 2), 0.0),
    "tiny1": (40, (40, 80, 160, 320), (2, 3, 7, 2), 0.0),
    "tiny2": (56, (56, 112, 224, 448), (2, 3, 7, 2), 0.0),
    "tiny3": (80, (80, 160, 320, 640), (2, 3, 7, 2), 0.1),
}
VARIANTS = (
    *("smoke", "digits", "moat0", "moat1", "moat2", "moat3", "tiny0", "tiny1", "tiny2", "tiny3"),
    *("tiny0-256", "tiny1-256", "tiny2-256", "tiny3-256"),
    *("moat0-384", "moat1-384", "moat2-384", "moat3-384"),
    *("moat1-512", "moat2-512", "moat3-512", "moat4-512"),
    *("moat0-22k", "moat1-22k", "moat2-22k", "moat3-22k", "moat4-22k"),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        widths, blocks = ((8, 16), (2, 2)) if smoke else ((24, 48), (2, 3))
        options: dict[str, Any] = dict(
            strides=(1, 2), attention=(False, True), head_dim=8, tables=(8, 4), windows=(8, 4)
        )
        model = moat(widths[0], widths, blocks, classes=10, drop_path=0.0, stem_stride=1, **options)
        return digits(model, smoke=smoke)
    size, _, what = variant.partition("-")
    stem, dims, depths, drop_path = SIZES[size]
    if what == "22k":
        model = moat(stem, dims, depths, classes=21_841, drop_path=drop_path)
        return imagenet(model, dataset="22k", epochs=90, batch_size=4096, clip=1.0, ema=None)
    side = int(what or 224)
    windows = (side // 4, side // 8, side // 16, side // 32)
    model = moat(stem, dims, depths, classes=1000, drop_path=drop_path, windows=windows)
    if size.startswith("moat") and what:
        finer: dict[str, Any] = dict(epochs=30, lr=5e-5, weight_decay=1e-8, warmup="0%", clip=1.0, ema=None)
        return imagenet(model, size=side, **finer)
    return imagenet(model, size=side, clip=1.0)


def moat(
    stem: int,
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    *,
    classes: int,
    drop_path: float,
    stem_stride: int = 2,
    strides: tuple[int, ...] = (2, 2, 2, 2),
    attention: tuple[bool, ...] = (False, False, True, True),
    windows: tuple[int, ...] = (56, 28, 14, 7),
    tables: tuple[int, ...] = (56, 28, 14, 7),
    head_dim: int = 32,
) -> dict:
    """The model section of a MOAT.

    Args:
      stem: channels of the stem.
      dims: channels a stage.
      depths: blocks a stage.
      classes: outputs.
      drop_path: stochastic depth of the last block.
      stem_stride: of the first convolution.
      strides: of the first block a stage.
      attention: which stages have attention; the others have squeeze and excitation.
      windows: side of the attention's window a stage; the whole map makes it global.
      tables: side of the window that a stage's table of positions is made for.
      head_dim: channels of a head.
    """

    def block(dim: int, stride: int, attends: bool, window: int, table: int) -> dict:
        conv = dict(
            dim=dim, stride=stride, ratio_of="output", pre_norm="batch", outer_norm=None, padding="same"
        )
        if not attends:
            squeeze = dict(hidden=dim // 4, activation="silu")
            return dict(kind="mbconv", squeeze=squeeze, epsilon=1e-3, **conv)
        bias = dict(kind="interpolated_table", side=table)
        mixer = dict(kind="shifted_window", heads=dim // head_dim, window=window, bias=bias)
        return dict(kind="moat", conv=conv | dict(epsilon=1e-3), mixer=mixer)

    layer = dict(features=stem, padding="same", use_bias=True, epsilon=1e-3)
    rows = stages(depths, dims, stride=strides, attends=attention, window=windows, table=tables)
    kinds = [{key: row.pop(key) for key in ("attends", "window", "table")} for row in rows]
    return dict(
        kind="pyramid",
        stem=dict(
            kind="convs",
            layers=(layer | dict(stride=stem_stride, activation="gelu"), layer | dict(norm=None)),
        ),
        stages=tuple(
            dict(
                depth=row["depth"],
                dim=row["dim"],
                first=block(row["dim"], row["stride"], **kind),
                blocks=(block(row["dim"], 1, **kind),),
            )
            for row, kind in zip(rows, kinds, strict=True)
        ),
        classes=classes,
        head=dict(kind="linear", place="after_pool", epsilon=1e-5),
        drop_path=drop_path,
    )
