"""Self-slimmed vision transformers: SiT, Zong et al. 2022.

    python -m experiments.train --config=configs/vision/sit.py:VARIANT --workdir=runs/sit

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    0.21M parameters, four blocks on 16, 8, 4 and 2 tokens, learned from the labels alone in 80 epochs: 97.5%
    of the 360 held-out digits, two minutes on 2 busy CPU cores.
`digits-teacher`, `digits-frd`
    The same without slimming, and the slimmed network that starts from its weights and is taught by it:
    `--config=configs/vision/sit.py:digits-frd --config.task.weights=runs/teacher
    --config.train.start=runs/teacher`. 98.9%, and 99.2% after 40 more epochs.
`t`, `xs`, `s`, `m`, `l`
    ImageNet at 224 pixels (`l`: 288) for 125 epochs from the weights of LV-ViT, which also teaches, named as
    above by `--config.task.weights` and `--config.train.start`. Not run here; the published code reports
    80.1%, 81.2%, 83.1%, 84.2% and 85.6% top-1.
`lvvit-t`, `lvvit-s`, `lvvit-m`, `lvvit-l`
    These teachers, with DeiT's recipe: theirs was token labelling, Jiang et al. 2021, for which the scores of
    another network at every patch are needed.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet

VARIANTS = ("smoke", "digits", "digits-teacher", "digits-frd", "t", "xs", "s", "m", "l",
            "lvvit-t", "lvvit-s", "lvvit-m", "lvvit-l")  # fmt: skip

# The hosts; the large one has six convolutions in its stem.
HOSTS: dict[str, dict[str, Any]] = {
    "lvvit-t": dict(dim=320, depth=14, heads=5),
    "lvvit-s": dict(dim=384, depth=16, heads=6),
    "lvvit-m": dict(dim=512, depth=20, heads=8),
    "lvvit-l": dict(dim=768, depth=24, heads=12, deep_stem=True, skip=3.0),
}

# The host, and before which layers half of the tokens go, three times.
SIZES = {
    "t": ("lvvit-t", (1, 2, 3)),
    "xs": ("lvvit-s", (1, 2, 3)),
    "s": ("lvvit-s", (9, 12, 14)),
    "m": ("lvvit-m", (10, 14, 17)),
    "l": ("lvvit-l", (10, 14, 17)),
}


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in HOSTS:
        return imagenet(lvvit(**HOSTS[variant], drop_path=0.1), size=288 if variant == "lvvit-l" else 224)
    if variant in SIZES:
        return published(variant)
    smoke = variant == "smoke"
    size = dict(dim=16, depth=2, heads=2) if smoke else dict(dim=64, depth=4, heads=4)
    model = slimmable(**size)
    slim = model | slimming(16, (1,) if smoke else (1, 2, 3))
    config = digits(model if variant == "digits-teacher" else slim, smoke=smoke)
    if variant == "digits-frd":
        config.task = ConfigDict(distillation(model, smoothing=0.1))
        config.train.fresh = ("reduce_.*",)
        config.optimizer.lr = 1e-3
        config.train.steps = "40 epochs"
    return config


def published(variant: str) -> ConfigDict:
    """A slimmed LV-ViT, taught by the one that it was."""
    name, layers = SIZES[variant]
    size = 288 if variant == "l" else 224
    host = lvvit(**HOSTS[name], drop_path={"t": 0.0, "l": 0.3}.get(variant, 0.1))
    config = imagenet(
        host | slimming((size // 16) ** 2, layers),
        size=size,
        epochs=125,
        lr=4e-4,
        warmup="0 epochs",
        ema=None,
    )
    config.task = ConfigDict(distillation(host, smoothing=0.1, mixing=config.task.mixing))
    config.train.fresh = ("reduce_.*",)
    if variant == "l":
        config.data.transforms[2]["count"] = 3
    config.optimizer.schedule.end = 0.025
    config.optimizer.learning_rate = (("recalibration/.*", 5.0),)
    return config


def distillation(teacher: dict, **more: object) -> dict:
    """The task section: feature recalibration with the published factors."""
    return dict(kind="distillation", teacher=teacher, logits=2.0, tokens=2.0, **more)


def slimming(tokens: int, layers: tuple[int, ...]) -> dict:
    """Half of the tokens before each of these layers."""
    entries = {
        str(layer): dict(kind="slimming", count=tokens // 2**i) for i, layer in enumerate(layers, start=1)
    }
    return dict(reduce=dict(kind="schedule", entries=entries))


def slimmable(dim: int, depth: int, heads: int) -> dict:
    """A ViT on 16 patches of digits."""
    block = dict(mixer=dict(kind="attention", heads=heads), ffn=dict(kind="mlp"))
    return dict(kind="vit", patch=2, dim=dim, depth=depth, classes=10, block=block, pool="mean", unroll=depth)


def lvvit(
    dim: int, depth: int, heads: int, deep_stem: bool = False, skip: float = 2.0, **more: object
) -> dict:
    """The model section of LV-ViT: a convolutional stem, and branches divided by `skip`."""
    narrow = dict(features=dim // 8, activation="gelu")
    layers = [
        narrow | dict(stride=2),
        *([narrow] * 2 if deep_stem else []),
        dict(features=dim // 4, stride=2, activation="gelu"),
        dict(features=dim // 2, stride=2, activation="gelu"),
        dict(stride=2),
    ]
    block = dict(
        mixer=dict(kind="attention", heads=heads, qkv_bias=False),
        ffn=dict(kind="mlp", ratio=3.0),
        branch_scale=1 / skip,
        epsilon=1e-5,
    )
    stem = dict(kind="convs", layers=layers)
    return dict(kind="vit", patch=16, dim=dim, depth=depth, classes=1000, block=block, stem=stem, **more)
