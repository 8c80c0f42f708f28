"""Every answer is the one that its request gets alone, whoever is beside it and whenever it joins."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.decoding.generate import generate, left_pad
from effjax.decoding.policies.dhsa import DHSA
from effjax.decoding.policies.heavy_hitters import HeavyHitters
from effjax.decoding.policies.kvmerger import KVMerger
from effjax.decoding.policies.policy import Policy
from effjax.decoding.policies.recycled import RecycledAttention
from effjax.decoding.policies.window import Window
from effjax.decoding.sampling import Sampling
from effjax.decoding.serving.engine import Engine
from effjax.decoding.serving.lane import Lane
from effjax.decoding.serving.requests import QueueFull, Request, TooLarge
from effjax.decoding.storage.paged import NONE, Paged
from effjax.decoding.storage.quantised import Quantised
from effjax.errors import UsageError
from effjax.ffn import Mixture
from effjax.models.lm import LM
from effjax.models.routed_lm import routed
from tests.decoding.policies.common import toy, variables

LENGTH, PAGE, ROWS, PAGES = 32, 4, 3, 14
POLICIES = {
    "all": Policy(),
    "window": Window(budget=12, sinks=2),
    "heavy_hitters": HeavyHitters(budget=12),
    "kvmerger": KVMerger(budget=12, sinks=1, epsilon=0.3),
    "recycled": RecycledAttention(budget=8, stride=3, pool=1),
    "dhsa": DHSA(budget=10, local=4, block=4, chunk=3),
    "by_token": Policy(storage=Quantised(bits=8, keys="token", group=4, residual=0)),
    "by_channel": Policy(storage=Quantised(bits=4, group=4, residual=8)),
    "both": HeavyHitters(budget=12, storage=Quantised(bits=8, keys="token", group=4, residual=0)),
}
# What blocks of queries, or groups of slots, make of padding in front: `generate` has none of it.
UNPADDED = ("dhsa", "by_channel")
STATES = {
    "mamba": dict(mixer=dict(kind="mamba"), ffn=None),
    "mamba2": dict(mixer=dict(kind="mamba2", head=8, state=8), ffn=None),
}
GREEDY = Sampling(temperature=0.0)


def model_of(kind):
    return toy(block=STATES[kind]) if kind in STATES else toy()


@functools.cache
def variables_of(kind):
    if kind not in STATES:
        return variables()
    held = jax.jit(model_of(kind).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda leaf: leaf * (4.0 if leaf.ndim > 2 else 1.0), meta.unbox(held))


@functools.cache
def lane(kind, apart=False):
    model, held = model_of(kind), variables_of(kind)
    held = model.layers_apart(held) if apart else held
    return Lane(model, held, POLICIES.get(kind), ROWS, LENGTH, PAGE, PAGES)


def engine(*kinds, queue=64, apart=False):
    """Lanes go from test to test, as they are left: that is a part of what is tested."""
    ticks = itertools.count()
    return Engine({kind: lane(kind, apart) for kind in kinds}, queue, lambda: float(next(ticks)))


def requests(draw, count, kinds, sampled=True):
    made = []
    for i in range(count):
        prompt = tuple(int(token) for token in draw.integers(0, 17, draw.integers(1, 18)))
        how = Sampling(1.2, top_k=9, top_p=0.9, min_p=0.01) if sampled and i % 2 else GREEDY
        stop = frozenset(map(int, draw.integers(0, 17, i % 2)))
        made.append(Request(prompt, int(draw.integers(1, 15)), how, i, stop, kinds[i % len(kinds)]))
    return made


def finish(engine):
    events = []
    while engine.wait(0.0):
        events += engine.step()
    return events


def alone(request, apart=False):
    server = engine(request.cache, apart=apart)
    answer = server.submit(dataclasses.replace(request))
    finish(server)
    return answer.tokens


def generated(request):
    """What the decoding loop writes for one prompt, up to a stop token."""
    model, held = (
        model_of(request.cache).clone(cache=POLICIES.get(request.cache)),
        variables_of(request.cache),
    )
    # Padded to one size, and so with one program.
    beside = [] if request.cache in UNPADDED else [[1] * 18]
    rows, lengths = (array[:1] for array in left_pad([list(request.prompt), *beside]))
    key = jax.random.key(request.seed)
    text = generate(model, held, rows, lengths, 15, key, request.sampling, None, LENGTH)[0].tolist()
    text = text[: request.max_new]
    stops = [i for i, token in enumerate(text) if token in request.stop_tokens]
    return text[: stops[0] + 1] if stops else text


@pytest.mark.parametrize("kind", [*POLICIES, *STATES])
def test_an_answer_is_what_generate_writes(draw, kind):
    server = engine(kind)
    answers = [server.submit(request) for request in requests(draw, 2 if kind in UNPADDED else 6, [kind])]
    finish(server)
    for answer in answers:
        assert answer.tokens == generated(answer.request)


@pytest.mark.parametrize("apart", [False, True], ids=["scan", "apart"])
def test_neighbours_change_nothing(draw, apart):
    kinds = [kind for kind in (*POLICIES, *STATES) if not apart or kind not in ("all", "both", "by_token")]
    asked = requests(draw, 3 * len(kinds), kinds)
    expected = [alone(request, apart) for request in asked]
    server, answers = engine(*kinds, apart=apart), []
    for request in asked:  # others join while some write, and some leave between
        answers.append(server.submit(request))
        for _ in range(draw.integers(0, 4)):
            server.step()
        if len(answers) % 5 == 0:
            server.cancel(server.submit(requests(draw, 1, kinds)[0]))
    finish(server)
    assert [answer.tokens for answer in answers] == expected
    assert len({*map(tuple, expected)}) > 10
    for told in server.state().values():
        assert told["free_pages"] == told["pages"]
        assert told["running"] == told["waiting"] == 0


@pytest.mark.parametrize("kind", ["by_channel", "mamba"])
def test_rows_that_are_whole_have_bytes_of_their_own(kind):
    held = lane(kind)
    assert (held.page, held.pages, held.pool_bytes) == (LENGTH, ROWS, 0)
    alone = jax.eval_shape(lambda: held.held.reader.init_cache(1, LENGTH))
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(alone))
    assert held.bytes_of(1) == held.cache_bytes // ROWS == one
    server = engine(kind)
    answers = [server.submit(Request((1, 2), 4, GREEDY, cache=kind)) for _ in range(ROWS + 1)]
    server.step()
    assert server.state()[kind] == dict(rows=ROWS, running=ROWS, waiting=1, pages=ROWS, free_pages=0)
    finish(server)
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert answers[0].cache_bytes == one


def test_events_tell_all_and_why_it_ended(draw):
    server = engine("all", "window")
    asked = requests(draw, 7, ["all", "window"])
    answers = [server.submit(request) for request in asked]
    events = finish(server)
    for answer in answers:
        mine = [event for event in events if event.answer is answer]
        assert [event.token for event in mine] == answer.tokens
        assert [event.end for event in mine[:-1]] == [None] * (len(mine) - 1)
        stopped = answer.tokens[-1] in answer.request.stop_tokens
        assert mine[-1].end == answer.end == ("stop" if stopped else "length")
        assert answer.arrived < answer.joined < answer.first <= answer.ended


def test_a_cancelled_request_leaves_whether_it_runs_or_waits():
    server = engine("all")
    long = Request((1, 2, 3), 29, GREEDY)  # 8 pages of 14: the second waits
    first, second, third = (server.submit(long) for _ in range(3))
    server.step()
    assert server.state()["all"] == dict(rows=3, running=1, waiting=2, pages=PAGES, free_pages=6)
    server.cancel(first)
    server.cancel(third)
    events = server.step()
    assert {event.answer for event in events if event.end == "cancelled"} == {first, third}
    assert server.state()["all"] == dict(rows=3, running=1, waiting=0, pages=PAGES, free_pages=6)
    server.cancel(first)  # once more does nothing
    finish(server)
    assert len(first.tokens) == 1
    assert second.tokens == generated(long)[:15] + second.tokens[15:]
    assert server.state()["all"]["free_pages"] == PAGES


def test_a_row_that_left_writes_into_no_page_of_others(draw):
    """The pages of an answer that ended are another one's in the same step; the old row still steps."""
    held = lane("all")
    server = Engine({"all": held}, 9)
    short, long = Request((1, 2), 2, GREEDY), Request((3, 1), 25, GREEDY)
    for request in (short, long, short):
        server.submit(request)
    for _ in range(4):
        server.step()
    late = Request(tuple(map(int, draw.integers(0, 17, 9))), 9, GREEDY)
    expected = generated(late)
    answer = server.submit(late)  # into the first row, with the page that the third had
    server.step()
    tables = np.asarray(held.running.caches.keys.table)[0]  # [B, each]
    owned = tables[tables != NONE].tolist()
    assert len(owned) == len(set(owned)) == PAGES - server.state()["all"]["free_pages"]
    finish(server)
    assert answer.tokens == expected


