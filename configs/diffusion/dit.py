"""Diffusion transformers (Peebles and Xie 2023).

    python -m experiments.train --config=configs/diffusion/dit.py:digits --workdir=runs/dit_digits
    python -m experiments.sample --workdir=runs/dit_digits --out=digits.png --classes=0,1,2 --guidance=2

Variants: `smoke` trains in seconds; `digits` makes the embedded handwritten digits; `s2 b2 l2 xl2` are the
paper's models on 32x32x4 latents of ImageNet. With `-flow` behind the name (`digits-flow`) the process is a
rectified flow instead of DDPM.
"""

from ml_collections import ConfigDict

from effjax.errors import UsageError, did_you_mean

#            dim, depth, heads, patch, classes
SIZES = {
    "smoke": (32, 2, 2, 2, 10),
    "digits": (128, 6, 4, 2, 10),
    "s2": (384, 12, 6, 2, 1000),
    "b2": (768, 12, 12, 2, 1000),
    "l2": (1024, 24, 16, 2, 1000),
    "xl2": (1152, 28, 16, 2, 1000),
}


def get_config(variant: str = "smoke") -> ConfigDict:
    """Returns the experiment of one variant, with `-flow` behind its name for a rectified flow."""
    size, _, process = variant.partition("-")
    if size not in SIZES or process not in ("", "flow"):
        known = [name + ending for name in SIZES for ending in ("", "-flow")]
        raise UsageError(
            f"configs/diffusion/dit.py has no variant {variant!r}. {did_you_mean(variant, known)}"
        )
    flow = process == "flow"

    config = ConfigDict()
    config.model = model(size, learned_sigma=not flow)
    config.task = ConfigDict(
        {
            "kind": "diffusion",
            "process": {"kind": "rectified_flow"}
            if flow
            else {"kind": "ddpm", "schedule": "linear", "steps": 1000},
            "label_dropout": 0.1,
        }
    )
    return config


def model(size: str, learned_sigma: bool) -> ConfigDict:
    """The adaLN-Zero transformer of one size."""
    dim, depth, heads, patch, classes = SIZES[size]
    return ConfigDict(
        {
            "kind": "dit",
            "patch": patch,
            "dim": dim,
            "depth": depth,
            "classes": classes,
            "learned_sigma": learned_sigma,
            "block": {
                "mixer": {"kind": "attention", "heads": heads},
                "ffn": {"kind": "mlp", "ratio": 4.0, "activation": "gelu_tanh"},
            },
        }
    )
