"""Few tokens that look where they want: SparseFormers that start from ViTs, Gao et al. 2024.

    python -m experiments.train --config=configs/vision/sparseformer.py:VARIANT --workdir=runs/sparseformer

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    9 latent tokens on 8 x 8 pixels, learned from the labels alone.
`digits-teacher`, `digits-bootstrapped`
    A ViT of six blocks on 17 tokens; then four of its blocks on 5 tokens, whose class token becomes that of
    the ViT, without a label: `--config=configs/vision/sparseformer.py:digits-bootstrapped
    --config.task.weights=runs/teacher`. Two blocks, the norm and the head stay as they were. 99.4% and 99.2%
    of the 360 held-out digits, 172 and 202 seconds of CPU time.
`augreg-base`, `augreg-large`
    49 tokens in the place of the 197 of ViT-B/16 at 224 pixels and the 577 of ViT-L/16 at 384, on ImageNet's
    pictures without their labels: 3.8G and 11.3G MACs in the place of 17.6G and 191.1G. `experiments.convert`
    brings the teacher, whose folder is named by `--config.task.weights`. In the paper the large one reaches
    84.9% top-1 from AugReg's. Recipe and length of the training are ours. Not run here.
`clip-base`, `clip-large`
    49 and 64 tokens, taught by CLIP's ViT-B/16 and ViT-L/14, timm's `vit_base_patch16_clip_quickgelu_224` and
    `vit_large_patch14_clip_quickgelu_224`; the head is CLIP's projection. Not run here.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.vision.recipes import digits, imagenet
from configs.vision.vit import vit

VARIANTS = ("smoke", "digits", "digits-teacher", "digits-bootstrapped",
            "augreg-base", "augreg-large", "clip-base", "clip-large")  # fmt: skip

AUGREG: dict[str, Any] = dict(classes=1000, patch=16, mean=(0.5,), std=(0.5,))
CLIP: dict[str, Any] = dict(
    clip=True,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)

# Width, blocks and heads of the teacher, patches and pictures of it, and the width of the focusing part.
BASE: dict[str, Any] = dict(dim=768, depth=12, heads=12, focus_dim=384)
LARGE: dict[str, Any] = dict(dim=1024, depth=24, heads=16, focus_dim=512)
SIZES: dict[str, dict[str, Any]] = {
    "augreg-base": BASE | AUGREG,
    "augreg-large": LARGE | AUGREG | dict(teacher_size=384),
    "clip-base": BASE | CLIP | dict(classes=512, patch=16),
    "clip-large": LARGE | CLIP | dict(classes=768, patch=14, tokens=63),
}

# What stays as it was: the last third of the teacher, by the paper's figure 2, and what is behind it.
FROZEN = ("blocks/.*", "norm/.*", "head/.*")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    if variant in SIZES:
        return published(**SIZES[variant])
    if variant in ("digits-teacher", "digits-bootstrapped"):
        return bootstrapping(taught=variant == "digits-bootstrapped")
    smoke = variant == "smoke"
    size: dict[str, Any] = dict(
        dim=32, depth=2, heads=2, focus_dim=32, tokens=4, features=16, points=4, turns=2, hidden=16
    )
    if not smoke:
        size = dict(
            dim=64, depth=3, heads=4, focus_dim=64, tokens=9, features=32, points=9, turns=2, hidden=32
        )
    model = sparseformer(**size, classes=10, early_stride=1, early_pool=False, unroll=size["depth"])
    return digits(model, smoke=smoke)


def published(
    dim: int,
    depth: int,
    heads: int,
    focus_dim: int,
    classes: int,
    patch: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tokens: int = 48,
    teacher_size: int | None = None,
    clip: bool = False,
) -> ConfigDict:
    """ImageNet's pictures; the first third of the teacher's blocks is left out, the second is tuned."""
    teacher = vit(dim, depth, heads, patch, classes)
    model = sparseformer(dim, 2 * depth // 3, heads, tuned=depth // 3, focus_dim=focus_dim, tokens=tokens)
    model |= dict(classes=classes)
    if clip:
        model["block"]["ffn"] = dict(kind="mlp", activation="quick_gelu")
        teacher |= dict(block=model["block"], pre_norm=True, patch_bias=False)
    config = imagenet(model, epochs=30)
    config.task = ConfigDict(dict(kind="alignment", teacher=teacher, teacher_size=teacher_size))
    config.optimizer.freeze = FROZEN
    config.data.transforms[3].update(mean=mean, std=std)
    config.evaluators.validation.data.transforms[1].update(mean=mean, std=std)
    if clip:  # no classes, before someone has texts for them
        config.evaluators = ConfigDict()
    return config


def bootstrapping(taught: bool) -> ConfigDict:
    """A ViT on digits, or the SparseFormer that it teaches."""
    teacher = vit(64, 6, 4, patch=2, classes=10, unroll=6)
    if not taught:
        return digits(teacher, smoke=False)
    focus: dict[str, Any] = dict(focus_dim=64, tokens=4, features=32, points=9, turns=2, hidden=32)
    model = sparseformer(64, 4, 4, **focus, tuned=2, classes=10, early_stride=1, early_pool=False, unroll=2)
    config = digits(model, smoke=False)
    config.task = ConfigDict(dict(kind="alignment", teacher=teacher))
    config.optimizer.freeze = FROZEN
    return config


def sparseformer(dim: int, depth: int, heads: int, **more: object) -> dict:
    """The model section of a SparseFormer."""
    block = dict(mixer=dict(kind="attention", heads=heads), ffn=dict(kind="mlp"), epsilon=1e-5)
    return dict(kind="sparseformer", dim=dim, depth=depth, block=block, **more)
