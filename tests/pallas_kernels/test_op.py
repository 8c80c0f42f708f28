"""Which implementation is lowered, what happens where one cannot be, and that calls compose."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels import op as op_module
from pallas_kernels.op import Op, Unsupported

X = jax.ShapeDtypeStruct((16, 128), jnp.float32)


def scaled(x, *, by):
    return jnp.sin(x) * by


def scaled_on_tpu(x, *, by, interpret):
    def body(x, out):
        out[...] = jnp.sin(x[...]) * by

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(),
        interpret=interpret,
        name="scaled",
    )(x)


def broken(x, *, by, interpret):
    raise NotImplementedError("this tile is not known")


def refused(x, *, by, interpret):
    raise Unsupported("scaled takes bfloat16, not float32.")


OP = Op("scaled", scaled, tpu=scaled_on_tpu, gpu=broken)


@pytest.fixture(autouse=True)
def _nothing_warned_yet():
    op_module._warned.clear()


def lowered(fn, *platforms, arguments=(X,)):
    return jax.export.export(jax.jit(fn), platforms=list(platforms))(*arguments).mlir_module()


def test_the_platform_that_is_lowered_for_chooses():
    call = lambda x: OP(x, by=2.0)
    assert "tpu_custom_call" in lowered(call, "tpu")
    assert "tpu_custom_call" not in lowered(call, "cpu")
    assert "tpu_custom_call" not in lowered(lambda x: OP(x, by=2.0, implementation="reference"), "tpu")


def test_a_program_for_several_platforms_holds_one_of_each(draw):
    exported = jax.export.export(jax.jit(lambda x: OP(x, by=2.0)), platforms=["cpu", "tpu"])(X)
    assert "tpu_custom_call" in exported.mlir_module()
    x = draw.normal(size=X.shape).astype(np.float32)
    np.testing.assert_allclose(exported.call(x), scaled(x, by=2.0), rtol=1e-6)


@pytest.mark.parametrize("kernel", [broken, refused])
def test_what_does_not_lower_is_replaced_with_one_warning(kernel):
    failing = dataclasses.replace(OP, gpu=kernel)
    with pytest.warns(
        RuntimeWarning, match=r"scaled \(forward\): no kernel for cuda, its reference is used"
    ) as told:
        text = lowered(lambda x: failing(x, by=2.0) + failing(2 * x, by=2.0), "cuda")
    assert len(told) == 1
    assert "custom_call" not in text
    lowered(lambda x: failing(x, by=2.0), "cuda")  # a warning would be an error


def test_strict_raises_what_the_kernel_raised():
    with pytest.raises(
        RuntimeError, match="strict: no kernel for cuda: NotImplementedError: this tile"
    ) as raised:
        lowered(lambda x: OP(x, by=2.0, strict=True), "cuda")
    causes = [raised.value]
    while causes[-1] is not None:
        causes.append(causes[-1].__cause__)
    assert any(isinstance(cause, NotImplementedError) for cause in causes)


def test_a_named_implementation_is_not_replaced():
    with pytest.raises(NotImplementedError, match="this tile is not known"):
        lowered(lambda x: OP(x, by=2.0, implementation="gpu"), "cuda")


def test_the_reference_is_not_excused():
    wrong = dataclasses.replace(OP, reference=lambda x, by: x @ x)
    with pytest.raises(TypeError):
        lowered(lambda x: wrong(x, by=2.0), "tpu")


def test_nothing_is_traced_for_platforms_that_are_not_lowered_for(draw):
    def explodes(*_, **__):
        raise AssertionError("traced")

    call = dataclasses.replace(OP, tpu=explodes, gpu=explodes)
    x = draw.normal(size=X.shape).astype(np.float32)
    np.testing.assert_allclose(jax.jit(lambda x: call(x, by=3.0))(x), scaled(x, by=3.0), rtol=1e-6)
    np.testing.assert_allclose(call(x, by=3.0), scaled(x, by=3.0), rtol=1e-6)


def test_what_the_compiler_would_cut_by_itself_is_the_reference():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec("data"))
    traced = jax.jit(lambda x: OP(x, by=2.0), in_shardings=over, out_shardings=over).trace(X)
    with pytest.warns(RuntimeWarning, match="cut over 4 devices by itself: put the call in a jax.shard_map"):
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text
    each = jax.shard_map(
        lambda x: OP(x, by=2.0),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    text = (
        jax.jit(each, in_shardings=over, out_shardings=over)
        .trace(X)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    assert "tpu_custom_call" in text


def test_calls_compose(draw):
    x = draw.normal(size=(3, *X.shape)).astype(np.float32)
    call = lambda x: OP(x, by=2.0)
    np.testing.assert_allclose(jax.jit(jax.vmap(call))(x), scaled(x, by=2.0), rtol=1e-6)
    twice = jax.vmap(jax.vmap(call, 1), 0)(x)
    np.testing.assert_allclose(twice, scaled(x, by=2.0).swapaxes(1, 2), rtol=1e-6)
    total = jax.grad(lambda x: jnp.sum(jax.vmap(call)(x)))
    np.testing.assert_allclose(jax.jit(total)(x), 2 * jnp.cos(x), rtol=1e-5, atol=1e-6)
    carried, _ = jax.lax.scan(lambda carry, row: (call(carry) + row, None), x[0], x)
    expected = x[0]
    for row in x:
        expected = scaled(expected, by=2.0) + row
    np.testing.assert_allclose(carried, expected, rtol=1e-5, atol=1e-6)
    remat = jax.grad(lambda x: jnp.sum(jax.checkpoint(call)(x)))(x[0])
    np.testing.assert_allclose(remat, 2 * jnp.cos(x[0]), rtol=1e-5, atol=1e-6)


def test_a_mapped_call_is_lowered_as_a_mapped_kernel():
    assert "tpu_custom_call" in lowered(
        jax.vmap(lambda x: OP(x, by=2.0)),
        "tpu",
        arguments=(jax.ShapeDtypeStruct((3, *X.shape), jnp.float32),),
    )


def test_kernels_are_interpreted_anywhere(draw):
    x = draw.normal(size=X.shape).astype(np.float32)
    found = OP(x, by=2.0, implementation="tpu", interpret=pltpu.InterpretParams())
    np.testing.assert_allclose(found, scaled(x, by=2.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(implementation="triton"), "implementation='triton' is none of 'reference', 'gpu', 'tpu', None"),
        (dict(interpret=True), "name it: implementation='gpu' or 'tpu'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(Unsupported, match=message):
        OP(jnp.ones((8, 128)), by=2.0, **options)


def test_an_implementation_that_there_is_not():
    with pytest.raises(Unsupported, match="scaled has no kernel for the gpu"):
        Op("scaled", scaled)(jnp.ones((8, 128)), by=2.0, implementation="gpu")


def test_what_is_counted_is_the_reference():
    """Whoever walks a program finds the specification inside the call."""
    jaxpr = jax.make_jaxpr(lambda x: OP(x, by=2.0))(X)
    assert " sin " in str(jaxpr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "tpu" not in str(jax.jit(lambda x: OP(x, by=2.0)).lower(X).as_text())
