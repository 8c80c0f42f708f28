"""LinGen (Wang et al. 2025): text to video at a cost that is linear in pixels, with MATE blocks and a flow.

    python -m experiments.train --config=configs/diffusion/lingen.py:VARIANT --workdir=runs/lingen

`smoke`
    20 steps of a toy on clips of moving scenes, whose text names the kinds of shapes in them: seconds.
`scenes`
    1.1M parameters on clips of 8 frames of 16 x 16 pixels, 300 steps. A held-out loss of 0.280,
    from 0.378 after 120 steps; 16 minutes of a busy core.
`4b`
    LinGen-4B on the latents of videos of 68 s at 16 frames a second and 512 pixels, the last stage of the
    paper's training: 1088 frames, the most in its table 1. Not run here.

What was read of the paper (abstract, captions and tables; its text and code could not be had) fixes the
MATE block, the four scan orders, shifted windows, the length and the size of videos, 50 steps of sampling,
and that training goes from text to image at 256 pixels over text to video at 256 to longer and longer videos
of 512, images among the videos, and ends on the best videos alone. It does not give widths, depth, window,
loss, text encoder, autoencoder, optimiser, steps or batches. Those of `4b` are chosen here: a width and a
depth that make 4.0 billion parameters, a flow, an autoencoder that shortens height and width by 8 and time by
4 into 16 channels (with 4 the paper's ratio to DiT comes out best, see
`tests/measure/analytic/test_mixing.py`), text features of T5-XXL's width, and DiT's optimiser.
"""

from typing import Any

from ml_collections import ConfigDict

#          dim, depth, patch, heads, state, head, chunk, window
SIZES: dict[str, tuple[int, int, int, int, int, int, int, tuple[int, int, int]]] = {
    "smoke": (32, 4, 4, 2, 8, 16, 64, (2, 2, 2)),
    "scenes": (96, 4, 4, 3, 16, 32, 64, (4, 2, 2)),
    "4b": (2432, 24, 2, 38, 128, 64, 256, (8, 4, 4)),
}

VARIANTS = tuple(SIZES)


def get_config(variant: str = "scenes") -> ConfigDict:
    """Returns the experiment of one variant."""
    config = latents() if variant == "4b" else scenes(smoke=variant == "smoke")
    config.model = model(variant)
    config.task = ConfigDict(
        dict(
            kind="diffusion",
            process=dict(kind="rectified_flow"),
            label_dropout=0.1,
            content="video",
            condition="text",
        )
    )
    return config


def scenes(smoke: bool) -> ConfigDict:
    """The embedded scenes as clips in [-1, 1]; the pixels are their own latents."""
    source = dict(kind="tfds", name="scenes", fields=("video", "classes"))
    transforms = (
        dict(kind="clip", frames=4 if smoke else 8, size=16),
        dict(kind="one_hot_text", source="classes", words=4, no_word=0),
    )
    return ConfigDict(
        dict(
            data=dict(
                source=source | dict(split="train"),
                transforms=transforms,
                batch_size=8 if smoke else 16,
                threads=1,
                cache=True,
            ),
            optimizer=dict(
                kind="adamw", lr=1e-3, clip=1.0, schedule=dict(kind="cosine", warmup="2%", end=0.01)
            ),
            train=dict(
                steps="20 steps" if smoke else "300 steps",
                log_every="5 steps" if smoke else "50 steps",
                checkpoint_every="10 steps" if smoke else "20%",
                ema=dict(decay=0.999),
            ),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=dict(
                        source=source | dict(split="test"), transforms=transforms, batch_size=64, cache=True
                    ),
                    every="10 steps" if smoke else "20%",
                    ema=True,
                )
            ),
        )
    )


def latents() -> ConfigDict:
    """Latents and text features of videos of 68 s, 512 x 512 pixels, made before."""
    source = dict(kind="tfds", name="video_latents")
    fields: dict[str, Any] = dict(video=dict(shape=(272, 64, 64, 16)), text=dict(shape=(256, 4096)))
    return ConfigDict(
        dict(
            data=dict(
                source=source | dict(split="train"),
                batch_size=256,
                threads=8,
                expected=dict(examples=1_000_000, fields=fields),
            ),
            optimizer=dict(kind="adamw", lr=1e-4, weight_decay=0.0, schedule=dict(kind="constant")),
            train=dict(
                steps="10k steps",
                precision=dict(compute="bfloat16"),
                log_every="10 steps",
                checkpoint_every="1k steps",
                ema=dict(decay=0.9999, warmup=False),
            ),
            evaluators=dict(
                validation=dict(
                    kind="metrics",
                    data=dict(source=source | dict(split="validation"), batch_size=256, threads=8),
                    every="1k steps",
                    ema=True,
                )
            ),
        )
    )


def model(size: str) -> ConfigDict:
    """The transformer of one size."""
    dim, depth, patch, heads, state, head, chunk, window = SIZES[size]
    return ConfigDict(
        dict(
            kind="lingen",
            patch=patch,
            dim=dim,
            depth=depth,
            remat="full" if size == "4b" else "none",
            block=dict(
                kind="video_text",
                heads=heads,
                mixer=dict(
                    kind="mate",
                    local=dict(kind="shifted_volume", heads=heads, window=window),
                    scan=dict(kind="bidirectional_mamba2", state=state, head=head, chunk=chunk),
                    review=(2, 2, 2),
                ),
                ffn=dict(kind="mlp", ratio=4.0, activation="gelu_tanh"),
            ),
        )
    )
