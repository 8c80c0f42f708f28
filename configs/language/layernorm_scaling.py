"""LayerNorm Scaling (Sun et al. 2025, arXiv:2502.05795): what the norms give, over the root of the layer.

    python -m experiments.train --config=configs/language/layernorm_scaling.py:VARIANT --workdir=runs/lns

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    24 layers of width 64, 300 steps of 4,096 bytes, five minutes on one core: 3.60, 3.78 and 3.64 bits a byte
    of held-out text with seeds 0 to 2, without the scaling 4.04, 4.28 and 3.94.
`130m`, `250m`, `350m`, `1b`
    The authors' sizes, those of GaLore, on documents in `data/train.jsonl` with the tokenizer of
    `data/tokenizer.json`. Not run here; on C4 they report perplexities of 25.76, 20.35, 18.20 and 15.71,
    where the plain norm has 26.73, 21.92, 19.58 and 17.02.

With `-plain` behind the name (`pydocs-plain`) the same model without the scaling.
`effjax.compress.norm_scaling.folded` makes an ordinary Llama of what was trained.
"""

from ml_collections import ConfigDict

from configs.language.lm import Size, experiment

SIZES = {
    "smoke": Size(4, 32, 4, 4, 96, 256, tied=True, rotary_base=1e4, max_length=64),
    "pydocs": Size(24, 64, 4, 4, 176, 256, tied=True, rotary_base=1e4, max_length=256),
    "130m": Size(12, 768, 12, 12, 2048, 32_000, tied=False, rotary_base=1e4, max_length=256),
    "250m": Size(24, 768, 16, 16, 2560, 32_000, tied=False, rotary_base=1e4, max_length=256),
    "350m": Size(24, 1024, 16, 16, 2736, 32_000, tied=False, rotary_base=1e4, max_length=256),
    "1b": Size(24, 2048, 32, 32, 5461, 32_000, tied=False, rotary_base=1e4, max_length=256),
}
# Steps of 512 rows and the learning rate. 130m is the published script; 350m and 1b have the steps of the
# benchmark of GaLore that the paper follows; 250m lies between.
RECIPES = {"130m": (20_000, 1e-3), "250m": (40_000, 1e-3), "350m": (60_000, 1e-3), "1b": (100_000, 5e-4)}
VARIANTS = tuple(name + ending for name in SIZES for ending in ("", "-plain"))


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant, with `-plain` behind its name without the scaling."""
    name, _, plain = variant.partition("-")
    config = experiment(SIZES[name], smoke=name == "smoke")
    config.model.norm_scaling = not plain
    config.model.block.epsilon = 1e-6
    if name == "pydocs":
        config.model.unroll = 1  # 24 layers
        config.train.steps = "300 steps"
    if name in RECIPES:
        steps, lr = RECIPES[name]
        config.optimizer.update(dict(lr=lr, weight_decay=0.0, clip=None, b2=0.999))
        config.optimizer.schedule = dict(kind="cosine", warmup="10%", end=0.1)
        config.data.batch_size = 512
        config.train.steps = f"{steps} steps"
    return config
