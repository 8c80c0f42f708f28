"""PoolFormer (Yu et al. 2022, arXiv:2111.11418): a transformer's block around average pooling.

    python -m experiments.train --config=configs/vision/poolformer.py:VARIANT --workdir=runs/poolformer

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    30 epochs of 1,437 digits of 8 x 8 pixels: a minute and a half on 2 CPU cores, and an accuracy of 99.2%
    on the 360 held-out digits; 80 epochs reached 99.7%.
`s12`, `s24`, `s36`, `m36`, `m48`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the paper reports 77.2%, 80.3%, 81.4%, 82.1% and
    82.5% top-1.
`s12-identity`, `s12-random`, `s12-depthwise`, `s12-pool5` to `s12-pool9`
    S12 with another mixer; `random` never trains its matrices. The paper reports 74.3%, 75.8%, 78.1%, 77.2%,
    77.1% and 76.8%.
`s12-layer`, `s12-batch`, `s12-relu`, `s12-silu`
    S12 with another norm or activation: 76.5%, 76.4%, 76.4% and 77.2% in the paper.
`s12-attention1`, `s12-attention2`, `s12-fc1`, `s12-fc2`
    S12 with attention or a matrix over places in its last one or two stages: 78.3%, 81.0%, 77.5% and 77.9%
    in the paper.
"""

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet, stages

# Blocks a stage, channels a stage, initial layer scale, stochastic depth.
SMALL, MEDIUM = (64, 128, 320, 512), (96, 192, 384, 768)
SIZES = {
    "s12": ((2, 2, 6, 2), SMALL, 1e-5, 0.1),
    "s24": ((4, 4, 12, 4), SMALL, 1e-5, 0.1),
    "s36": ((6, 6, 18, 6), SMALL, 1e-6, 0.2),
    "m36": ((6, 6, 18, 6), MEDIUM, 1e-6, 0.3),
    "m48": ((8, 8, 24, 8), MEDIUM, 1e-6, 0.4),
}
POOLING, ATTENTION = dict(kind="pooling"), dict(kind="attention", qkv_bias=False)
FC, DEPTHWISE = dict(kind="spatial_fc"), dict(kind="depthwise", kernel=3)
# Table 5 of the paper: what changes in S12.
ABLATIONS: dict[str, dict] = {
    "identity": dict(mixers=(dict(kind="identity"),) * 4),
    "random": dict(mixers=(dict(kind="random_matrix"),) * 4),
    "depthwise": dict(mixers=(DEPTHWISE,) * 4),
    **{f"pool{size}": dict(mixers=(POOLING | dict(size=size),) * 4) for size in (5, 7, 9)},
    "layer": dict(norm="layer"),
    "batch": dict(norm="batch"),
    "relu": dict(activation="relu"),
    "silu": dict(activation="silu"),
    "attention1": dict(mixers=(POOLING, POOLING, POOLING, ATTENTION | dict(heads=16))),
    "attention2": dict(mixers=(POOLING, POOLING, ATTENTION | dict(heads=10), ATTENTION | dict(heads=16))),
    "fc1": dict(mixers=(POOLING, POOLING, POOLING, FC)),
    "fc2": dict(mixers=(POOLING, POOLING, FC, FC)),
}
VARIANTS = ("smoke", "digits", *SIZES, *(f"s12-{ablation}" for ablation in ABLATIONS))


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    size, _, ablation = variant.partition("-")
    if size in SIZES:
        depths, dims, layer_scale, drop_path = SIZES[size]
        changes = dict(ABLATIONS[ablation]) if ablation else {}
        changes |= dict(layer_scale=layer_scale, drop_path=drop_path)
        return imagenet(metaformer(depths, dims, classes=1000, **changes), batch_size=4096, lr=4e-3, ema=None)
    stem = dict(kernel=3, stride=1)
    if variant == "smoke":
        return digits(metaformer((1, 2), (16, 32), classes=10, stem=stem), smoke=True)
    return digits(
        metaformer((2, 4), (48, 96), classes=10, stem=stem, unroll=2), smoke=False, steps="30 epochs"
    )


def metaformer(
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    *,
    classes: int,
    layer_scale: float = 1e-5,
    drop_path: float = 0.0,
    mixers: tuple[dict, ...] = (),
    norm: str = "group",
    activation: str = "gelu",
    stem: dict | None = None,
    **more: object,
) -> dict:
    """The model section of a MetaFormer.

    Args:
      depths: blocks a stage.
      dims: channels a stage.
      classes: outputs.
      layer_scale: its initial value.
      drop_path: stochastic depth of the last block.
      mixers: one a stage; none is pooling everywhere.
      norm: a kind in `effjax.layers.norms`.
      activation: a name in `effjax.ffn.activations`.
      stem: kernel, stride and padding of the first convolution.
      **more: fields of the pyramid.
    """
    mixers = mixers or (POOLING,) * len(depths)
    kernel: dict = dict(norm=None, use_bias=True)
    stem = stem or dict(kernel=7, stride=4, padding=2)
    halve = dict(kind="convs", layers=(kernel | dict(kernel=3, stride=2),))

    def block(mixer: dict) -> dict:
        ffn = dict(kind="mlp", activation=activation)
        return dict(kind="metaformer", mixer=mixer, ffn=ffn, norm=norm, epsilon=1e-5, layer_scale=layer_scale)

    return dict(
        kind="pyramid",
        stem=dict(kind="convs", layers=(kernel | stem,)),
        stages=tuple(
            stage | dict(blocks=(block(mixer),)) | (dict(downsample=halve) if i else {})
            for i, (stage, mixer) in enumerate(zip(stages(depths, dims), mixers, strict=True))
        ),
        classes=classes,
        head=dict(kind="linear", norm=norm, epsilon=1e-5),
        drop_path=drop_path,
        **more,
    )
