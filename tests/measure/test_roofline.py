"""The roofline's arithmetic in its limiting cases; that floors hold is measured in test_cpu.py."""

import dataclasses

import pytest

from effjax.errors import UsageError
from effjax.measure import (
    CHIPS,
    Floor,
    attainable,
    chip,
    collective_seconds,
    floor,
    floor_of,
    intensity,
    ridge,
)
from effjax.measure.roofline import COLLECTIVES

N = 2**30


@dataclasses.dataclass(frozen=True)
class Work:
    macs: int
    compulsory_bytes: int


def test_the_longest_need_is_the_floor_and_names_the_bound():
    for needs, bound in (((3, 2, 1), "compute"), ((1, 3, 2), "memory"), ((1, 2, 3), "network")):
        held = Floor(*map(float, needs))
        assert (held.seconds, held.bound, held.mfu) == (3.0, bound, needs[0] / 3)
    assert Floor(0.0, 0.0, 0.0).mfu == 0.0


def test_a_square_matrix_product_by_hand():
    """8192^3 in bfloat16 on v5e: 5.58 ms of arithmetic (published: 5.94 ms measured), 0.49 ms of memory."""
    held = floor((2 * 8192**3, "bfloat16"), 3 * 2 * 8192**2, chip("v5e"))
    assert held.compute == pytest.approx(5.581e-3, rel=1e-3)
    assert held.memory == pytest.approx(0.491e-3, rel=1e-3)
    assert held.bound == "compute"
    assert held.seconds < 5.944e-3


def test_dtypes_add_up_on_the_matrix_unit_and_float32_counts_as_tf32():
    h100 = chip("h100")
    mixed = floor({"bfloat16": 989.4e12, "float8_e4m3fn": 1978.9e12}, 0, h100)
    assert mixed.compute == pytest.approx(2.0)
    assert floor((494.7e12, "float32"), 0, h100).compute == pytest.approx(1.0)
    with pytest.raises(UsageError, match="v4 has no rate for float16"):
        floor((1.0, "float16"), 0, chip("v4"))


def test_a_cost_is_divided_over_devices():
    work = Work(macs=10**12, compulsory_bytes=10**9)
    one, eight = (floor_of(work, chip("v5p"), "bfloat16", devices=n) for n in (1, 8))
    assert one.compute == 2e12 / 459e12
    assert one.memory == 1e9 / 2765e9
    assert (eight.compute, eight.memory) == (one.compute / 8, one.memory / 8)
    assert floor_of(work, chip("v5p"), "bfloat16", network_seconds=1.0).bound == "network"
    with pytest.raises(UsageError, match="at least one"):
        floor_of(work, chip("v5p"), "bfloat16", devices=0)


@pytest.mark.parametrize("name", CHIPS)
def test_the_two_roofs_meet_at_the_ridge(name):
    held = chip(name)
    corner = ridge(held, "bfloat16")
    assert attainable(corner, held, "bfloat16") == pytest.approx(held.rate("bfloat16"))
    assert attainable(corner / 4, held, "bfloat16") == pytest.approx(held.rate("bfloat16") / 4)
    assert attainable(corner * 4, held, "bfloat16") == held.rate("bfloat16")
    # The floor says the same in seconds.
    work = floor((1e12, "bfloat16"), 1e12 / (corner / 4), held)
    assert 1e12 / work.seconds == pytest.approx(attainable(intensity(4.0, 16 / corner), held, "bfloat16"))
    assert work.bound == "memory"


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("name", CHIPS)
def test_a_collective_alone_is_free_and_grows_with_bytes_group_and_hosts(name, kind):
    held = chip(name)
    assert collective_seconds(kind, N, 1, held) == 0.0
    by_group = [collective_seconds(kind, N, n, held) for n in (2, 4, 8)]
    assert by_group == sorted(by_group)
    assert by_group[0] > 0
    assert collective_seconds(kind, 2 * N, 8, held) == 2 * by_group[-1]
    by_hosts = [collective_seconds(kind, N, 8, held, hosts=h) for h in (2, 4, 8)]
    assert by_hosts == sorted(by_hosts)
    # Nothing moves faster than over all links, and the network is slower than those.
    assert by_group[-1] <= by_hosts[0]
    assert by_group[-1] <= 2 * N / held.link


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather_where_no_switch_adds():
    for name, hosts in (("v5p", 1), ("v5e", 1), ("v4", 2), ("v6e", 4), ("a100", 1)):
        parts = sum(
            collective_seconds(kind, N, 16, chip(name), hosts) for kind in ("reduce-scatter", "all-gather")
        )
        assert collective_seconds("all-reduce", N, 16, chip(name), hosts) == pytest.approx(parts)


def test_switches_that_add_save_up_to_half_and_nothing_between_two():
    h100 = chip("h100")
    without = dataclasses.replace(h100, links_reduce=False, network_reduces=False)
    assert collective_seconds("all-reduce", N, 8, h100) == N / 450e9
    assert collective_seconds("all-reduce", N, 8, without) == pytest.approx(2 * N * 7 / 8 / 450e9)
    assert collective_seconds("all-reduce", N, 2, h100) == collective_seconds("all-reduce", N, 2, without)
    for kind in COLLECTIVES:
        for hosts in (1, 2, 8):
            fast, slow = (collective_seconds(kind, N, 8, held, hosts) for held in (h100, without))
            assert fast <= slow


def test_what_crosses_between_hosts_shares_their_cards():
    """16 H100 on 4 hosts: a host of 4 sends 3/4 of N through cards of 200 GB/s together."""
    h100 = chip("h100")
    assert collective_seconds("all-gather", N, 16, h100, hosts=4) == pytest.approx(N * 3 / 4 / 200e9)
    # Each device's own data goes to the other hosts in an all-to-all: no sharing.
    assert collective_seconds("all-to-all", N, 16, h100, hosts=4) == pytest.approx(N * 3 / 4 / 50e9)
    # One device a host leaves the links idle: the ring runs over the network.
    assert collective_seconds("all-gather", N, 4, h100, hosts=4) == pytest.approx(N * 3 / 4 / 50e9)


def test_a_misspelt_collective_and_an_uneven_group_are_usage_errors():
    with pytest.raises(UsageError, match=r"'allgather' is no collective.*'all-gather'"):
        collective_seconds("allgather", N, 8, chip("v5e"))
    with pytest.raises(UsageError, match="group of 6 devices does not divide over 4 hosts"):
        collective_seconds("all-gather", N, 6, chip("v5e"), hosts=4)
