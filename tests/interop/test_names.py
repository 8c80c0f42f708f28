import jax
import ml_dtypes
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.interop import names as n
from effjax.interop.names import Entry, Ignored, Name, ignored_by, resolve


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def entry(row, **leaves):
    return Entry(row, {path: spec(*shape) for path, shape in leaves.items()})


def numbers(shape, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)


# (layout, sizes, our shape, their shape, what one element of ours is in theirs: ours index -> theirs index)
LAYOUTS = {
    "as_is": (n.AS_IS, {}, (3, 4), (3, 4), ((1, 2), (1, 2))),
    "linear": (n.LINEAR, {}, (3, 4), (4, 3), ((1, 2), (2, 1))),
    "heads_in": (n.HEADS_IN, {}, (3, 2, 4), (8, 3), ((1, 1, 2), (6, 1))),
    "heads_in_bias": (n.HEADS_IN_BIAS, {}, (2, 4), (8,), ((1, 2), (6,))),
    "heads_out": (n.HEADS_OUT, {}, (2, 4, 3), (3, 8), ((1, 2, 0), (0, 6))),
    "conv": (n.CONV, {}, (2, 3, 4, 5), (5, 4, 2, 3), ((1, 2, 3, 4), (4, 3, 1, 2))),
    "patches": (n.PATCHES, {"p": 2, "q": 3}, (24, 5), (5, 4, 2, 3), ((1 * 12 + 2 * 4 + 3, 4), (4, 3, 1, 2))),
    "ones": ("1 1 c -> 1 c", {}, (1, 6), (1, 1, 6), ((0, 4), (0, 0, 4))),
    "rotary": ("(h d two) i -> i h (two d)", {"two": 2}, (3, 2, 4), (8, 3), ((1, 1, 3), (4 + 2 + 1, 1))),
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_put_each_number_in_its_place_and_back(kind, dtype):
    layout, sizes, ours, theirs, (here, there) = LAYOUTS[kind]
    row = entry(Name("x", "x", layout, sizes), x=ours)
    assert row.shapes == (theirs,)
    array = numbers(theirs, dtype)
    [loaded] = row.to_ours(array)
    assert loaded.shape == ours
    assert loaded[here] == array[there]
    [back] = row.to_theirs([loaded])
    assert back.dtype == dtype
    assert np.array_equal(back, array)


def test_a_layout_that_merges_nothing_makes_views():
    row = entry(Name("l.{layer}.x", "x", n.HEADS_IN), x=(2, 3, 2, 4))
    memory = numbers((2, 8, 3))
    [ours] = row.to_ours(memory)
    assert row.viewable
    assert np.shares_memory(ours, memory)
    assert not entry(Name("x", "x", n.PATCHES, {"p": 2, "q": 2}), x=(12, 5)).viewable


def test_fused_heads_are_split_in_equal_parts():
    row = entry(Name("qkv", ("q", "k", "v"), n.FUSED_IN), q=(3, 2, 4), k=(3, 2, 4), v=(3, 2, 4))
    assert row.shapes == ((24, 3),)
    array = numbers((24, 3))
    ours = row.to_ours(array)
    for part, leaf in enumerate(ours):
        assert np.array_equal(leaf.reshape(3, 8), array[part * 8 : part * 8 + 8].T)
    assert np.array_equal(row.to_theirs(ours)[0], array)


def test_parts_may_be_interleaved_by_head():
    row = entry(Name("qkv", ("q", "k", "v"), "(h part d) -> h d"), q=(2, 4), k=(2, 4), v=(2, 4))
    array = numbers((24,))
    ours = row.to_ours(array)
    assert np.array_equal(ours[1], array.reshape(2, 3, 4)[:, 1])
    assert np.array_equal(row.to_theirs(ours)[0], array)


def test_unequal_leaves_lie_one_after_another():
    row = entry(Name("l.{layer}.qkv", ("q", "k"), n.HEADS_IN), q=(2, 3, 4, 5), k=(2, 3, 1, 5))
    assert row.shapes == ((25, 3),)
    memory = numbers((2, 25, 3))
    q, k = row.to_ours(memory)
    assert np.array_equal(q[1].reshape(3, 20), memory[1, :20].T)
    assert np.array_equal(k[1].reshape(3, 5), memory[1, 20:].T)
    assert np.array_equal(row.to_theirs([q[1], k[1]])[0], memory[1])


def test_leaves_of_different_kinds_may_share_a_tensor():
    row = entry(Name("x", ("a", "b"), (n.LINEAR, n.AS_IS)), a=(3, 2), b=(4, 3))
    assert row.shapes == ((6, 3),)
    a, b = row.to_ours(numbers((6, 3)))
    assert np.array_equal(a, numbers((6, 3))[:2].T)
    assert np.array_equal(b, numbers((6, 3))[2:])
    assert np.array_equal(row.to_theirs([a, b])[0], numbers((6, 3)))


def test_several_of_theirs_are_joined():
    row = entry(Name(("cls", "reg"), "tokens", "1 n c -> n c", axis=1, parts=(1, 4)), tokens=(5, 6))
    assert row.shapes == ((1, 1, 6), (1, 4, 6))
    cls, reg = row.to_theirs([numbers((5, 6))])
    assert np.array_equal(cls, numbers((1, 1, 6)))
    assert np.array_equal(reg[0], numbers((5, 6))[1:])


def test_placeholders_are_leading_axes_and_may_count_otherwise():
    row = entry(Name("l.{layer}.e.{expert}.w", "w", n.LINEAR, at={"layer": range(1, 6, 2)}), w=(3, 2, 4, 5))
    assert row.counts == (3, 2)
    assert row.shapes == ((5, 4),)
    assert [row.names(index) for index in row.indices()][:3] == [
        ("l.1.e.0.w",),
        ("l.1.e.1.w",),
        ("l.3.e.0.w",),
    ]


def test_a_table_that_does_not_fit_the_model_names_every_path():
    rows = [Name("a", "a"), Name("a2", "a"), Name("b", "gone"), Ignored("z", "a buffer")]
    with pytest.raises(UsageError) as error:
        resolve(rows, {"a": spec(2), "left": spec(3, 4)})
    message = str(error.value)
    assert "a is twice" in message
    assert "gone is in the name map and not in the model" in message
    assert "left [3, 4] is in the model and not in the name map" in message


@pytest.mark.parametrize(
    ("row", "leaves", "said"),
    [
        (Name("l.{layer}", "x"), {"x": ()}, "1 placeholders"),
        (Name("x", "x", n.HEADS_IN), {"x": (3, 4)}, "does not fit a leaf of shape"),
        (Name("x", ("a", "b"), n.FUSED_IN_BIAS), {"a": (2, 4), "b": (1, 4)}, "interleaves"),
        (Name(("a", "b"), "x", parts=(1, 1)), {"x": (3,)}, "do not make up a length of 3"),
        (Name("l.{layer}", "x", at={"layer": (1, 2)}), {"x": (3, 4)}, "another number of layer"),
    ],
)
def test_a_row_that_cannot_be_is_refused(row, leaves, said):
    with pytest.raises(UsageError, match=said):
        entry(row, **leaves)


def test_classifier_rows_may_be_absent_from_the_model():
    rows = [Name("a", "a"), Name("head", "head", classifier=True)]
    entries, absent = resolve(rows, {"a": spec(2)})
    assert [e.row.theirs for e in entries] == ["a"]
    assert absent == [rows[1]]


def test_ignored_names_match_whole():
    rows = [Ignored(r"blocks\.\d+\.index", "a buffer")]
    assert ignored_by(rows, "blocks.3.index").reason == "a buffer"
    assert ignored_by(rows, "blocks.3.index2") is None
