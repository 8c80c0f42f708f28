"""Bytes read and written, and the bytes nothing avoids, against counts made by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from effjax.errors import UsageError
from effjax.measure import count

f32, i32 = jnp.float32, jnp.int32
F = 4
X = jax.ShapeDtypeStruct((16, 32), f32)
N = 16 * 32 * F


def shape(*sizes, dtype=f32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def moved(function, *arguments, **options):
    cost = count(function, *arguments, parameters=None, **options)
    assert cost.unknown == ()
    assert cost.bytes == cost.bytes_read + cost.bytes_written
    return cost.bytes_read, cost.bytes_written


def compulsory(function, *arguments, **options):
    return count(function, *arguments, parameters=None, **options).compulsory_bytes


def test_elementwise_work_is_one_read_and_one_write():
    assert moved(lambda x: jnp.exp(x) * 2.0 + x, X) == (N, N)
    assert moved(lambda x, y: jnp.where(x > 0, x, y), X, X) == (2 * N, N)
    # A shift on the way is fused, and so is what a constant becomes.
    assert moved(lambda x: jnp.exp(x)[:, :, None] + jnp.ones((16, 32, 5)), X) == (N, 5 * N)


def test_calls_are_seen_through():
    def twice(x):
        return jax.jit(jnp.exp)(jax.checkpoint(jnp.sin)(x))

    assert moved(twice, X) == (N, N)
    # The same inner function, called in two places.
    assert moved(lambda x, y: (twice(x), twice(y)), X, X) == (2 * N, 2 * N)


def test_a_reduction_stands_between_what_it_reads_and_what_reads_it():
    # The maximum reads x; the sum reads x and the maximum; the quotient reads all three.
    row = 16 * F
    assert moved(jax.nn.softmax, X) == (N + (N + row) + (N + 2 * row), row + row + N)


def test_a_product_reads_its_operands_from_memory():
    w = shape(32, 8)
    assert moved(jnp.matmul, X, w) == (N + 32 * 8 * F, 16 * 8 * F)
    # What it reads must be written first; what reads it is fused with nothing before.
    read, written = moved(lambda x, w: jnp.tanh(jnp.sin(x) @ w), X, w)
    assert written == N + 2 * (16 * 8 * F)
    assert read == N + (N + 32 * 8 * F) + 16 * 8 * F


def test_transposes_and_reshapes_are_other_views():
    assert moved(lambda x, w: x.T.reshape(32, 4, 4).reshape(32, 16) @ w, X, shape(16, 8)) == (
        N + 16 * 8 * F,
        32 * 8 * F,
    )
    # As an output a view is a copy.
    assert moved(lambda x: x.T, X) == (N, N)


def test_what_passes_through_moves_nothing():
    assert moved(lambda x, y: (x, y + 1), X, X) == (N, N)
    assert compulsory(lambda x, y: (x, y + 1), X, X) == 2 * N
    assert compulsory(lambda x, y: y + 1, X, X) == 2 * N


def test_gathers_and_slices_read_what_they_take():
    table, rows = shape(1000, 32), shape(7, dtype=i32)
    taken, indices = 7 * 32 * F, 7 * F
    read, written = moved(lambda table, rows: table.at[rows].get(mode="promise_in_bounds"), table, rows)
    assert (read, written) == (taken + indices, taken)
    assert moved(lambda x: x[:4] + 1.0, X) == (N // 4, N // 4)
    assert compulsory(lambda x: x[:4] + 1.0, X) == N // 2
    embed = lambda table, rows: table.astype(jnp.bfloat16)[rows]
    assert compulsory(embed, table, rows) == taken + indices + taken // 2
    # As soon as anything reads all of it, all of it counts.
    tied = lambda table, rows: table[rows] @ table.T
    assert compulsory(tied, table, rows) == 1000 * 32 * F + indices + 7 * 1000 * F


def test_an_update_writes_what_it_puts():
    cache, new, place = shape(64, 32), shape(1, 32), shape(dtype=i32)

    def put(cache, new, place):
        return lax.dynamic_update_slice(cache, new, (place, 0))

    row = 32 * F
    assert moved(put, cache, new, place) == (row + F, row)
    # Into an argument that must stay as it was, the whole is copied.
    assert compulsory(put, cache, new, place) == 64 * row + row + 64 * row + F
    assert compulsory(put, cache, new, place, donated=(0,)) == 2 * row + F

    def add(x, rows, new):
        return x.at[rows].add(new, mode="promise_in_bounds")

    read, written = moved(add, cache, shape(3, dtype=i32), shape(3, 32))
    # The rows that are added to are read too; the indices in a form of their own.
    assert (read, written) == (2 * 3 * row + 2 * 3 * F, 3 * row + 3 * F)


def test_a_donated_cache_in_a_scan_over_layers_stays_where_it_is():
    caches, x, place = shape(6, 64, 32), shape(1, 32), shape(dtype=i32)

    def layers(caches, x, place):
        def layer(x, cache):
            cache = lax.dynamic_update_slice(cache, x, (place, 0))
            return x + 1.0, cache

        return lax.scan(layer, x, caches)

    row = 32 * F
    assert compulsory(layers, caches, x, place, donated=(0,)) == 6 * row + 2 * row + F
    # Without donation every layer's cache is read and written.
    assert compulsory(layers, caches, x, place) == 2 * 6 * 64 * row + 2 * row + F


def test_loops_move_what_their_bodies_do_every_trip():
    def loop(x):
        return lax.scan(lambda c, _: (jnp.exp(c), None), x, length=7)[0]

    assert moved(loop, X) == (7 * N, 7 * N)
    assert compulsory(loop, X) == 2 * N

    # Stacked weights are read slice by slice, a carry stacked as an output is written once more.
    def layers(weights, x):
        return lax.scan(lambda x, w: (x * w, x), x, weights)

    assert moved(layers, shape(5, 16, 32), X) == (5 * (2 * N + N), 5 * (N + N))
    # An output of the body that is its input is copied.
    assert compulsory(layers, shape(5, 16, 32), X) == (5 + 1 + 1 + 5) * N
    counted = lambda x: lax.fori_loop(0, 6, lambda _, x: jnp.sin(x), x)
    assert moved(counted, X) == pytest.approx((6 * N, 6 * N), abs=6 * 3 * F)


def test_every_device_of_a_shard_map_moves_its_own():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=auto)
    rows = jax.sharding.PartitionSpec("data", None)

    def each(x, w):
        return jax.shard_map(
            lambda x, w: jnp.exp(x) @ w,
            mesh=mesh,
            in_specs=(rows, jax.sharding.PartitionSpec()),
            out_specs=rows,
            check_vma=False,
        )(x, w)

    w, out = 32 * 8 * F, 16 * 8 * F
    # Each reads its rows twice, as they come and as their exponentials, and the whole of w.
    assert moved(each, X, shape(32, 8)) == (2 * N + 4 * w, N + out)


def test_of_branches_the_dearest_or_the_named():
    def branching(x):
        return lax.cond(x[0, 0] > 0, lambda x: jnp.sort(x), lambda x: x + 1.0, x)

    dear = moved(branching, X, branches=((".*", 1),))
    cheap = moved(branching, X, branches=((".*", 0),))
    assert moved(branching, X) == dear
    assert dear[1] == cheap[1]


@pytest.mark.parametrize(("dtype", "bits"), [("int4", 4), ("int8", 8), ("bfloat16", 16), ("uint2", 2)])
def test_types_at_their_width(dtype, bits):
    weights = shape(32, 8, dtype=jnp.dtype(dtype))
    read, _ = moved(lambda x, w: w.astype(f32) + x, shape(32, 8), weights)
    assert read == 32 * 8 * bits // 8 + 32 * 8 * F


def test_a_kernel_moves_what_it_declares():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def multiply(x, y):
        declared = pl.CostEstimate(flops=1025, transcendentals=3, bytes_accessed=900)
        return pl.pallas_call(kernel, out_shape=shape(8, 8), interpret=True, cost_estimate=declared)(x, y)

    cost = count(multiply, shape(8, 8), shape(8, 8), parameters=None)
    assert (cost.flops, cost.transcendentals, cost.macs) == (1025, 3, 512)
    assert (cost.bytes_read, cost.bytes_written) == (900 - 256, 256)
    assert cost.intensity == 1025 / 900


def test_constants_closed_over_are_read():
    constant = jnp.ones((16, 32))
    assert moved(lambda x: x * constant, X) == (2 * N, N)
    assert compulsory(lambda x: x * constant, X) == 3 * N


@pytest.mark.parametrize(
    "function",
    [
        jax.nn.softmax,
        lambda x: jnp.tanh(x @ x.T) @ x,
        jax.grad(lambda x: jnp.square(jnp.tanh(x @ x.T)).sum()),
        lambda x: lax.scan(lambda c, r: (c + r, c), x[0], x),
        lambda x: jnp.sort(x[3:9]),
    ],
)
def test_no_schedule_moves_less_than_the_compulsory_bytes(function):
    cost = count(function, X, parameters=None)
    assert 0 < cost.compulsory_bytes <= cost.bytes


def test_a_donated_position_that_is_no_argument():
    with pytest.raises(UsageError, match="donated names argument 2: 1 were given"):
        count(jnp.sin, X, parameters=None, donated=(2,))
