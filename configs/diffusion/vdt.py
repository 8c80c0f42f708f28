"""Video diffusion transformers: VDT (Lu et al. 2024), with attention along time and unified mask modelling.

    python -m experiments.train --config=configs/diffusion/vdt.py:VARIANT --workdir=runs/vdt
    python -m experiments.sample --workdir=runs/vdt --out=next.gif --given=forward:given=2 --steps=4

`smoke`
    20 steps of a toy on four frames of scenes: seconds.
`scenes`
    1.61M parameters on 1,024 clips of eight frames of 16 x 16 pixels, all kinds of masks, v prediction, 900
    steps: eight and a half minutes of CPU time on busy cores, a held-out loss of 0.118. From two frames of 64
    held-out clips the six others are predicted with a mean squared error of 0.111 in one DDIM step, which is
    the mean of what may come, and 0.127 in four; copying the last given frame has 0.147. A draw of twenty
    steps has 0.155, as a sample varies where a mean does not: the error of a perfect draw is twice that of
    the mean. With `--config.task.process.prediction=x0` it is 0.104, 0.128 and 0.163.
`s2`, `l2`
    The paper's models on clips of 16 frames of 32 x 32 x 4 latents of Sky Time-lapse, which lie on disk as a
    TFDS data set `sky_latents` (field `video` [16, 32, 32, 4] float32), with all kinds of masks, for which
    weights were published. With `-ucf101` behind the name unconditional on `ucf101_latents`, with
    `-cityscapes` prediction from eight frames on `cityscapes_latents` of 16 x 16 x 4. Not run here. Of the
    recipe no code was published; DiT's stands in.
"""

from typing import Any

from ml_collections import ConfigDict

#            dim, depth, heads, patch, frames
SIZES = {
    "smoke": (32, 2, 2, 4, 4),
    "scenes": (128, 4, 4, 4, 8),
    "s2": (384, 12, 6, 2, 16),
    "l2": (1152, 28, 16, 2, 16),
}

# data set, side of its latents, and which parts are given
DATA = {
    "": ("sky_latents", 32, "all"),
    "ucf101": ("ucf101_latents", 32, "none"),
    "cityscapes": ("cityscapes_latents", 16, "forward"),
}

VARIANTS = (
    "smoke",
    "scenes",
    *(size + ending for size in ("s2", "l2") for ending in ("", "-ucf101", "-cityscapes")),
)


def get_config(variant: str = "scenes") -> ConfigDict:
    """Returns the experiment of one variant, with a data set behind its name other than Sky Time-lapse."""
    size, _, name = variant.partition("-")
    small = size in ("smoke", "scenes")
    data, side, given = DATA[name]
    config = scenes(smoke=size == "smoke") if small else latents(data, side)
    config.model = model(size)
    config.task = ConfigDict(
        dict(
            kind="diffusion",
            process=dict(
                kind="ddpm",
                schedule="linear",
                steps=1000,
                prediction="v" if small else "epsilon",
                sigma="small" if small else "learned",
            ),
            label_dropout=0.0,
            content="video",
            condition=None,
        )
    )
    if given == "all":
        config.task.masks = masks(given=2, every=4, ends=1) if small else masks(given=8, every=4, ends=3)
    elif given == "forward":
        config.task.masks = (dict(kind="forward", given=8),)
    return config


def masks(given: int, every: int, ends: int) -> tuple[dict[str, Any], ...]:
    """The tasks that one model learns, as often as in the published code."""
    frames = dict(weight=0.8 / 6)
    return (
        dict(kind="unconditional", **frames),
        dict(kind="forward", given=given, **frames),
        dict(kind="backward", given=given, **frames),
        dict(kind="interpolation", every=every, **frames),
        dict(kind="image_to_video", **frames),
        dict(kind="random_frames", probability=0.2, **frames),
        dict(kind="completion", ends=ends, weight=0.2),
    )


def scenes(smoke: bool) -> ConfigDict:
    """The embedded scenes as clips in [-1, 1]; the pixels are their own latents."""
    source = dict(kind="tfds", name="scenes", fields=("video",))
    clip = dict(kind="clip", frames=4 if smoke else 8, size=16)
    flip = dict(kind="flip_video", horizontal=0.5, backwards=0.5)
    return ConfigDict(
        dict(
            data=dict(
                source=source | dict(split="train"),
                transforms=(clip, flip),
                batch_size=8 if smoke else 16,
                threads=1,
                cache=True,
            ),
            optimizer=dict(
                kind="adamw", lr=1e-3, clip=1.0, schedule=dict(kind="cosine", warmup="2%", end=0.01)
            ),
            train=dict(
                steps="20 steps" if smoke else "900 steps",
                log_every="5 steps" if smoke else "50 steps",
                checkpoint_every="10 steps" if smoke else "20%",
                ema=dict(decay=0.999),
            ),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=dict(
                        source=source | dict(split="test"), transforms=(clip,), batch_size=64, cache=True
                    ),
                    every="10 steps" if smoke else "20%",
                    ema=True,
                )
            ),
        )
    )


def latents(name: str, side: int) -> ConfigDict:
    """DiT's recipe, on whose code the published one is built: AdamW at a constant 1e-4, EMA 0.9999."""
    source = dict(kind="tfds", name=name)
    return ConfigDict(
        dict(
            data=dict(
                source=source | dict(split="train"),
                batch_size=256,
                threads=8,
                expected=dict(fields=dict(video=dict(shape=(16, side, side, 4)))),
            ),
            optimizer=dict(kind="adamw", lr=1e-4, weight_decay=0.0, schedule=dict(kind="constant")),
            train=dict(
                steps="400k steps",
                precision=dict(compute="bfloat16"),
                log_every="100 steps",
                checkpoint_every="10k steps",
                ema=dict(decay=0.9999, warmup=False),
            ),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=dict(source=source | dict(split="test"), batch_size=256, threads=8),
                    every="10k steps",
                    ema=True,
                )
            ),
        )
    )


def model(size: str) -> ConfigDict:
    """The spatio-temporal transformer of one size."""
    dim, depth, heads, patch, frames = SIZES[size]
    small = size in ("smoke", "scenes")
    return ConfigDict(
        dict(
            kind="vdt",
            patch=patch,
            dim=dim,
            depth=depth,
            frames=frames,
            learned_sigma=not small,
            block=dict(
                kind="spatio_temporal",
                temporal=dict(kind="attention", heads=heads),
                mixer=dict(kind="attention", heads=heads),
                ffn=dict(kind="mlp", ratio=4.0, activation="gelu_tanh"),
            ),
        )
    )
