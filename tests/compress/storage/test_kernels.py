"""A model whose weights are codes says the same by kernels, which are interpreted here."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from effjax.compress.storage.binary_coding import BinaryCoding
from effjax.compress.storage.inputs import Token
from effjax.compress.storage.kernels import multiplied_by
from effjax.compress.storage.sparse_blocks import SparseBlocks
from effjax.compress.storage.trees import boxed_like, stored_in
from effjax.compress.storage.uniform import Uniform
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.layers.stored import Place
from effjax.models import KINDS
from pallas_kernels import binary_coded_matmul, block_sparse_matmul, quantized_matmul

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 5)), jnp.int32)
LAYOUTS = {
    "affine": Uniform(4, 64, False),
    "symmetric": Uniform(3, 128),
    "column": Uniform(2, 0, False, scale="float32"),
    "matrix": Uniform(4, -1, False),
    "signs": BinaryCoding(2, 128, rounds=1),
    "blocks": SparseBlocks(0.5, (128, 128)),
    "int8 blocks": SparseBlocks(0.5, (128, 128), "int8"),
}
# What `called` notes where it is not bits: of 2 by 2 blocks and of 2 by 4 half.
NOTED = {"blocks": {2, 4}, "int8 blocks": {2, 4}}


@functools.cache
def model():
    block = dict(
        mixer=dict(kind="attention", heads=2, rotary_base=1e4, causal=True),
        ffn=dict(kind="gated", hidden=512),
    )
    section = dict(kind="lm", block=block, vocab=16, dim=256, depth=2, max_length=16)
    return build_kind(KINDS, section, "config.model")


@functools.cache
def stored(name):
    def init(key):
        return meta.unbox(boxed_like(model().init(key, TOKENS)["params"], {"blocks/.*": LAYOUTS[name]}))

    return jax.jit(init)(jax.random.key(0))


def logits(params):
    return jax.jit(lambda params: model().apply({"params": params}, TOKENS))(params)


@pytest.fixture
def called(monkeypatch):
    """The TPU's kernels in place of the choice; noted are the bits, planes or blocks of every product."""
    products = []

    def interpreted(op, *arrays, implementation, interpret, strict, **options):
        products.append(options.get("bits", arrays[1].shape[0]))
        return op(*arrays, implementation="tpu", interpret=True, **options)

    for package in (quantized_matmul, binary_coded_matmul, block_sparse_matmul):
        monkeypatch.setattr(package, "OP", functools.partial(interpreted, package.OP))
    return products


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_says_the_same_by_kernels(name, called):
    params = stored(name)
    plain = logits(params)
    assert not called
    reference = multiplied_by(params, "reference")
    assert {leaf.layout.implementation for leaf in stored_in(reference).values()} == {"reference"}
    kernel = logits(multiplied_by(params, "kernel"))
    assert called
    assert set(called) == (NOTED.get(name) or {LAYOUTS[name].bits})
    np.testing.assert_allclose(kernel, plain, atol=2e-4 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize("name", ["affine", "signs", "blocks"])
@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_without_a_kernel_the_reference_says_it(name, implementation):
    params = stored(name)
    found = logits(multiplied_by(params, implementation))
    np.testing.assert_allclose(found, logits(params), atol=1e-5 * float(jnp.abs(found).max()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_product_is_lowered_with_the_kernel_of_the_platform(name):
    params, called = stored(name), {}
    for implementation in ("plain", "reference", "kernel"):
        leaf = stored_in(multiplied_by(params, implementation))["blocks/ffn/contract/kernel"]
        leaf = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), leaf)
        x = jax.ShapeDtypeStruct((2, 512), jnp.bfloat16)
        traced = jax.jit(lambda x, leaf: leaf.product(x)).trace(x, leaf)
        called[implementation] = "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert called == dict(plain=False, reference=False, kernel=True)


def test_each_device_multiplies_its_own_rows(draw):
    """Nothing else would be lowered without a warning, which is an error here."""
    place = Place((256, 64), ("embed", "mlp"), (256,), (64,), False)
    kernel = jnp.asarray(draw.normal(size=place.shape), jnp.float32)
    held = Uniform(4, 128, implementation="kernel").store(kernel, place)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules([("batch", "data")]):
        cut = NamedSharding(mesh, PartitionSpec("data"))
        traced = jax.jit(held.product, in_shardings=cut).trace(jax.ShapeDtypeStruct((4, 256), jnp.float32))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="takes codes of 2, 3, 4 bits, not 8"):
        Uniform(8, implementation="kernel")
    with pytest.raises(UsageError, match="multiplies by numbers"):
        Uniform(4, inputs=Token(8), implementation="kernel")
    with pytest.raises(UsageError, match="multiplies by numbers"):
        SparseBlocks(0.5, (128, 128), "int8", Token(8), implementation="kernel")
    with pytest.raises(UsageError, match=r"blocks of multiples of 128, not \(1, 4\)"):
        SparseBlocks(0.5, implementation="kernel")
    params = stored("affine")
    wide = dataclasses.replace(next(iter(stored_in(params).values())), layout=Uniform(8, 64, False))
    with pytest.raises(UsageError, match="bits, not 8"):
        multiplied_by({"kernel": wide}, "kernel")
