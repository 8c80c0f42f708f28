import numpy as np
import pytest

from effjax.compress.structure.choose import Least, kept, narrowed
from effjax.compress.structure.latency import LayerTimes, measured
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.structure.scores import Magnitude
from effjax.compress.structure.units import Sizes, keep, sizes
from effjax.errors import UsageError
from tests.compress import tiny
from tests.compress.structure.test_choose import calibration


def test_between_its_points_a_table_is_linear_in_every_direction():
    seconds = np.array([[1.0, 3.0], [2.0, 6.0]])
    table = LayerTimes(("heads", "hidden"), ((1, 3), (10, 20)), seconds)
    assert table.of(Sizes(heads=1, hidden=10)) == 1
    assert table.of(Sizes(heads=2, hidden=15)) == pytest.approx(3.0)
    assert table.of(Sizes(heads=3, qk=9, hidden=20)) == 6


def test_a_layer_is_timed_at_every_point_and_a_budget_of_seconds_is_met():
    network = tiny.language()
    layers = take_apart(network)
    table = measured(network, layers, ("heads", "hidden"), network.example, repeats=2)
    assert table.kinds == ("heads", "hidden")
    assert table.points == ((1,), (1, 8, 16, 32))
    assert (table.seconds > 0).all()

    told = LayerTimes(("hidden",), ((1, 32),), np.array([1.0, 3.0]))
    scores = Magnitude().score(network, layers, ("hidden",), calibration(network))
    single = Least(hidden=1, hidden_step=1)
    for order in ("worth", "worth_per_cost", "worth_less_cost"):
        stay = kept(layers, scores, [told] * 2, 4.0, single, order, 1.0)
        made = narrowed(layers, stay)
        assert sum(told.of(sizes(layer)) for layer in made) <= 4.0
        assert put_together(network, made).params


def test_layers_that_differ_have_no_table():
    network = tiny.language()
    first, second = take_apart(network)
    mixed = put_together(network, [keep(first, "hidden", range(8)), second])
    with pytest.raises(UsageError, match="equal layers"):
        measured(mixed, take_apart(mixed), ("hidden",), network.example)
