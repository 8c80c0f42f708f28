"""Language models whose products have fewer bits (Lee et al. 2024), to see when training becomes unsteady.

    for rate in 3e-3 1e-2 3e-2 1e-1; do for seed in 0 1 2; do
        python -m experiments.train --config=configs/language/fp8_and_back.py:pydocs-e8m3 \\
            --config.optimizer.lr=$rate --config.train.seed=$seed --config.data.seed=$seed \\
            --workdir=runs/e8m3-$rate-$seed
    done; done

Every step's loss stands in `metrics.jsonl` of a run; `effjax.measure.instability.stability` sums curves up.
On the held-out documents each run also says how sharp the loss is around its logits.

`pydocs-e8m7`, `pydocs-e8m6`, ..., `pydocs-e8m1`
    Operands of products with so many bits of mantissa, the rest cut off: with 7 those of bfloat16. In
    gradients, too.
`pydocs-e7m7`, ..., `pydocs-e4m7`
    Fewer bits of the exponent.
`pydocs-e4m3`, `pydocs-e5m2`
    Floats of 8 bits with a scale for each tensor; gradients are e5m2 in both.
`pydocs-float32`
    Nothing is rounded.
`smoke`
    20 steps of `pydocs-e8m3`: seconds.

A toy of 117k parameters on the bytes of Python's documentation, 200 steps of 1,024 tokens. Everything but
the operands is float32.
"""

from ml_collections import ConfigDict

from configs.language.lm import Size, experiment

EIGHT_BITS = ("e4m3", "e5m2")
FORMATS = (*(f"e8m{m}" for m in range(7, 0, -1)), *(f"e{e}m7" for e in range(7, 3, -1)), *EIGHT_BITS)
VARIANTS = ("smoke", "pydocs-float32", *(f"pydocs-{name}" for name in FORMATS))

SIZE = Size(2, 64, 2, 2, 176, 256, tied=True, rotary_base=1e4, max_length=128)


def get_config(variant: str = "pydocs-e8m3") -> ConfigDict:
    """Returns the experiment of one format."""
    smoke = variant == "smoke"
    config = experiment(SIZE, smoke=smoke)
    config.task.sharpness = 5e-4
    config.data.batch_size = 8
    if not smoke:
        config.train.update(steps="200 steps", log_every="1 steps")
    name = "e8m3" if smoke else variant.removeprefix("pydocs-")
    if name != "float32":
        config.train.arithmetic = dict(
            kind="reduced", operands=name, gradients="e5m2" if name in EIGHT_BITS else name
        )
    return config
