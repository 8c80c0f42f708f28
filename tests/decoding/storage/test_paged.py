import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.config import build
from effjax.decoding.beam import Beams, beam_search
from effjax.decoding.generate import generate, left_pad
from effjax.decoding.policies.dhsa import DHSA
from effjax.decoding.policies.heavy_hitters import HeavyHitters
from effjax.decoding.policies.kvmerger import KVMerger
from effjax.decoding.policies.policy import Policy
from effjax.decoding.policies.recycled import RecycledAttention
from effjax.decoding.policies.window import Window
from effjax.decoding.sampling import Sampling
from effjax.decoding.storage.paged import NONE, Paged
from effjax.decoding.storage.plain import Plain
from effjax.errors import UsageError
from effjax.models.lm import LM
from tests.decoding.policies.common import BLOCK, stepwise, toy, variables

SLOTS, PAGE, POOL = 12, 4, 9
POLICIES = {
    "all": Policy(),
    "window": Window(budget=6),
    "heavy_hitters": HeavyHitters(budget=6),
    "kvmerger": KVMerger(budget=8, sinks=1, epsilon=0.3),
    "recycled": RecycledAttention(budget=6, stride=3),
    "dhsa": DHSA(budget=8, local=4, block=4, chunk=2),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_every_policy_is_the_same_in_pages_bit_for_bit(draw, kind):
    tokens, lengths = draw.integers(0, 17, (3, 14)), (14, 9, 12)
    policy = POLICIES[kind]
    plain, _, held = stepwise(toy(cache=policy), tokens, 9, lengths)
    storage = Paged(page=2)
    paged, _, caches = stepwise(toy(cache=dataclasses.replace(policy, storage=storage)), tokens, 9, lengths)
    np.testing.assert_array_equal(paged, plain)
    read = jax.jit(jax.vmap(storage.read))
    np.testing.assert_array_equal(read(caches.keys), held.keys)
    np.testing.assert_array_equal(read(caches.values), held.values)
    np.testing.assert_array_equal(caches.positions, held.positions)
    # The pool holds as much as the array did, measured; the table stands beside it.
    assert caches.keys.pages.nbytes == held.keys.nbytes


@pytest.fixture
def two(draw):
    """A pool of which two of three sequences own pages out of order, and what the sequences hold."""
    storage = Paged(PAGE, POOL)
    held = storage.empty("keys", 3, SLOTS, 2, 5, jnp.float32)
    tables = np.asarray([[7, 2, NONE], [NONE] * 3, [3, 8, 0]])
    numbers = draw.normal(size=(3, SLOTS, 2, 5)).astype(np.float32)
    for row in (0, 2):
        held = jax.jit(storage.place)(
            held, jnp.int32(row), jnp.asarray(tables[row], jnp.int32), jnp.asarray(numbers[row])
        )
    numbers[0, 2 * PAGE :] = 0
    numbers[1] = 0
    return storage, held, numbers


def test_pages_are_read_in_the_order_of_the_table(two):
    storage, held, numbers = two
    np.testing.assert_array_equal(storage.read(held), numbers)
    slots = jnp.asarray([[11, 0, 5], [1, 2, 3], [4, 4, 11]])
    rows = np.arange(3)[:, None]
    np.testing.assert_array_equal(storage.read_at(held, slots), numbers[rows, slots])
    each = jnp.stack([slots, slots[:, ::-1]], axis=2)  # another one of each group
    expected = numbers[rows[..., None], each, np.arange(2)]
    np.testing.assert_array_equal(storage.read_at(held, each), expected)


@pytest.mark.parametrize("written", [[6, 6, 6], [3, 0, 9], 7, 11])
def test_what_has_no_page_is_dropped_and_all_else_is_as_in_one_array(two, draw, written):
    storage, held, numbers = two
    new = draw.normal(size=(3, 2, 2, 5)).astype(np.float32)
    held = jax.jit(storage.append)(held, jnp.asarray(new), jnp.asarray(written))
    start = jnp.broadcast_to(jnp.asarray(written), (3,))
    numbers = np.array(Plain().append(jnp.asarray(numbers), jnp.asarray(new), start))
    numbers[0, 2 * PAGE :] = 0
    numbers[1] = 0
    np.testing.assert_array_equal(storage.read(held), numbers)


def test_a_slot_that_there_is_not_is_not_written(two):
    storage, held = two[:2]
    new = jnp.full((3, 1, 2, 5), 9.0)
    put = jax.jit(storage.put)(held, new, jnp.full((3, 1), SLOTS))
    np.testing.assert_array_equal(put.pages, held.pages)


def test_groups_put_into_slots_of_their_own(two, draw):
    storage, held, numbers = two
    slots = np.asarray([[[1, 9]], [[2, 3]], [[4, 0]]])
    new = draw.normal(size=(3, 1, 2, 5)).astype(np.float32)
    held = jax.jit(storage.put)(held, jnp.asarray(new), jnp.asarray(slots))
    numbers[0, 1, 0] = new[0, 0, 0]  # slot 9 of the first sequence has no page
    numbers[2, 4, 0], numbers[2, 0, 1] = new[2, 0]
    np.testing.assert_array_equal(storage.read(held), numbers)


def test_pages_of_nobody_stay_as_they_are(two, draw):
    storage, held, _ = two
    new = jnp.asarray(draw.normal(size=(3, SLOTS, 2, 5)), jnp.float32)
    filled = storage.append(held, new, jnp.int32(0))
    free = [1, 4, 5, 6]
    assert not np.asarray(filled.pages)[free].any()
    np.testing.assert_array_equal(filled.pages[np.asarray([7, 2])].reshape(-1, 2, 5), new[0, : 2 * PAGE])


def test_a_config_names_it_and_whole_texts_are_the_same():
    cache = dict(kind="window", budget=6, sinks=2, storage=dict(kind="paged", page=3))
    model = build(LM, dict(block=BLOCK, vocab=17, dim=16, depth=2, cache=cache), "model")
    assert model.cache == Window(budget=6, sinks=2, storage=Paged(3))

    def write(model):
        rows, lengths = left_pad([[3, 1, 4, 1], [5, 9]])
        return generate(model, variables(), rows, lengths, 9, jax.random.key(0), Sampling(0.7), slots=12)

    np.testing.assert_array_equal(write(model), write(toy(cache=Window(budget=6, sinks=2))))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Paged(page=0), "page=0 must be at least 1"),
        (lambda: Paged(pages=0), "pages=0 must be at least 1"),
        (
            lambda: toy(cache=Policy(storage=Paged(4))).init_cache(1, 14),
            "page=4 does not divide the 14 slots of a sequence: take a page that does, or 16 slots",
        ),
        (
            lambda: toy(cache=Window(6, storage=Paged(4))).init_cache(1, 64),
            "page=4 does not divide the 6 slots",
        ),
        (
            lambda: beam_search(
                toy(cache=Policy(storage=Paged(2))), variables(), *left_pad([[1, 2]]), 3, Beams(2)
            ),
            "a page belongs to one",
        ),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(UsageError, match=said):
        make()
