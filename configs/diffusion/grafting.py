"""Other operators in a trained DiT, Chandrasegaran et al. 2025: taught alone, then together.

    python -m experiments.train --config=configs/diffusion/dit.py:digits --workdir=runs/dit
    python -m experiments.train --config=configs/diffusion/grafting.py:digits-hyena-x-50 \\
        --config.task.weights=runs/dit --workdir=runs/taught
    python -m experiments.train --config=configs/diffusion/grafting.py:digits-hyena-x-50-tuned \\
        --config.train.start=runs/taught --workdir=runs/grafted

`smoke`
    Stage 2 of a toy on digits, from nothing: seconds. `--config.train.start` names a folder.
`digits-GRAFT`
    Stage 1 on the DiT of `configs/diffusion/dit.py:digits`: the new operators alone, 300 steps, under two
    minutes of CPU time. `hyena-x-50` reaches a held-out loss of 0.2376; the DiT has 0.2294, and the graft
    without it 0.267.
`digits-GRAFT-tuned`
    Stage 2: the whole network, 300 steps: 0.2311, and 0.2318 where stage 1 was left out. With
    `--config.optimizer.lr=3e-4` 0.2308, and 600 steps from drawn operators 0.2298; `hyena-x-100` 0.2375 and
    0.2369. At equal steps in all, stage 1 gains nothing on so small a network.
`xl2-GRAFT`, `xl2-GRAFT-tuned`
    The hybrids of the paper's tables 3, 4 and 6 on latents of ImageNet: stage 1 on 8,000 examples for 200
    passes, stage 2 on a tenth of them for 50k steps, of blocks side by side on a quarter for 200k. Not run
    here; in the paper 250 steps at a guidance of 1.5 reach an FID between 2.37 and 3.69, DiT-XL/2's is 2.27.

GRAFT is an operator and the share of layers in percent that have it: `self-100` (the same operator, drawn
anew), `hyena-se-50`, `hyena-x-75`, `swa-50` (sliding windows), `linear-50` (ours), for FFNs `mlp3-100`,
`mlp6-50`, `conv-50` (Hyena-X along the channels); or `parallel`, every two blocks side by side.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.diffusion import dit

MIXERS: dict[str, dict[str, Any]] = {
    "hyena-se": dict(kind="hyena", features=4, inner=4),
    "hyena-x": dict(kind="hyena", features=4),
    "hyena-y": dict(kind="hyena", features=None, inner=4),
    "swa": dict(kind="sliding_window", radius=4),
    "linear": dict(kind="simplified_linear"),
}
FFNS: dict[str, dict[str, Any]] = {
    "mlp3": dict(kind="mlp", ratio=3.0, activation="gelu_tanh"),
    "mlp6": dict(kind="mlp", ratio=6.0, activation="gelu_tanh"),
    "conv": dict(kind="hyena", ratio=2.0),
}
# How many layers a pattern has, and how many of them, at its start, keep their operator.
SHARES = {"50": (2, 1), "75": (4, 1), "100": (1, 0)}

PUBLISHED = (
    *(f"{name}-{share}" for name in ("hyena-se", "hyena-x", "hyena-y", "swa") for share in ("50", "75")),
    *(f"{name}-{share}" for name in ("mlp3", "mlp6") for share in SHARES),
    "conv-50", "conv-75", "parallel",
)  # fmt: skip
DIGITS = ("self-100", "hyena-se-50", "hyena-x-50", "hyena-x-100", "hyena-y-50", "swa-50", "linear-50",
          "mlp3-100", "mlp6-100", "conv-50", "parallel")  # fmt: skip

VARIANTS = (
    "smoke",
    *(f"digits-{graft}{stage}" for graft in DIGITS for stage in ("", "-tuned")),
    *(f"xl2-{graft}{stage}" for graft in PUBLISHED for stage in ("", "-tuned")),
)


def get_config(variant: str = "digits-hyena-x-50") -> ConfigDict:
    """Returns the config of a variant."""
    if variant == "smoke":
        config = dit.get_config("smoke")
        config.model = grafted(config.model, "hyena-x-50")
        return config
    size, _, graft = variant.partition("-")
    name, tuned = graft.removesuffix("-tuned"), graft.endswith("-tuned")
    config = dit.get_config(size)
    teacher = config.model
    config.model = grafted(teacher, name)
    if not tuned:
        more = dict(kind="grafting", teacher=teacher) | (dict(anew=("mixer",)) if name == "self-100" else {})
        config.task = ConfigDict(config.task.to_dict() | more)
        config.optimizer.freeze = (old(name),) if name != "parallel" else ("(?!blocks/).*",)
    recipe = digits if size == "digits" else published
    recipe(config, tuned, parallel=name == "parallel")
    return config


def grafted(teacher: ConfigDict, name: str) -> ConfigDict:
    """The model section of a DiT with other operators."""
    model, block = ConfigDict(teacher.to_dict()), teacher.block.to_dict()
    if name == "parallel":
        model.block, model.depth = dict(kind="parallel", members=(block, block)), teacher.depth // 2
        return model
    operator, _, share = name.rpartition("-")
    new, (every, kept) = dict(block), SHARES[share]
    heads = {} if operator.startswith("hyena") else dict(heads=block["mixer"]["heads"])
    if operator in MIXERS:
        new["mixer"] = MIXERS[operator] | heads
    elif operator in FFNS:
        new["ffn"] = FFNS[operator]
    members = (block,) * kept + (new,) * (every - kept)
    model.block = dict(kind="cycle", members=members) if every > 1 else new
    model.depth = teacher.depth // every
    return model


def old(name: str) -> str:
    """Matches every parameter but those of new operators."""
    operator, _, share = name.rpartition("-")
    every, kept = SHARES[share]
    at = f"members_[{kept}-{every - 1}]/" if every > 1 else ""
    return f"(?!blocks/{at}{'ffn' if operator in FFNS else 'mixer'}/).*"


def digits(config: ConfigDict, tuned: bool, parallel: bool) -> None:
    """Three hundred steps of each stage."""
    config.train.steps = "300 steps"
    config.train.ema.decay = 0.99


def published(config: ConfigDict, tuned: bool, parallel: bool) -> None:
    """The paper's sections 4.1 and 6, and its code for what is cut."""
    config.optimizer.clip = 10.0
    share = "25%" if parallel else "10%"
    config.data.source.split = f"train[:{share}]" if tuned else "train[:8000]"
    config.data.expected.examples = (320_292 if parallel else 128_117) if tuned else 8000
    if not tuned:
        config.data.batch_size = 64
        config.train.steps = "25k steps"
        return
    config.train.steps = "200k steps" if parallel else "50k steps"
    config.optimizer.schedule = dict(kind="constant", warmup="1k steps")
