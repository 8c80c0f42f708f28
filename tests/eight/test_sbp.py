"""Signatures and boxing, on eight devices: what is valid computes the same, and costs what it says."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from effjax.plan import hlo
from effjax.plan.collectives import collectives
from effjax.plan.sbp import B, P, Partial, Split, boxed, boxing, contraction, pointwise, received

DEVICES = 8
LAYOUTS = (Split(0), Split(1), B, P)


@functools.cache
def mesh():
    return jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def spec(layout, dimensions):
    """What stands on the devices; a partial sum has an axis in front, one place for each."""
    if layout == P:
        return PartitionSpec("x")
    cut = [None] * dimensions
    if isinstance(layout, Split):
        cut[layout.dimension] = "x"
    return PartitionSpec(*cut)


def laid_out(x, layout, draw):
    if layout != P:
        return x
    parts = draw.normal(size=(DEVICES, *x.shape)).astype(np.float32)
    return parts + (x - parts.sum(0)) / DEVICES  # they add up to x


def mapped(function, operands, result, dimensions):
    """A function of what a device holds, from whole arrays to a whole array."""

    def local(*arrays):
        held = [x[0] if layout == P else x for x, layout in zip(arrays, operands, strict=True)]
        made = function(*held)
        return made[None] if result == P else made

    specs = tuple(spec(layout, n) for layout, n in zip(operands, dimensions[:-1], strict=True))
    out = spec(result, dimensions[-1])
    return jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=specs, out_specs=out, check_vma=False))


def computed(function, signature, arrays, dimensions, draw):
    given = [laid_out(x, layout, draw) for x, layout in zip(arrays, signature[0], strict=True)]
    made = np.asarray(mapped(function, *signature, dimensions)(*given))
    return made.sum(0) if signature[1] == P else made


def right(made, wanted):
    return made.shape == wanted.shape and np.allclose(made, wanted, rtol=1e-4, atol=1e-4)


def test_valid_signatures_of_a_product_compute_it_and_no_others_do(draw):
    x, w = (draw.normal(size=shape).astype(np.float32) for shape in ((16, 24), (24, 8)))
    valid = {(one.operands, one.result) for one in contraction("mk,kn->mn")}
    passed = set()
    for left, other, result in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS):
        signature = ((left, other), result)
        try:
            made = computed(jnp.matmul, signature, (x, w), (2, 2, 2), draw)
        except TypeError:  # the inner sides do not fit
            continue
        if right(made, x @ w):
            passed.add(signature)
    assert passed == valid


@pytest.mark.parametrize(("function", "linear"), [(jnp.tanh, False), (jnp.negative, True)])
def test_only_what_is_linear_is_taken_of_partial_sums(draw, function, linear):
    x = draw.normal(size=(16, 8)).astype(np.float32)
    for one in pointwise(2, linear=True):
        made = computed(function, (one.operands, one.result), (x,), (2, 2), draw)
        assert right(made, np.asarray(function(x))) == (linear or one.result != P)


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_boxing_keeps_the_tensor_and_costs_its_bytes(draw, source, target):
    x = draw.normal(size=(16, 24)).astype(np.float32)
    function = functools.partial(boxed, source=source, target=target, axis="x")
    compiled = mapped(function, (source,), target, (2, 2)).lower(laid_out(x, source, draw)).compile()
    made = np.asarray(compiled(jax.device_put(laid_out(x, source, draw), compiled.input_shardings[0][0])))
    assert right(made.sum(0) if target == P else made, x)
    found, unknown = collectives(hlo.parse(compiled.as_text()), {"x": DEVICES}, DEVICES)
    assert not unknown
    moved = 0.0
    for one in found:
        # Of an all-to-all the bytes are those of one device.
        whole = one.bytes * DEVICES if one.kind == "all-to-all" else one.bytes
        moved += received(one.kind, DEVICES, whole)
    assert moved == boxing(source, target, DEVICES, x.nbytes)
    assert isinstance(source, Partial | Split) or moved == 0
