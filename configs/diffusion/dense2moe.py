"""A trained DiT as a sparse one, Zheng et al. 2025: experts of its neurons, then groups of its blocks.

    python -m experiments.train --config=configs/diffusion/dit.py:digits --workdir=runs/dit
    python -m experiments.train --config=configs/diffusion/dense2moe.py:digits-experts \\
        --config.task.weights=runs/dit --workdir=runs/experts
    python -m experiments.train --config=configs/diffusion/dense2moe.py:digits-blocks \\
        --config.task.weights=runs/experts --workdir=runs/blocks
    python -m experiments.train --config=configs/diffusion/dense2moe.py:digits-pruned \\
        --config.task.weights=runs/dit --workdir=runs/pruned

`smoke`
    Groups of blocks with experts, of a toy on digits, trained from nothing: seconds.
`digits-experts`
    A shared expert of a quarter of each FFN's neurons and twelve of the others, of which a token takes two:
    37.5% of the FFN's parameters. 300 steps, taught by the DiT of `configs/diffusion/dit.py:digits`, two
    minutes of CPU time: a held-out loss of 0.2313 (the DiT has 0.2294), class agreement 100%.
`digits-blocks`
    Of every three of its blocks two are run. 300 steps, taught by the run before, two minutes: a held-out
    loss of 0.2456, class agreement 100%.
`digits-pruned`
    To compare with: FFNs of 192 of 512 neurons, as many as a token meets among the experts, those with the
    largest weights. 300 steps, taught as the experts are: a held-out loss of 0.2315, class agreement 100%;
    with `--config.task.scores=taylor`, which keeps the most important ones, 0.2311.
`xl2-experts`, `xl2-blocks`
    The same of DiT-XL/2 on latents of ImageNet, of every four blocks two. The paper's own is FLUX.1, which is
    not here; steps and batches are ours. Not run here.
"""

from ml_collections import ConfigDict

from configs.diffusion import dit

# Blocks of a group, and how many of them run.
GROUPS = {"smoke": (2, 1), "digits": (3, 2), "xl2": (4, 2)}
EXPERTS, CHOSEN, SHARED = 12, 2, 0.25
VARIANTS = ("smoke", "digits-experts", "digits-blocks", "digits-pruned", "xl2-experts", "xl2-blocks")


def get_config(variant: str = "digits-experts") -> ConfigDict:
    """Returns the config of a variant."""
    size, _, stage = variant.partition("-")
    config = dit.get_config(size)
    dense, sparse = config.model, with_experts(config.model)
    groups = in_groups(sparse, *GROUPS[size])
    config.model = {"experts": sparse, "pruned": narrowed(dense)}.get(stage, groups)
    if size == "smoke":
        return config
    teacher = sparse if stage == "blocks" else dense
    scores = dict(scores="magnitude") if stage == "pruned" else {}
    config.task = ConfigDict(config.task.to_dict() | dict(kind="dense2moe", teacher=teacher) | scores)
    if size == "digits":
        config.train.steps = "300 steps"
        config.train.ema.decay = 0.99
    else:
        config.train.steps = "50k steps"
    return config


def with_experts(dense: ConfigDict) -> ConfigDict:
    """The model section with mixtures in the place of its FFNs."""
    hidden = round(dense.dim * dense.block.ffn.ratio)
    shared = round(SHARED * hidden)
    ffn = dict(
        kind="mixture",
        experts=EXPERTS,
        chosen=CHOSEN,
        hidden=(hidden - shared) // EXPERTS,
        shared=shared,
        activation=dense.block.ffn.activation,
        gated=False,
        use_bias=True,
        scale=float(CHOSEN),
        balance=0.01,
    )
    block = dense.block.to_dict() | dict(ffn=ffn)
    return ConfigDict(dense.to_dict() | dict(block=block))


def narrowed(dense: ConfigDict) -> ConfigDict:
    """The model section with FFNs of as many neurons as a token meets among experts."""
    ffn = with_experts(dense).block.ffn
    model = ConfigDict(dense.to_dict())
    model.block.ffn.hidden = ffn.shared + ffn.chosen * ffn.hidden
    return model


def in_groups(sparse: ConfigDict, size: int, chosen: int) -> ConfigDict:
    """The model section with its blocks in groups."""
    block = dict(
        kind="mixture_of_blocks", members=(sparse.block.to_dict(),) * size, chosen=chosen, balance=0.01
    )
    return ConfigDict(sparse.to_dict() | dict(block=block, depth=sparse.depth // size))
