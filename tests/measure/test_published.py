"""Parameters and multiply-accumulates of every published size, against the tables of the papers."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.measure import count
from effjax.models import KINDS

# Parameters and MACs: timm's and DeiT's tables at 224 pixels and 1000 classes; DiT, tables 1 and 4 (where
# MACs are called Gflops), without the fixed position table; the language models' own counts.
VIT = {
    "ti16": (5.72e6, 1.26e9),
    "s16": (22.05e6, 4.61e9),
    "b16": (86.57e6, 17.58e9),
    "l16": (304.33e6, 61.60e9),
}
DIT = {"s2": (33e6, 6.06e9), "b2": (130e6, 23.01e9), "l2": (458e6, 80.71e9), "xl2": (675e6, 118.64e9)}
LM = {"125m": 124_635_456, "1b": 1_235_814_400, "8b": 8_030_261_248}


def model_of(family, size):
    section = importlib.import_module(f"configs.{family}").get_config(size).model
    return build_kind(KINDS, section, "config.model")


def cost_of(model, *inputs):
    """Counts one forward pass from shapes alone; nothing is allocated."""
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    return count(lambda params, *inputs: model.apply({"params": params}, *inputs), params, *inputs)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize("size", VIT)
def test_vit(size):
    parameters, macs = VIT[size]
    model = model_of("vision.vit", size)
    cost = cost_of(model, shape(1, 224, 224, 3))
    assert cost.parameters == pytest.approx(parameters, rel=1e-3)
    assert cost.macs == pytest.approx(macs, rel=1e-2)
    # With five operations for each value that a layer norm reads, the published figures hold to their last
    # digit, so it seems that their counter included the norms.
    norms = 5 * (2 * model.depth + 1) * 197 * model.dim
    assert cost.macs + norms == pytest.approx(macs, abs=0.006e9)
    assert not cost.unknown


@pytest.mark.parametrize("size", DIT)
def test_dit(size):
    parameters, macs = DIT[size]
    latents, times, labels = shape(1, 32, 32, 4), shape(1), shape(1, dtype=jnp.int32)
    cost = cost_of(model_of("diffusion.dit", size), latents, times, labels)
    assert cost.parameters == pytest.approx(parameters, rel=1e-2)
    assert cost.macs == pytest.approx(macs, rel=1e-2)
    if size == "xl2":
        assert cost.parameters == 674_834_720
        assert cost.macs == pytest.approx(118.6e9, rel=1e-3)


@pytest.mark.parametrize("size", LM)
def test_lm(size):
    tokens = shape(1, 128, dtype=jnp.int32)
    cost = cost_of(model_of("language.lm", size), tokens)
    assert cost.parameters == LM[size]
