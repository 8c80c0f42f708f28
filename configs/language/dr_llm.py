"""Dr.LLM (Heakl et al., ICLR 2026): routers that skip, execute or repeat the blocks of a frozen model.

    python -m experiments.train --config=configs/language/dr_llm.py:probe-base --workdir=runs/base \\
        --config.train.start=runs/probes
    python -m experiments.layer_paths --workdir=runs/base --out=runs/paths --examples=512 --batch=128 \\
        --turns=12 --enough=0 --length_penalty=1 --agree=6 --cost=0.5
    python -m experiments.train --config=configs/language/dr_llm.py:probe --workdir=runs/routers \\
        --config.train.start=runs/base --config.data.source.root=runs/paths

`smoke`
    Routers of a toy, taught by plans that are drawn anew for each batch: seconds.
`probe-base`
    The model that is routed: that of `configs/language/probes.py`, 50 steps more on one sequence a row, half
    a minute of CPU time: 99.99% of held-out answers.
`probe`
    Its routers, from searched plans, 192 steps: 3.0 of 4 layers and 99.96% of the answers.
`llama-3b`, `llama-8b`
    Llama 3.2 3B and Llama 3 8B with routers, trained as published: 25 epochs of about 4,000 searched paths,
    16 a step. Not run here.
"""

from ml_collections import ConfigDict

from configs.language import probes
from configs.language.lm import Size, experiment

SIZES = {
    "smoke": Size(3, 32, 4, 2, 96, 32, tied=True, rotary_base=1e4, max_length=64),
    "llama-3b": Size(28, 3072, 24, 8, 8192, 128_256, tied=True, rotary_base=5e5, max_length=8192),
    "llama-8b": Size(32, 4096, 32, 8, 14_336, 128_256, tied=False, rotary_base=5e5, max_length=8192),
}
VARIANTS = ("smoke", "probe-base", "probe", "llama-3b", "llama-8b")

# Everything but the routers stays as it is.
FROZEN = (r"(?!blocks/router/).*",)


def get_config(variant: str = "probe") -> ConfigDict:
    """Returns the experiment of one variant."""
    if variant.startswith("probe"):
        return probe(base=variant == "probe-base")
    size, smoke = SIZES[variant], variant == "smoke"
    config = experiment(size, smoke=smoke)
    with_routers(config, "10%" if smoke else "500 steps")
    if smoke:
        config.data = ConfigDict(dict(source=asked(24, 32, pairs=6), batch_size=64))
        config.evaluators.test.data = ConfigDict(
            dict(source=asked(24, 32, pairs=6, seed=1) | dict(examples=1024), batch_size=256, threads=0)
        )
        config.task.candidates = 4
        return config
    from_paths(config, length=2048, depth=size.depth)
    config.evaluators = ConfigDict()
    return config


def probe(base: bool) -> ConfigDict:
    """The model of `configs/language/probes.py`, asked one thing a row; or its routers."""
    config = probes.get_config("probes")
    length, vocab = 128, probes.VOCAB
    test = dict(source=asked(length, vocab, seed=1) | dict(examples=1024), batch_size=64, threads=0)
    config.evaluators = ConfigDict(dict(test=dict(kind="metrics", data=test, every="100%")))
    if base:
        config.data = ConfigDict(dict(source=asked(length, vocab), batch_size=24, threads=1))
        config.optimizer.lr = 1e-3
        config.train.steps = "50 steps"
        config.train.start = "runs/probes"
        return config
    with_routers(config, warmup="5%")
    from_paths(config, length, config.model.depth)
    config.train.steps = config.train.checkpoint_every = "12 epochs"
    config.model.block.bottleneck = 32
    config.data.batch_size = 32
    return config


def asked(length: int, vocab: int, pairs: int | None = None, seed: int = 0) -> dict:
    """Rows of one sequence, of which no one says what it asks."""
    tasks: tuple[dict, ...] = (dict(kind="recall", pairs=pairs), dict(kind="needle"))
    if pairs is not None:
        tasks += (dict(kind="copy"), dict(kind="induction"))
    parts = tuple(dict(task=task) for task in tasks)
    return dict(kind="probe_mixture", parts=parts, length=length, vocab=vocab, seed=seed)


def from_paths(config: ConfigDict, length: int, depth: int) -> None:
    """Trains on what `experiments.layer_paths` found."""
    config.data = ConfigDict(dict(source=dict(kind="arrays", root="data/paths"), batch_size=16))
    config.data.expected = expected(length, depth)
    config.train.start = "data/base"
    config.train.fresh = (r"blocks/router/.*",)
    config.train.steps = config.train.checkpoint_every = "25 epochs"
    config.train.log_every = "100 steps"


def expected(length: int, depth: int) -> dict:
    """What `experiments.layer_paths` writes."""
    integers = ("tokens", "targets", "segments", "positions")
    fields = {name: dict(shape=(length,), dtype="int32") for name in integers}
    fields |= dict(
        weights=dict(shape=(length,)), counts=dict(shape=(depth,), dtype="int32"), labels=dict(shape=(3,))
    )
    return dict(fields=fields)


def with_routers(config: ConfigDict, warmup: str = "500 steps") -> None:
    """Puts a router before each block, and trains nothing else."""
    config.model.kind = "routed_lm"
    config.task = ConfigDict(dict(kind="layer_routing"))
    config.optimizer = ConfigDict(
        dict(
            kind="adamw",
            lr=1e-3,
            weight_decay=0.01,
            freeze=FROZEN,
            schedule=dict(kind="cosine", warmup=warmup),
        )
    )
