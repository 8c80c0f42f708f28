"""Loops, branches, calls and gradients: how often each thing runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from effjax.errors import UsageError
from effjax.measure import count

f32 = jnp.float32
SQUARE = jax.ShapeDtypeStruct((4, 4), f32)
ONCE = 4 * 4 * 4


def macs(function, *arguments, **options):
    cost = count(function, *arguments, parameters=None, **options)
    assert cost.unknown == ()
    return cost.macs


def times(length, body):
    return lambda x: lax.scan(lambda carry, _: (body(carry), None), x, length=length)[0]


def test_scan_counts_every_trip_also_nested():
    assert macs(times(7, lambda x: x @ x), SQUARE) == 7 * ONCE
    assert macs(times(7, times(5, lambda x: x @ x)), SQUARE) == 35 * ONCE
    assert macs(lambda x: lax.map(lambda row: row @ x, x), SQUARE) == ONCE


def test_scan_over_stacked_weights_is_dense_and_attention_in_it_is_attention():
    stacked = jax.ShapeDtypeStruct((3, 8, 8), f32)
    tokens = jax.ShapeDtypeStruct((2, 5, 8), f32)

    def layers(weights, x):
        def layer(x, w):
            logits = jnp.einsum("bqc,bkc->bqk", x, x)
            return jnp.einsum("bqk,bkc->bqc", logits, x) @ w, None

        return lax.scan(layer, x, weights)[0]

    cost = count(layers, stacked, tokens)
    assert cost.macs_by_kind == {"attention": 3 * 2 * (2 * 5 * 5 * 8), "dense": 3 * (2 * 5 * 8 * 8)}
    backward = count(jax.value_and_grad(lambda w, x: layers(w, x).sum()), stacked, tokens)
    # A weight gradient multiplies two activations, yet it is dense work.
    assert backward.macs_by_kind["dense"] == 3 * cost.macs_by_kind["dense"]


def test_activations_reach_a_carry_that_starts_as_zeros():
    """A linear-attention state: outer products summed into a matrix that begins as a constant."""
    keys = jax.ShapeDtypeStruct((6, 2, 4), f32)

    def states(k):
        def step(state, k):
            return state + jnp.einsum("bi,bij->bj", k, state)[:, :, None], None

        return lax.scan(step, jnp.zeros((2, 4, 4)), k)[0]

    assert count(states, keys, parameters=None).macs_by_kind == {"attention": 6 * 2 * 16}


@pytest.mark.parametrize(
    ("start", "test", "step", "trips"),
    [
        (0, lambda i: i < 7, lambda i: i + 1, 7),
        (0, lambda i: i < 7, lambda i: i + 2, 4),
        (1, lambda i: i <= 7, lambda i: i + 2, 4),
        (0, lambda i: 7 > i, lambda i: 3 + i, 3),  # noqa: SIM300
        (9, lambda i: i > 0, lambda i: i - 4, 3),
        (9, lambda i: i >= 1, lambda i: i - 4, 3),
        (0, lambda i: i != 6, lambda i: i + 3, 2),
        (7, lambda i: i < 7, lambda i: i + 1, 0),
    ],
)
def test_a_while_with_a_counter_is_counted(start, test, step, trips):
    """Also by running it: the closed form must agree with what the loop does."""

    def loop(x):
        return lax.while_loop(lambda c: test(c[0]), lambda c: (step(c[0]), c[1] @ c[1]), (start, x))[1]

    ran, i = 0, start
    while test(i):
        ran, i = ran + 1, step(i)
    assert ran == trips
    assert macs(loop, SQUARE) == trips * ONCE


def test_fori_loop_counts_whatever_form_it_takes():
    def loop(x, stop):
        return lax.fori_loop(0, stop, lambda _, x: x @ x, x)

    assert macs(functools.partial(loop, stop=5), SQUARE) == 5 * ONCE
    assert macs(lambda x: loop(x, jnp.int32(5)), SQUARE) == 5 * ONCE
    # The bound reaches the loop through a jitted call.
    assert macs(lambda x: jax.jit(loop)(x, np.int32(5)), SQUARE) == 5 * ONCE
    converted = jax.jit(lambda x, stop: loop(x, stop.astype(jnp.int32)))
    assert macs(lambda x: converted(x, np.int8(5)), SQUARE) == 5 * ONCE
    batched = jax.ShapeDtypeStruct((3, 4, 4), f32)
    assert macs(jax.vmap(lambda x: loop(x, jnp.int32(5))), batched) == 15 * ONCE


def data_dependent(x):
    with jax.named_scope("search"):
        return lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x @ x, x)


def test_a_loop_of_unknown_length_is_named_and_never_counted_once():
    cost = count(lambda x: data_dependent(x) @ x, SQUARE, parameters=None)
    assert cost.macs == ONCE
    assert cost.unknown == ("while at search: 144 FLOPs (64 MACs) a trip, its trip count is not known",)
    inside = count(times(3, data_dependent), SQUARE, parameters=None)
    assert (inside.macs, inside.unknown) == (0, cost.unknown)
    assert macs(data_dependent, SQUARE, trips=(("search", 6),)) == 6 * ONCE

    def nested(x):
        return lax.while_loop(lambda x: x.min() < 0.0, data_dependent, x)

    outer = "while at the top: 16 FLOPs (0 MACs) a trip, its trip count is not known"
    assert count(nested, SQUARE, parameters=None).unknown == (outer, *cost.unknown)


def test_the_test_of_a_loop_runs_once_more_than_its_body():
    def loop(x):
        return lax.while_loop(lambda x: (x @ x).sum() < 9.0, lambda x: x @ x @ x, x)

    assert macs(loop, SQUARE, trips=((".*", 6),)) == 7 * ONCE + 6 * 2 * ONCE


@pytest.mark.parametrize(
    "loop",
    [
        # The bound is data, the step is data, the counter is a float, the bound moves.
        lambda x, n: lax.fori_loop(0, n, lambda _, x: x @ x, x),
        lambda x, n: lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + n, c[1] @ c[1]), (0, x))[1],
        lambda x, n: lax.while_loop(lambda c: c[0] < 0.5, lambda c: (c[0] + 0.1, c[1] @ c[1]), (0.0, x))[1],
        lambda x, n: lax.while_loop(
            lambda c: c[0] < c[1], lambda c: (c[0] + 2, c[1] + 1, c[2] @ c[2]), (0, 9, x)
        )[2],
        # Runs until the counter overflows.
        lambda x, n: lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] - 1, c[1] @ c[1]), (0, x))[1],
    ],
)
def test_no_length_is_made_up(loop):
    cost = count(loop, SQUARE, jax.ShapeDtypeStruct((), jnp.int32), parameters=None)
    assert cost.macs == 0
    assert len(cost.unknown) == 1


def test_a_loop_without_products_is_named_too():
    def loop(x):
        return lax.while_loop(lambda x: x.sum() < 9.0, lambda x: x + 1.0, x)

    cost = count(loop, SQUARE, parameters=None)
    assert (cost.flops, cost.bytes) == (0, 0)
    assert cost.unknown == ("while at the top: 32 FLOPs (0 MACs) a trip, its trip count is not known",)
    # The sum is taken once more than the addition.
    assert count(loop, SQUARE, parameters=None, trips=((".*", 5),)).flops == 5 * 16 + 6 * (15 + 1)


def branching(x):
    with jax.named_scope("router"):
        return lax.switch(x[0, 0].astype(int), [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)


def test_cond_counts_the_dearest_branch_or_the_named_one():
    assert macs(branching, SQUARE) == 2 * ONCE
    for index, dots in enumerate((0, 2, 1)):
        assert macs(branching, SQUARE, branches=(("router", index),)) == dots * ONCE
    assert macs(branching, SQUARE, branches=(("elsewhere", 0),)) == 2 * ONCE
    with pytest.raises(UsageError, match=r"'router' has no branch 3\. Known: '0', '1', '2'"):
        count(branching, SQUARE, branches=((".*", 3),))


def net(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.square(x).sum()


NET = ([jax.ShapeDtypeStruct((8, 8), f32)] * 4, jax.ShapeDtypeStruct((5, 8), f32))
LAYER = 5 * 8 * 8


def test_the_gradient_of_a_dense_net_costs_three_forward_passes_less_one():
    """Forward, weight gradients and input gradients; the first layer's input needs no gradient."""
    assert count(net, *NET).macs == 4 * LAYER
    assert count(jax.value_and_grad(net), *NET).macs == (3 * 4 - 1) * LAYER
    assert count(jax.value_and_grad(net, argnums=(0, 1)), *NET).macs == 3 * 4 * LAYER


