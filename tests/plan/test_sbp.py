"""The algebra of split, broadcast and partial, and its planner against all plans."""

import itertools

import pytest

from effjax.errors import UsageError
from effjax.plan.sbp import (
    B,
    Operation,
    P,
    Signature,
    Split,
    boxing,
    boxing_on,
    cheapest,
    contraction,
    cost,
    given,
    pointwise,
)

S0, S1 = Split(0), Split(1)


def test_a_product_has_the_six_signatures_of_the_paper():
    assert set(contraction("mk,kn->mn")) == {
        Signature((S0, B), S0),
        Signature((B, S1), S1),
        Signature((S1, S0), P),
        Signature((P, B), P),
        Signature((B, P), P),
        Signature((B, B), B),
    }


def test_batches_and_heads_are_cut_like_any_letter():
    attention = contraction("bnhd,bshd->bhns")
    assert Signature((Split(2), Split(2)), S1) in attention  # heads
    assert Signature((Split(3), Split(3)), P) in attention  # channels
    with pytest.raises(UsageError, match="each letter once"):
        contraction("ii->i")


@pytest.mark.parametrize(
    ("source", "target", "bytes_"),
    [
        (S0, S0, 0),
        (S0, S1, 750),
        (S0, B, 3000),
        (S0, P, 0),
        (B, S0, 0),
        (B, P, 0),
        (P, S1, 3000),
        (P, B, 6000),
    ],
)
def test_bytes_of_boxing(source, target, bytes_):
    assert boxing(source, target, 4, 1000) == bytes_


def test_axes_of_a_mesh_are_boxed_one_after_the_other():
    assert boxing_on((S0, B), (B, B), (4, 2), 1000) == 2 * 3000
    # Along the second axis only quarters are added up; then the first gathers whole ones, twice.
    assert boxing_on((S0, P), (B, B), (4, 2), 1000) == 4 * 2 * 250 + 2 * 3000
    assert boxing_on((S0,), (S1,), (4,), 1000) == boxing(S0, S1, 4, 1000)


def every(graph):
    """All plans of a small graph."""
    ways = itertools.product(*(one.signatures for one in graph))
    return [dict(zip([one.name for one in graph], way, strict=True)) for way in ways]


def mlp(batch, width, hidden, layers=1):
    """Two products with a gelu between and the sum with what entered, as often as there are layers."""
    graph = [given("x0", batch * width, S0, B)]
    for n in range(layers):
        graph += [
            given(f"w{n}", width * hidden, S0, S1, B),
            given(f"v{n}", hidden * width, S0, S1, B),
            Operation(f"h{n}", (f"x{n}", f"w{n}"), contraction("mk,kn->mn"), batch * hidden),
            Operation(f"g{n}", (f"h{n}",), pointwise(2), batch * hidden),
            Operation(f"y{n}", (f"g{n}", f"v{n}"), contraction("mk,kn->mn"), batch * width),
            Operation(f"x{n + 1}", (f"x{n}", f"y{n}"), pointwise(2, operands=2, linear=True), batch * width),
        ]
    return graph


@pytest.mark.parametrize("sizes", [(4, 16, 64), (512, 16, 64), (64, 64, 64)])
@pytest.mark.parametrize("whole_weights", [False, True])
def test_the_planner_finds_the_cheapest_of_all_plans(sizes, whole_weights):
    graph = mlp(*sizes)
    ends = {"x1": B}
    least = min(
        cost(graph, chosen, 8) + boxing(chosen["x1"].result, B, 8, sizes[0] * sizes[1])
        for chosen in every(graph)
        if whole_weights or {chosen[name].result for name in ("w0", "v0")} <= {S0, S1}
    )
    if not whole_weights:
        graph = [given(one.name, one.size, S0, S1) if one.name in ("w0", "v0") else one for one in graph]
    found = cheapest(graph, 8, ends)
    assert found.bytes == least
    end = boxing(found.chosen["x1"].result, B, 8, sizes[0] * sizes[1])
    assert cost(graph, found.chosen, 8) + end == least


def test_a_small_batch_cuts_the_weights_and_a_large_one_itself():
    """Megatron's layout where weights are many, data parallelism where examples are."""

    def chosen(batch):
        inputs = {"w": (S0, S1), "v": (S0, S1), "x": (S0,)}
        graph = [
            one if one.operands else given(one.name, one.size, *inputs[one.name[0]])
            for one in mlp(batch, 64, 256, layers=3)
        ]
        return cheapest(graph, 8, {"x3": S0}).chosen

    small = chosen(8)
    assert [small[name].result for name in ("w0", "h0", "g0", "v0", "y0", "x1")] == [S1, S1, S1, S0, P, S0]
    large = chosen(100_000)
    assert [large[name].result for name in ("h0", "g0", "y0", "h2")] == [S0] * 4


def test_what_several_need_is_boxed_once():
    product = (Signature((B, S1), S1),)
    graph = [given("x", 100, S0), given("w", 10, S1), given("v", 10, S1)]
    graph += [Operation("a", ("x", "w"), product, 50), Operation("b", ("x", "v"), product, 50)]
    assert cheapest(graph, 4).bytes == boxing(S0, B, 4, 100)


def test_a_graph_out_of_order_is_refused():
    with pytest.raises(UsageError, match="a takes x"):
        cheapest([Operation("a", ("x",), pointwise(1), 1), given("x", 1, B)], 2)
