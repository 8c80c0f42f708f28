"""Autoencoders whose latents a diffusion model learns (Rombach et al. 2022).

    python -m experiments.train --config=configs/diffusion/vae.py:VARIANT --workdir=runs/vae

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    8 x 8 pixels to 4 x 4 places of 4 channels.
`scenes`
    64 x 64 pixels to 8 x 8 places of 4 channels.
`sd`
    The network of Stable Diffusion, 83,653,863 parameters: 256 x 256 pixels to 32 x 32 places of 4 channels,
    on ImageNet. Not run here. Its published weights were trained on OpenImages with a perceptual and an
    adversarial term beside; bring them in with
    `python -m experiments.convert --from=diffusers:AutoencoderKL --weights=... --out=...`.

The evaluation reports `latent_std`: the model's `scale` is one over it.
"""

from ml_collections import ConfigDict

# What the variants are made of: widths of the stages, groups of the norms, channels of a picture.
SIZES = {
    "smoke": dict(widths=(8, 8), groups=4, channels=1, blocks=1),
    "digits": dict(widths=(32, 64), groups=8, channels=1, blocks=1),
    "scenes": dict(widths=(16, 32, 64, 64), groups=8, channels=3, blocks=1),
    "sd": dict(widths=(128, 256, 512, 512), groups=32, channels=3, blocks=2),
}
VARIANTS = tuple(SIZES)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    model = dict(kind="autoencoder", latent=4, **SIZES[variant])
    config = imagenet() if variant == "sd" else embedded("scenes" if variant == "scenes" else "digits")
    config.model = ConfigDict(model)
    config.task = ConfigDict(dict(kind="autoencoding"))
    if variant == "smoke":
        config.train.update(dict(steps="20 steps", log_every="5 steps", checkpoint_every="10 steps"))
        config.data.batch_size = 16
    return config


def embedded(name: str) -> ConfigDict:
    """A small data set, its pictures in [-1, 1]."""

    def data(split: str, rows: int) -> dict:
        source = dict(kind="tfds", name=name, split=split)
        return dict(
            source=source, transforms=(dict(kind="to_float"),), batch_size=rows, threads=1, cache=True
        )

    return ConfigDict(
        dict(
            data=data("train", 64 if name == "digits" else 16),
            optimizer=dict(
                kind="adamw", lr=2e-3, clip=1.0, schedule=dict(kind="cosine", warmup="5%", end=0.01)
            ),
            train=dict(
                steps="40 epochs" if name == "digits" else "15 epochs",
                log_every="50 steps",
                checkpoint_every="20%",
                ema=dict(decay=0.99),
            ),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=data("test", 120 if name == "digits" else 64),
                    every="50%",
                    ema=True,
                )
            ),
        )
    )


def imagenet() -> ConfigDict:
    """Crops of 256 pixels, AdamW at 4.5e-6 an example of the batch as Rombach et al. scale it, EMA 0.9999."""
    source = dict(kind="tfds", name="imagenet2012")
    crop = (
        dict(kind="random_resized_crop", size=256),
        dict(kind="random_flip"),
        dict(kind="to_float"),
    )
    centre = (dict(kind="center_crop", size=256, crop=1.0), dict(kind="to_float"))
    return ConfigDict(
        dict(
            data=dict(
                source=source | dict(split="train"),
                transforms=crop,
                batch_size=64,
                threads=8,
                expected=dict(
                    examples=1_281_167,
                    fields=dict(image=dict(shape=(None, None, 3), dtype="uint8"), label=dict(dtype="int64")),
                ),
            ),
            optimizer=dict(
                kind="adamw", lr=64 * 4.5e-6, weight_decay=0.0, clip=1.0, schedule=dict(kind="constant")
            ),
            train=dict(
                steps="250k steps",
                precision=dict(compute="bfloat16"),
                log_every="100 steps",
                checkpoint_every="10k steps",
                ema=dict(decay=0.9999, warmup=False),
            ),
            evaluators=dict(
                validation=dict(
                    kind="metrics",
                    data=dict(
                        source=source | dict(split="validation"), transforms=centre, batch_size=64, threads=8
                    ),
                    every="10k steps",
                    ema=True,
                )
            ),
        )
    )
