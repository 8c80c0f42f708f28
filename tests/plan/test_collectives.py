"""Reading what a compiled program sends, from texts as the compilers write them."""

import jax
import pytest

from effjax.plan import hlo
from effjax.plan.collectives import Collective, collectives, located

MESH = {"data": 2, "tensor": 4}


def program(line, body=""):
    return f"""HloModule test

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {{
  %p = (s32[], f32[8,4]{{1,0}}) parameter(0)
  %k = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%k, %one)
  %x = f32[8,4]{{1,0:T(8,128)}} get-tuple-element(%p), index=1
{body}
  ROOT %out = (s32[], f32[8,4]{{1,0}}) tuple(%next, %x)
}}

%condition (q: (s32[], f32[8,4])) -> pred[] {{
  %q = (s32[], f32[8,4]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {{
  %a = f32[8,4]{{1,0}} parameter(0)
  %t = (s32[], f32[8,4]{{1,0}}) tuple(%zero, %a)
  %w = (s32[], f32[8,4]{{1,0}}) while(%t), condition=%condition, body=%body
{line}
}}
"""


def read(line="", body="", mesh=MESH, per_host=8):
    return collectives(hlo.parse(program(line, body)), mesh, per_host)


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("tensor",), 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("{}", ("data", "tensor"), 8),
        ("[2,4]<=[8]", ("tensor",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "tensor"), 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",), 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("tensor",), 4),
        ("mesh['x'=8] {'x':(1)2}", ("data",), 2),
        ("mesh['x'=8] {'x':(4)2}", ("tensor",), 2),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", ("data", "tensor"), 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", ("tensor",), 4),
    ],
)
def test_groups_in_every_spelling(groups, axes, size):
    line = f"  %r = f32[8,4]{{1,0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add"
    (found,), unknown = read(line)
    assert found == Collective("all-reduce", axes, size, 1, 1, 128)
    assert not unknown


@pytest.mark.parametrize(
    ("line", "kind", "whole"),
    [
        ("%r = f32[32,4] all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8]", "all-gather", 512),
        ("%r = f32[2,4] reduce-scatter(%a), channel_id=1, replica_groups=[2,4]<=[8]", "reduce-scatter", 128),
        ("%r = f32[8,4] all-to-all(%a), channel_id=1, replica_groups=[2,4]<=[8]", "all-to-all", 128),
        (
            "%r = (f32[8,4], f32[32,4]) all-gather-start(%a), channel_id=1, replica_groups=[2,4]<=[8]",
            "all-gather",
            512,
        ),
    ],
)
def test_bytes_are_those_of_the_whole_array(line, kind, whole):
    (found,), _ = read("  " + line)
    assert (found.kind, found.bytes) == (kind, whole)


def test_a_permutation_moves_along_one_axis():
    pairs = "{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"
    (found,), _ = read(f"  %r = f32[8,4] collective-permute(%a), channel_id=1, source_target_pairs={pairs}")
    assert (found.kind, found.axes, found.bytes) == ("collective-permute", ("tensor",), 128)


def test_those_of_a_shard_map_share_a_channel_and_are_told_apart_by_their_place():
    groups = "channel_id=1, replica_groups=[2,4]<=[8]"
    lines = [
        f'  %r{i} = f32[8,4] all-to-all(%a), {groups}, metadata={{op_name="f" stack_frame_id={place}}}'
        for i, place in enumerate((3, 4, 4))
    ]
    (found,), _ = read("\n".join(lines))
    assert (found.count, found.bytes) == (2, 256)


def test_every_trip_counts_and_a_repeated_channel_once():
    groups = "channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add"
    body = f"  %r = f32[8,4] all-reduce(%x), {groups}\n  %s = f32[8,4] all-reduce(%x), {groups}"
    (found,), _ = read(body=body)
    assert (found.count, found.bytes) == (5, 5 * 128)


def test_hosts_that_a_group_spreads_over():
    line = "  %r = f32[8,4] all-reduce(%a), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add"
    assert read(line, per_host=4)[0][0].hosts == 2
    assert read(line, per_host=8)[0][0].hosts == 1


def test_what_cannot_be_read_is_said():
    _, unknown = read("  %odd = f32[8,4] all-reduce(%a), channel_id=1, replica_groups=<new>, to_apply=%add")
    assert unknown == ["odd: between which devices is written in an unknown way"]


def test_a_group_of_one_sends_nothing():
    assert read("  %r = f32[8,4] all-reduce(%a), channel_id=1, replica_groups=[8,1]<=[8]") == ([], [])


def test_what_is_lowered_located_says_its_lines():
    """Tests lower without them, see tests/conftest.py."""
    lowered = lambda: jax.jit(lambda x: x + 1).lower(1.0).as_text(debug_info=True)
    assert "test_collectives.py" not in lowered()
    with located():
        assert "test_collectives.py" in lowered()
    assert "test_collectives.py" not in lowered()
