import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.measure import dataflow
from effjax.measure.dataflow import WAYS, Dataflow, Points, inflections, measure_dataflow


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("rows", [1, 3, 8, 11])
def test_all_ways_are_the_same_product(draw, name, rows):
    x, w = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((rows, 12), (12, 7)))
    found = jax.jit(WAYS[name])(x, w)
    np.testing.assert_allclose(found, np.asarray(x, float) @ np.asarray(w, float), atol=1e-5)


def test_flat_pads_to_eight_and_no_further():
    for rows, padded in ((1, 8), (8, 8), (9, 16)):
        program = jax.make_jaxpr(WAYS["flat"])(jnp.ones((rows, 4)), jnp.ones((4, 3)))
        assert f"f32[{padded},3] = dot_general" in str(program)


ROWS = (1, 2, 4, 8, 16)


@pytest.mark.parametrize(
    ("fastest", "points"),
    [
        ("rffgg", Points(2, 8)),
        ("rrrrr", Points(17, 17)),
        ("ggggg", Points(1, 1)),
        ("fffff", Points(1, 17)),
        ("rrggg", Points(4, 4)),
        ("rfgfg", Points(2, 16)),  # no order has them all: g at 4 rows loses to f at 8
    ],
)
def test_points_are_where_the_fastest_changes(fastest, points):
    """1 second where a way is the fastest, 2 where it is not; 1.1 where it is overruled."""
    seconds = {name: [1.0 if name[0] == one else 2.0 for one in fastest] for name in WAYS}
    if fastest == "rfgfg":
        seconds["flat"][2] = 1.1
    assert inflections(ROWS, seconds) == points


def test_the_table_chooses_the_fastest_that_was_measured(monkeypatch):
    """With times made up: the way of each number of rows is the one whose time was least."""
    costs = {"row_by_row": lambda m: 1.0 * m, "flat": lambda m: 3 + 0.1 * m, "general": lambda m: 6.0}

    def timed(functions, inputs, repeats, costs_of=costs, **_):
        rows = inputs[0][0].shape[0]
        return types.SimpleNamespace(
            timings={name: types.SimpleNamespace(median=costs_of[name](rows)) for name in functions}
        )

    monkeypatch.setattr(dataflow, "compare", timed)
    table = measure_dataflow([(16, 8), (8, 16)])
    for points in table.points.values():
        for rows in dataflow.ROWS:
            assert points.way(rows) == min(WAYS, key=lambda name: costs[name](rows))
    assert table.points[16, 8] == Points(4, 32)


@pytest.mark.slow
def test_it_is_measured_on_the_machine_at_hand():
    table = measure_dataflow([(256, 512)], rows=(1, 8, 64), repeats=5)
    assert table.device == jax.devices()[0].device_kind
    x, w = jnp.ones((3, 512)), jnp.ones((512, 256))
    np.testing.assert_allclose(jax.jit(table.product)(x, w), 512.0)


def test_a_product_goes_the_way_of_the_table(monkeypatch):
    taken = {name: (lambda x, w, name=name: name) for name in WAYS}
    monkeypatch.setattr(dataflow, "WAYS", taken)
    table = Dataflow("abacus", {(3, 4): Points(2, 8)})
    found = [
        Dataflow.product.__wrapped__(table, jnp.ones((rows, 4)), jnp.ones((4, 3))) for rows in (1, 2, 7, 8)
    ]
    assert found == ["row_by_row", "flat", "flat", "general"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: inflections((2, 1), {}), "must ascend"),
        (lambda: inflections((1, 2), {"flat": [1.0, 1.0]}), "times be given for row_by_row, flat, general"),
        (
            lambda: Dataflow("abacus", {(3, 4): Points(2, 8)}).product(jnp.ones((1, 3)), jnp.ones((3, 4))),
            r"no matrix of \(4, 3\) outputs and inputs was measured on abacus.*Known: \(3, 4\)",
        ),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(UsageError, match=said):
        make()
