"""The tests check the annotations of the library: a call that breaks one stops."""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import Array, Float

from effjax.errors import did_you_mean
from effjax.layers.dense import Dense
from effjax.train.fingerprint import fingerprint
from tests.annotations import jaxtyped

checked = jaxtyped(typechecker=beartype)


@checked
def sums(x: Float[Array, "n"], y: Float[Array, "n"] | None, times: int = 1) -> Float[Array, ""]:
    return times * jnp.sum(x if y is None else x + y)


@checked
def wrong(x: Float[Array, "n"]) -> Float[Array, "n"]:
    return x[1:]


@checked
def plain(times: int, name: str | None = None) -> float:
    return times / 2 if name is None else name  # type: ignore[return-value]


@checked
def given(function: Callable[[Float[Array, "n"]], int]) -> int:
    return function(jnp.ones(2))


@checked
def counted(until: int) -> Iterator[int]:
    yield from range(until)


@checked
@dataclasses.dataclass(frozen=True)
class Fields:
    count: int
    names: tuple[str, ...] = ()


@checked
@dataclasses.dataclass
class Shaped:
    x: Float[Array, "n"]
    y: Float[Array, "n"]


ONE, TWO = jnp.ones(1), jnp.ones(2)


def test_what_is_annotated_passes():
    assert sums(TWO, TWO, times=2) == 8
    assert (plain(3), given(len), list(counted(2))) == (1.5, 2, [0, 1])
    assert Fields(1, ("a",)).names == ("a",)
    assert Shaped(TWO, TWO).y.shape == (2,)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sums(jnp.ones((2, 2)), None),
        lambda: sums(ONE, TWO),
        lambda: sums(TWO, None, "2"),
        lambda: wrong(TWO),
        lambda: plain("3"),
        lambda: plain(3, "x"),
        lambda: given(3),
        lambda: counted("3"),
        lambda: Fields("1"),
        lambda: Fields(1, "ab"),
        lambda: Shaped(ONE, TWO),
        lambda: did_you_mean(3, ("a",)),
        lambda: fingerprint([1.0]),
        lambda: Dense("wide", ("embed", "mlp")),
    ],
)  # fmt: skip
def test_what_is_not_stops(call):
    with pytest.raises(Exception, match=r"(?i)type|hint"):
        call()
