"""Reading compiled programs: types, loops, what is multiplied."""

import jax
import jax.numpy as jnp
import pytest

from effjax.measure import count
from effjax.plan import hlo


def module(condition, body, attributes=""):
    return hlo.parse(f"""HloModule test

%body (p: (s32[], f32[2])) -> (s32[], f32[2]) {{
  %p = (s32[], f32[2]) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %x = f32[2] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %three = s32[] constant(3)
{body}
}}

%condition (q: (s32[], f32[2])) -> pred[] {{
  %q = (s32[], f32[2]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(12)
{condition}
}}

ENTRY %main (a: f32[2]) -> f32[2] {{
  %a = f32[2]{{0}} parameter(0)
  %w = (s32[], f32[2]) while(%a), condition=%condition, body=%body{attributes}
}}
""")


LESS = "  ROOT %less = pred[] compare(%i, %n), direction=LT"


def trips(*parts):
    program = module(*parts)
    return hlo.trip_count(program, program.computations["main"]["w"])


def test_trips_by_the_step_of_the_counter():
    by_one = "  %next = s32[] add(%k, %one)\n  ROOT %t = (s32[], f32[2]) tuple(%next, %x)"
    by_four = "  %a = s32[] add(%k, %three)\n  %b = s32[] add(%a, %one)\n  ROOT %t = (s32[]) tuple(%b, %x)"
    assert trips(LESS, by_one) == 12
    assert trips(LESS, by_four) == 3


def test_a_counter_that_is_copied():
    body = "  %c = s32[] copy(%k)\n  %next = s32[] add(%c, %three)\n  ROOT %t = (s32[]) tuple(%next, %x)"
    assert trips(LESS, body) == 4


def test_an_element_of_a_tuple_taken_in_passing():
    text = """ENTRY %main (t: (bf16[4]{0}, /*index=1*/(f32[2,3]{1,0:T(8,128)}, s32[]))) -> f32[2,5] {
  %t = (bf16[4]{0}, /*index=1*/f32[2,3]{1,0:T(8,128)}, s32[]) parameter(0)
  %w = f32[3,5]{1,0} constant({...})
  ROOT %dot = f32[2,5]{1,0} dot(%t#1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    program = hlo.parse(text)
    assert program.computations["main"]["t#1"].type == "f32[2,3]{1,0:T(8,128)}"
    assert hlo.multiply_accumulates(program) == (30, [])


def test_what_the_compiler_says_goes_first():
    assert trips(LESS, "  ROOT %t = (s32[]) tuple(%k, %x)", ', c={"known_trip_count":{"n":"7"}}') == 7


@pytest.mark.parametrize(
    ("condition", "body"),
    [
        (LESS, "  ROOT %t = (s32[]) tuple(%k, %x)"),  # never counts up
        (LESS, "  %next = s32[] multiply(%k, %three)\n  ROOT %t = (s32[]) tuple(%next, %x)"),
        ("  ROOT %c = pred[] custom-call(%q)", "  ROOT %t = (s32[]) tuple(%k, %x)"),
    ],
)
def test_a_loop_whose_length_cannot_be_told(condition, body):
    assert trips(condition, body) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[2,3]{1,0:T(8,128)}", 24),
        ("(bf16[4]{0}, /*index=1*/s32[])", 12),
        ("s4[3]", 2),
        ("pred[7]", 7),
        ("f8e4m3fn[5]", 5),
        ("token[]", 0),
    ],
)
def test_bytes_of_types(text, size):
    assert hlo.bytes_of(text) == size


def dense(x, w):
    return jnp.tanh(x @ w)


def looped(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def convolved(x, w):
    return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("function", "x", "w"),
    [
        (dense, (4, 8), (8, 16)),
        (looped, (4, 8), (5, 8, 8)),
        (convolved, (2, 8, 8, 3), (3, 3, 3, 16)),
        (lambda x, w: jnp.einsum("bnhd,bmhd->bhnm", x, w), (2, 5, 3, 8), (2, 7, 3, 8)),
        (jax.grad(lambda x, w: looped(x, w).sum(), argnums=1), (4, 8), (5, 8, 8)),
    ],
)
def test_multiplies_as_much_as_the_jaxpr_says(function, x, w):
    """The compiler of this machine writes dots out; on one device nothing is cut."""
    shapes = [jax.ShapeDtypeStruct(side, jnp.float32) for side in (x, w)]
    text = jax.jit(function).lower(*shapes).compile().as_text()
    macs, unknown = hlo.multiply_accumulates(hlo.parse(text))
    assert macs == count(function, *shapes).macs
    assert not unknown


def test_a_loop_of_unknown_length_is_said():
    function = lambda x: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)
    text = jax.jit(function).lower(jax.ShapeDtypeStruct((3, 3), jnp.float32)).compile().as_text()
    macs, (unknown,) = hlo.multiply_accumulates(hlo.parse(text))
    assert macs == 0
    assert "length is not known" in unknown
