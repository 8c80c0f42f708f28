import dataclasses
from typing import Any, Literal

import flax.linen as nn
import ml_collections
import pytest

from effjax.config import build, part
from effjax.errors import UsageError


class Mixer(nn.Module):
    heads: int
    rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Leaf:
    size: int = 3
    mode: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.size < 0:
            raise UsageError(f"size is {self.size}: it must not be negative.")


class Model(nn.Module):
    mixer: nn.Module = part({"mixer": Mixer, "leaf": Leaf})
    leaf: Leaf | None = None
    sizes: tuple[int, ...] = (1,)
    pair: tuple[int, str] = (1, "x")
    stages: tuple[Leaf, ...] = ()
    named: dict[str, Leaf] = dataclasses.field(default_factory=dict)
    anything: Any = None


GOOD = dict(mixer=dict(kind="mixer", heads=3))


def test_builds_nested_parts_from_dicts_and_config_dicts():
    section = dict(
        GOOD,
        leaf=dict(size=4),
        sizes=[2, 3],
        stages=(dict(size=1), dict(mode="b")),
        named=dict(x=dict(size=9)),
    )
    for config in (section, ml_collections.ConfigDict(section)):
        model = build(Model, config, "config.model")
        assert model.mixer == Mixer(heads=3)
        assert model.leaf == Leaf(4)
        assert model.sizes == (2, 3)
        assert model.stages == (Leaf(1), Leaf(mode="b"))
        assert model.named == {"x": Leaf(9)}


def test_an_integer_serves_as_a_float_but_not_the_other_way():
    assert build(Mixer, dict(heads=3, rate=1), "c").rate == 1.0
    with pytest.raises(UsageError, match=r"c\.heads must be of type int, not float: 3\.0"):
        build(Mixer, dict(heads=3.0), "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mixr=1), r"config\.mixr is read by nobody: Model has no such field\. Did you mean 'mixer'\?"),
        (dict(mixer=dict(kind="mixr")), r"config\.mixer\.kind is 'mixr'.*Did you mean 'mixer'\?"),
        (dict(mixer=dict(heads=3)), r"config\.mixer\.kind is missing"),
        (dict(mixer=dict(kind="mixer")), r"config\.mixer\.heads is missing"),
        (dict(mixer=dict(kind="mixer", heads="3")), r"config\.mixer\.heads must be of type int, not str"),
        (dict(mixer=dict(kind="mixer", heads=True)), r"config\.mixer\.heads must be of type int, not bool"),
        (dict(mixer=3), r"config\.mixer must be a section"),
        (dict(leaf=dict(sise=1)), r"config\.leaf\.sise is read by nobody.*'size'"),
        (dict(leaf=dict(mode="c")), r"config\.leaf\.mode is 'c'\. Known: 'a', 'b'"),
        (dict(leaf=dict(size=-1)), r"config\.leaf: size is -1"),
        (dict(stages=(dict(size=1), dict(siz=1))), r"config\.stages\[1\]\.siz is read by nobody"),
        (dict(named=dict(x=dict(siz=1))), r"config\.named\.x\.siz is read by nobody"),
        (dict(pair=(1, 2, 3)), r"config\.pair must hold 2 values, not 3"),
        (dict(sizes=3), r"config\.sizes must be a tuple"),
    ],
)
def test_names_what_is_wrong_and_what_to_type(change, message):
    with pytest.raises(UsageError, match=message):
        build(Model, GOOD | change, "config")


def test_given_fields_are_not_keys():
    assert build(Mixer, dict(), "c", given={"heads": 2}).heads == 2
    with pytest.raises(UsageError, match="read by nobody"):
        build(Mixer, dict(heads=3), "c", given={"heads": 2})
