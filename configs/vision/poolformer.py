"""PoolFormer (Yu et al. 2022, arXiv:2111.11418): a transformer's block around average pooling.

    python -m experiments.train --config=configs/vision/poolformer.py:VARIANT --workdir=runs/poolformer

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    80 epochs of 1,437 digits of 8 x 8 pixels.
`s12`, `s24`, `s36`, `m36`, `m48`
    ImageNet-1k at 224 pixels for 300 epochs. Not run here; the paper reports 77.2%, 80.3%, 81.4%, 82.1% and
    82.5% top-1.
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
VARIANTS = ("smoke", "digits", *SIZES)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in SIZES:
        depths, dims, layer_scale, drop_path = SIZES[variant]
        model = metaformer(depths, dims, layer_scale=layer_scale, classes=1000, drop_path=drop_path)
        return imagenet(model, ema=None)
    stem = dict(kernel=3, stride=1)
    if variant == "smoke":
        return digits(metaformer((1, 2), (16, 32), classes=10, stem=stem), smoke=True)
    return digits(metaformer((2, 4), (48, 96), classes=10, stem=stem, unroll=2), smoke=False)


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
    mixers = mixers or (dict(kind="pooling"),) * len(depths)
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