def test_rematerialisation_counts_again_what_it_runs_again():
    rematerialised = jax.checkpoint(net)
    assert count(rematerialised, *NET).macs == 4 * LAYER
    plain = count(jax.value_and_grad(net, argnums=(0, 1)), *NET).macs
    again = count(jax.value_and_grad(rematerialised, argnums=(0, 1)), *NET).macs
    assert again == plain + 4 * LAYER
    kept = jax.checkpoint(net, policy=jax.checkpoint_policies.dots_saveable)
    assert count(jax.value_and_grad(kept, argnums=(0, 1)), *NET).macs == plain


def test_custom_rules_are_followed_into_the_rule_that_runs():
    @jax.custom_vjp
    def cheap_backward(x):
        return x @ x

    cheap_backward.defvjp(lambda x: (x @ x, None), lambda _, g: (g,))
    assert macs(cheap_backward, SQUARE) == ONCE
    assert macs(jax.value_and_grad(lambda x: cheap_backward(x).sum()), SQUARE) == ONCE

    @jax.custom_jvp
    def dear_tangent(x):
        return x @ x

    dear_tangent.defjvp(lambda p, t: (dear_tangent(*p), t[0] @ p[0] @ p[0] @ p[0]))
    assert macs(dear_tangent, SQUARE) == ONCE
    assert macs(lambda x: jax.jvp(dear_tangent, (x,), (x,)), SQUARE) == 4 * ONCE