def test_a_full_queue_refuses_and_a_free_row_does_not():
    server = engine("all", "window", queue=2)
    small = Request((1,), 9, GREEDY)
    for _ in range(3):
        server.submit(small)  # one for each row
    server.step()
    server.submit(small)
    waiting = server.submit(small)
    with pytest.raises(QueueFull, match="2 requests wait, and 2 may"):
        server.submit(small)
    elsewhere = server.submit(dataclasses.replace(small, cache="window"))
    server.cancel(waiting)
    server.step()
    server.submit(small)
    finish(server)
    assert elsewhere.tokens == generated(elsewhere.request)


def test_bytes_are_those_of_the_arrays():
    held = lane("heavy_hitters")
    caches = held.running.caches
    # Keys and values of the pages of 4 slots, 2 groups of 4 channels, 2 layers, in float32.
    assert held.pool_bytes == 2 * 2 * PAGES * 4 * 2 * 4 * 4 == caches.keys.pages.nbytes * 2
    assert held.cache_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    assert held.bytes_of(3) - held.bytes_of(2) == held.pool_bytes // PAGES
    server = engine("heavy_hitters")
    answer = server.submit(Request((1, 2, 3), 4, GREEDY, cache="heavy_hitters"))
    finish(server)
    assert answer.cache_bytes == held.bytes_of(2)


