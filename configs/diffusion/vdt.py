"""Video diffusion transformers: VDT (Lu et al. 2024), with attention along time and unified mask modelling.

python -m experiments.train --config=configs/diffusion/vdt.py:VARIANT --workdir=runs/vdt
python -m experiments.sample --workdir=runs/vdt --out=scenes.gif --given=forward:given=2
"""

from typing import Any

from ml_collections import ConfigDict

#            dim, depth, heads, patch, frames
SIZES = {
    "smoke": (32, 2, 2, 4, 4),
    "scenes": (128, 4, 4, 2, 8),
    "s2": (384, 12, 6, 2, 16),
    "l2": (1152, 28, 16, 2, 16),
}

VARIANTS = tuple(SIZES)


def get_config(variant: str = "scenes") -> ConfigDict:
    """Returns the experiment of one variant."""
    small = variant in ("smoke", "scenes")
    config = scenes(smoke=variant == "smoke") if small else latents()
    config.model = model(variant)
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
            masks=masks(given=2, every=4, ends=1) if small else masks(given=8, every=4, ends=3),
        )
    )
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
                batch_size=8 if smoke else 32,
                threads=1,
                cache=True,
            ),
            optimizer=dict(
                kind="adamw", lr=1e-3, clip=1.0, schedule=dict(kind="cosine", warmup="2%", end=0.01)
            ),
            train=dict(
                steps="20 steps" if smoke else "2000 steps",
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


def latents() -> ConfigDict:
    """DiT's recipe, on whose code the published one is built: AdamW at a constant 1e-4, EMA 0.9999."""
    source = dict(kind="tfds", name="ucf101_latents")
    return ConfigDict(
        dict(
            data=dict(
                source=source | dict(split="train"),
                batch_size=256,
                threads=8,
                expected=dict(examples=9537, fields=dict(video=dict(shape=(16, 32, 32, 4)))),
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
