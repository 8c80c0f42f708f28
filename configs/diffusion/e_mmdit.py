"""Text to image on few tokens: E-MMDiT, Shen et al. 2025, as Nitro-E publishes it.

    python -m experiments.train --config=configs/diffusion/e_mmdit.py:VARIANT --workdir=runs/e_mmdit

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    8 x 8 digits told by one-word captions: 64 tokens, 20 in the middle, 0.64M parameters, 1000 steps: 248
    seconds of CPU time, a held-out loss of 0.388. Of 300 samples (Euler, 25 steps) a support vector machine
    that knows 96.4% of the held-out digits finds 96.3% in their class without guidance, 100% at scale 2.
`512`, `1024`
    The published network of 302M parameters on 16 x 16 x 32 and 32 x 32 x 32 latents of DC-AE f32c32, times
    0.41407, and 128 tokens of Llama 3.2 1B's last hidden layer, both computed before: a TFDS data set
    `text_image_latents` (fields `image`, and `text` [128, 2048], float32). The recipe is the published first
    stage, 100k steps of batch 2048 at 3e-4, without its alignment with DINOv2; a second stage of 50k steps
    trains on at 1e-4 with a moving average. At 1024 pixels attention is full. Not run here; the paper reports
    a GenEval of 0.66 at 512 pixels.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.diffusion.dit import digits, samples

VARIANTS = ("smoke", "digits", "512", "1024")

# Regions of a layer, and how many tokens of a row stay together in one.
PUBLISHED = ((1, 1), (4, 1), (4, 4))
TOY = ((1, 1), (2, 1), (2, 2))
FULL = ((1, 1),)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the experiment of one variant."""
    if variant in ("smoke", "digits"):
        smoke = variant == "smoke"
        config = digits(smoke)
        if not smoke:
            config.evaluators.samples = samples(smoke=False, flow=True)
        # A caption is one word; cut into regions it takes as many tokens as these ask for.
        word = dict(kind="one_hot_text", words=10, length=4 if smoke else 1)
        for data in (config.data, *(evaluator.data for evaluator in config.evaluators.values())):
            data.transforms = (*data.transforms, word)
        config.model = e_mmdit(
            32 if smoke else 64,
            2,
            depths=(1, 1, 1) if smoke else (1, 4, 1),
            patterns=TOY,
            text_in_regions="split" if smoke else "shared",
        )
        if not smoke:
            config.train.steps = "1000 steps"
            config.optimizer.lr = 2e-3
        density = "uniform"
    else:
        config = published(side=int(variant) // 32)
        config.model = e_mmdit(768, 24, patterns=PUBLISHED if variant == "512" else FULL)
        density = "logit_normal"
    config.task = ConfigDict(
        dict(
            kind="diffusion",
            process=dict(kind="rectified_flow", density=density),
            label_dropout=0.1,
            condition="text",
        )
    )
    return config


def published(side: int) -> ConfigDict:
    """The first stage of the published recipe on latents of one size."""
    source = dict(kind="tfds", name="text_image_latents")
    fields = dict(image=dict(shape=(side, side, 32)), text=dict(shape=(128, 2048)))
    return ConfigDict(
        dict(
            data=dict(
                source=source | dict(split="train"),
                batch_size=2048,
                threads=16,
                expected=dict(examples=25_000_000, fields=fields),
            ),
            optimizer=dict(
                kind="adamw",
                lr=3e-4,
                weight_decay=0.03,
                eps=1e-10,
                clip=0.5,
                decay=((".*", 1.0),),
                schedule=dict(kind="constant", warmup="500 steps"),
            ),
            train=dict(
                steps="100k steps",
                precision=dict(compute="bfloat16"),
                log_every="100 steps",
                checkpoint_every="10k steps",
            ),
            evaluators=dict(
                validation=dict(
                    kind="metrics",
                    data=dict(source=source | dict(split="validation"), batch_size=2048, threads=16),
                    every="10k steps",
                )
            ),
        )
    )


def e_mmdit(dim: int, heads: int, **fields: Any) -> ConfigDict:
    """The network of one width."""
    return ConfigDict(dict(kind="e_mmdit", patch=1, dim=dim, heads=heads, **fields))
