"""Spark Transformer (You et al. 2025, arXiv:2506.06644): few neurons and few keys for each token.

    python -m experiments.train --config=configs/language/spark.py:VARIANT --workdir=runs/spark

`smoke`
    20 steps of a toy on the bytes of Python's documentation: seconds.
`pydocs`
    As `configs/language/lm.py:pydocs`, its dense twin of as many parameters, with 8% of 768 neurons and 32 of
    up to 256 keys for each token. Not trained here yet.
`2b`, `gemma2-2b`
    Spark Gemma-2 2B and Gemma-2 2B, on documents in `data/train.jsonl` with the tokenizer of
    `data/tokenizer.json`. Not run here. The authors train on 2 trillion tokens with the data and recipe of
    Gemma-2, which are not public: optimiser and batch are those of `configs/language/lm.py`.

To decode, `effjax.compress.rows.by_rows` stores the weights so that only those of active neurons are read;
with `implementation="kernel"` a TPU reads them by the kernel `sparse_ffn`.
"""

from ml_collections import ConfigDict

from configs.language.lm import Size, corpus, experiment

# Gemma-2 2B: Gemma Team 2024, arXiv:2408.00118, table 1, whose feedforward dim 18432 are both expansions.
# Spark: 3/2 as many neurons, r = 1024 of 2304 channels, 8% of the neurons; r = 128 of 256 channels of a head,
# 256 keys.
WINDOW = 4096
VARIANTS = ("smoke", "pydocs", "2b", "gemma2-2b")


def get_config(variant: str = "pydocs") -> ConfigDict:
    """Returns the experiment of one variant."""
    if variant in ("2b", "gemma2-2b"):
        return gemma(sparse=variant == "2b")
    smoke = variant == "smoke"
    dim, heads, kv_heads, hidden = (32, 2, 1, 96) if smoke else (192, 3, 1, 512)
    depth, length = (2, 64) if smoke else (4, 256)
    size = Size(depth, dim, heads, kv_heads, hidden, 256, tied=True, rotary_base=1e4, max_length=length)
    config = experiment(size, smoke=smoke)
    neurons = 3 * hidden // 2
    config.model.block = ConfigDict(
        dict(
            mixer=dict(
                kind="spark_attention",
                heads=heads,
                kv_heads=kv_heads,
                predictor=dim // heads // 2,
                active=8 if smoke else 32,
                rotary_base=1e4,
            ),
            ffn=dict(kind="spark", hidden=neurons, predictor=dim // 2, active=round(0.08 * neurons)),
            epsilon=1e-5,
        )
    )
    return config


def gemma(sparse: bool) -> ConfigDict:
    """Gemma-2 2B with Spark's layers, or as it is."""
    dim, heads = 2304, dict(heads=8, kv_heads=4, head_dim=256, rotary_base=1e4)
    if sparse:
        mixer = dict(kind="spark_attention", predictor=128, active=256, **heads)
        ffn = dict(kind="spark", hidden=13_824, predictor=1024, active=round(0.08 * 13_824))
    else:
        plain = dict(qkv_bias=False, out_bias=False, causal=True, scale=1 / 16, logit_cap=50.0)
        mixer = dict(kind="attention", **heads, **plain)
        ffn = dict(kind="gated", hidden=9216, activation="gelu_tanh")
    config = corpus(8192)
    config.model = dict(
        kind="lm",
        block=dict(mixer=mixer, ffn=ffn, epsilon=1e-6, norm="rms_offset", norm_at="both"),
        vocab=256_000,
        dim=dim,
        depth=26,
        tied=True,
        max_length=8192,
        layers=(dict(window=WINDOW), dict()),
        embedding_scale=dim**0.5,
        logit_cap=30.0,
        remat="full",
    )
    return config
