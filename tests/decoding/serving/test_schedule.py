import numpy as np
import pytest

from effjax.decoding.serving.requests import Answer, Request, TooLarge
from effjax.decoding.serving.schedule import Schedule
from effjax.errors import UsageError


def request(prompt, max_new):
    return Request((1,) * prompt, max_new)


def waiting(schedule, *sizes):
    answers = [Answer(request(*size), 0.0) for size in sizes]
    for answer in answers:
        schedule.check(answer.request)
        schedule.add(answer)
    return answers


@pytest.mark.parametrize(
    ("prompt", "max_new", "pages"), [(1, 1, 1), (4, 1, 1), (4, 2, 2), (8, 1, 2), (8, 8, 3), (3, 18, 3)]
)
def test_pages_are_those_of_the_tokens_that_are_read_up_to_a_full_cache(prompt, max_new, pages):
    schedule = Schedule(rows=2, pages=6, page=4, slots=12, length=20)
    assert schedule.pages_for(request(prompt, max_new)) == pages


def test_who_came_first_joins_first_and_nobody_passes():
    schedule = Schedule(rows=4, pages=5, page=4, slots=16, length=16)
    first, large, small = waiting(schedule, (4, 9), (8, 9), (1, 1))
    assert schedule.admit(1.0) == [first]  # 3 of 5 pages; the next needs 4
    assert (first.row, len(first.pages), first.joined) == (0, 3, 1.0)
    assert schedule.admit(2.0) == []
    assert schedule.idle == 1
    schedule.remove(first)
    assert first.pages == ()
    assert schedule.admit(3.0) == [large, small]
    assert [answer for _, answer in schedule.running] == [large, small]
    assert schedule.pool.free == 0
    assert not set(large.pages) & set(small.pages)


def test_who_waits_may_leave():
    schedule = Schedule(rows=1, pages=9, page=4, slots=16, length=16)
    first, second, third = waiting(schedule, (4, 4), (4, 4), (4, 4))
    schedule.admit(0.0)
    schedule.remove(second)
    schedule.remove(first)
    assert schedule.admit(0.0) == [third]
    schedule.remove(third)
    assert (schedule.pool.free, schedule.idle, schedule.running) == (9, 1, [])


def test_nothing_leaks_and_nothing_is_exceeded_whatever_comes(draw):
    schedule = Schedule(rows=5, pages=11, page=4, slots=24, length=40)
    alive = []
    for _ in range(600):
        if draw.random() < 0.5:
            alive += waiting(schedule, (int(draw.integers(1, 20)), int(draw.integers(1, 20))))
        if alive and draw.random() < 0.5:
            schedule.remove(alive.pop(draw.integers(len(alive))))
        schedule.admit(0.0)
        owned = [page for _, answer in schedule.running for page in answer.pages]
        assert len(owned) == len(set(owned)) == 11 - schedule.pool.free
        for row, answer in schedule.running:
            assert answer.row == row
            assert len(answer.pages) == schedule.pages_for(answer.request)
    for answer in alive:
        schedule.remove(answer)
    assert schedule.pool.free == 11
    assert not schedule.waiting


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((20, 22), "20 tokens and 22 new ones are more than a sequence of 40 holds: .* 21 tokens at most"),
        ((41, 1), "ask for 0 tokens at most"),
        ((20, 10), "need 6 pages of the cache, which has 5"),
    ],
)
def test_what_can_never_fit_is_refused(size, said):
    schedule = Schedule(rows=1, pages=5, page=4, slots=24, length=40)
    with pytest.raises(TooLarge, match=said):
        schedule.check(request(*size))


def test_bad_requests():
    with pytest.raises(UsageError, match="the prompt is empty"):
        Request((), 1)
    with pytest.raises(UsageError, match="max_new is 0"):
        Request((1,), 0)
    assert np.isclose(Answer(Request((1,), 1), 0.0).tokens_per_second, 0.0)