def test_vmap_counts_the_batch():
    batched = jax.ShapeDtypeStruct((6, 4, 4), f32)
    assert macs(jax.vmap(lambda x: x @ x), batched) == 6 * ONCE
    assert macs(jax.vmap(times(7, lambda x: x @ x)), batched) == 42 * ONCE


def test_what_no_output_needs_does_not_count():
    assert macs(lambda x: (x @ x, x @ x @ x)[0], SQUARE) == ONCE
    assert macs(lambda x: jax.jit(lambda x: (x @ x, x @ x.T))(x)[0], SQUARE) == ONCE
    # Of a scan, the stacked outputs that nothing reads.
    assert macs(lambda x: lax.scan(lambda c, _: (c @ c, c @ c.T), x, length=7)[0], SQUARE) == 7 * ONCE
    # The loss itself is not asked for, so its last product does not run.
    assert macs(jax.grad(lambda x: (x @ jnp.ones((4, 4))).sum()), SQUARE) == ONCE


def test_shard_map_counts_all_devices():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"), axis_types=auto)
    rows = PartitionSpec("data", None)
    whole = jax.ShapeDtypeStruct((8, 4), f32)

    def product(axes):
        return jax.shard_map(
            lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=axes, check_vma=False
        )

    # Each of the 8 devices multiplies its 2 rows.
    assert macs(product({"data", "tensor"}), whole) == 8 * (2 * 4 * 2)
    # Along an axis left to the compiler the body's work is divided, not repeated.
    assert macs(product({"data"}), whole) == 4 * (2 * 4 * 2)


def test_an_equation_of_no_known_form_is_named_where_it_hides_products():
    def solve(x):
        return lax.custom_linear_solve(lambda v: x @ v, x, lambda matvec, b: matvec(matvec(b)))

    assert count(solve, SQUARE, parameters=None).unknown == (
        "custom_linear_solve at the top: its work is not known",
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: x @ w,
        lambda w, x: jnp.einsum("bnc,bmc->bnm", x @ w, x),
        lambda w, x: jax.value_and_grad(lambda w: jnp.square(x @ w @ w).sum())(w),
        lambda w, x: jax.vmap(lambda row: row @ w @ row.T)(x),
    ],
)
def test_agrees_with_xla_where_there_is_no_loop(function):
    """XLA counts additions apart, and elementwise work too, which is small beside these dots."""
    arguments = jax.ShapeDtypeStruct((96, 96), f32), jax.ShapeDtypeStruct((3, 80, 96), f32)
    counted = count(function, *arguments)
    xla = jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]
    assert counted.flops == pytest.approx(xla, rel=0.02)