def test_programs_are_as_many_as_sizes(draw):
    held = lane("all")
    assert held.sizes == (16, 32)
    held.warm()
    assert sorted(held._programs) == [0, 16, 32]


@dataclasses.dataclass(frozen=True)
class Counting(Policy):
    """Remembers the number of steps, of all rows together."""

    def axes(self):
        return dataclasses.replace(super().axes(), state=dict(steps=()))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: engine("all").submit(Request((1,), 99)), TooLarge, "more than a sequence of 32 holds"),
        (lambda: engine("all").submit(Request((17,), 9)), UsageError, "token 17 is unknown"),
        (
            lambda: engine("all").submit(Request((1,), 9, cache="al")),
            UsageError,
            "cache is 'al', which is not served. Did you mean 'all'",
        ),
        (lambda: Engine({}, 3), UsageError, "there are no lanes"),
        (lambda: Engine({"all": lane("all")}, -1), UsageError, "queue=-1"),
        (lambda: Lane(toy(), variables(), Policy(), 0, 48), UsageError, "rows=0"),
        (lambda: Lane(toy(), variables(), Policy(), 1, 1), UsageError, "length=1"),
        (lambda: Lane(toy(), variables(), Policy(), 1, 40, 16), UsageError, "page=16 does not divide the 40"),
        (lambda: Lane(toy(), variables(), Window(8), 1, 48), UsageError, "page=16 does not divide the 8"),
        (
            lambda: Lane(toy(), variables(), Policy(storage=Paged(4)), 1, 48),
            UsageError,
            "leave the storage of the policy out",
        ),
        (
            lambda: Lane(model_of("mamba"), variables_of("mamba"), Policy(), 1, 48),
            UsageError,
            "Mamba keeps a state of a set size instead: serve it without a cache policy",
        ),
        (
            lambda: Lane(routed(toy(), windows=4), variables(), None, 1, 48),
            UsageError,
            "RoutedLM keeps something else than keys and values, or a state",
        ),
        (
            lambda: Lane(toy(), variables(), Counting(), 1, 48),
            UsageError,
            "Counting remembers something that",
        ),
        (
            lambda: Lane(toy(), variables(), HeavyHitters(storage=Quantised(group=4)), 1, 48),
            UsageError,
            "needs quantised storage with keys='token'",
        ),
        (
            lambda: Lane(
                LM(toy().block.clone(ffn=Mixture(hidden=8, experts=4, chosen=2, capacity=1.0)), 17, 16, 2),
                variables(),
                Policy(),
                1,
                48,
            ),
            UsageError,
            "serve the model with eval_capacity=",
        ),
    ],
)
def test_bad_input(make, error, said):
    with pytest.raises(error, match=said):
        make()
