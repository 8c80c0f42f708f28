"""LowFormer (Nottebaum et al. 2025, arXiv:2409.03460): convolutions that hardware likes, small attention.

    python -m experiments.train --config=configs/vision/lowformer.py:VARIANT --workdir=runs/lowformer

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels: two and a half minutes on 2 CPU cores, and an accuracy of
    99.4% on the 360 held-out digits.
`b0`, `b1`, `b15`, `b2`, `b3`
    ImageNet-1k for 300 epochs, with the learning rates of the authors' configs for 8 GPUs. Not run here; the
    paper reports 78.4%, 79.9%, 81.2%, 81.6% and 83.6% top-1 at 224 pixels. The authors draw pictures of 128
    to 224 pixels in training and take a binary cross-entropy; here all have 224 and the loss is softmax.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

# Channels and blocks of the stem and four stages, widths of the head, expansion of strided blocks, batch
# size, learning rate, stochastic depth.
SIZES = {
    "b0": ((16, 32, 64, 128, 256), (0, 1, 1, 3, 4), (1536, 1600), 4.0, 1360, 2.66e-3, 0.05),
    "b1": ((16, 32, 64, 128, 256), (0, 1, 1, 5, 5), (1536, 1600), 6.0, 1024, 2e-3, 0.05),
    "b15": ((20, 40, 80, 160, 320), (0, 1, 1, 6, 6), (2304, 2560), 6.0, 1360, 1.33e-3, 0.1),
    "b2": ((24, 48, 96, 192, 384), (0, 1, 1, 6, 6), (2304, 2560), 6.0, 1360, 1e-3, 0.1),
    "b3": ((32, 64, 128, 256, 512), (1, 2, 3, 6, 6), (1536, 1600), 6.0, 2400, 3e-3, 0.1),
}
VARIANTS = ("smoke", "digits", *SIZES)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        widths, blocks = ((8, 8, 12, 16), (0, 1, 1, 2)) if smoke else ((16, 24, 48, 64), (0, 1, 2, 2))
        model = lowformer(
            widths,
            blocks,
            head=(2 * widths[-1],) * 2,
            down_ratio=4.0,
            classes=10,
            drop_path=0.0,
            stem_stride=1,
        )
        return digits(model, smoke=smoke)
    dims, depths, head, down_ratio, batch_size, lr, drop_path = SIZES[variant]
    model = lowformer(dims, depths, head=head, down_ratio=down_ratio, classes=1000, drop_path=drop_path)
    return imagenet(
        model,
        batch_size=batch_size,
        lr=lr,
        weight_decay=0.1,
        clip=2.0,
        warmup="20 epochs",
        ema=0.9998,
    )


def lowformer(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    *,
    head: tuple[int, int],
    down_ratio: float,
    classes: int,
    drop_path: float,
    stem_stride: int = 2,
) -> dict:
    """The model section of a LowFormer: the last two stages attend, the last of them without a stride.

    Args:
      dims: channels of the stem and of every stage.
      depths: blocks there; those of the last two stages without the strided ones before them.
      head: widths of the head.
      down_ratio: expansion of the strided blocks.
      classes: outputs.
      drop_path: stochastic depth of the last block.
      stem_stride: of the first convolution.
    """
    stages = []
    if depths[0]:
        stages.append(dict(depth=depths[0], dim=dims[0], blocks=(conv(ratio=4.0),)))
    for i, (dim, depth) in enumerate(zip(dims[1:], depths[1:], strict=True)):
        left = len(dims) - 2 - i  # stages after this one
        first = conv(dim=dim, stride=2, ratio=down_ratio, shortcut=False)
        attends = left < 2
        block = attention(dim, stride=2 if left else 1) if attends else conv()
        stages.append(dict(depth=depth + attends, dim=dim, first=first, blocks=(block,)))
    stem = dict(kind="convs", layers=(dict(features=dims[0], stride=stem_stride, activation="hard_swish"),))
    return dict(
        kind="pyramid",
        stem=stem,
        stages=tuple(stages),
        classes=classes,
        head=dict(kind="wide", widths=head),
        drop_path=drop_path,
    )


def conv(fused: bool = True, **more: object) -> dict:
    """A mobile convolution, fused wherever the paper's analysis found that faster."""
    return dict(kind="mbconv", fused=fused, activation="hard_swish") | more


def attention(dim: int, stride: int) -> dict:
    """A block with attention: heads of about 30 channels on half of the width, as the code makes them."""
    heads = max(1, int(dim * 0.5) // 30)
    local = conv(fused=dim < 256, inner_bias=True)
    if dim >= 256:
        local |= dict(inner_norm=None)
    local.pop("kind")
    return dict(
        kind="lowformer",
        mixer=dict(
            heads=heads, head_dim=int(dim // heads * 0.5), stride=stride, kernel=5 if stride > 1 else 3
        ),
        ffn=dict(ratio=4.0),
        local=local,
    )
