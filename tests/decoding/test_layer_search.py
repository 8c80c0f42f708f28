"""Search over layer plans: on answers that are known, and on a network."""

import numpy as np
import pytest

from effjax.decoding.layer_search import Search, agreed, find_plans
from effjax.errors import UsageError


def asked(right, loss=lambda plan: 0.0):
    """A network of which is known which plans are right for which example; remembers what it was asked."""
    seen = []

    def run(plans):
        seen.append(plans.copy())
        told = [right(i, tuple(plan)) for i, plan in enumerate(plans.tolist())]
        return np.array(told), np.array([loss(tuple(plan)) for plan in plans.tolist()])

    return run, seen


def test_changes_are_skips_of_one_or_two_and_repeats():
    found = Search().changes((1, 2, 0, 1))
    skips = [(0, 2, 0, 1), (1, 0, 0, 1), (1, 2, 0, 0), (0, 0, 0, 1)]
    assert sorted([*skips, (2, 2, 0, 1), (1, 2, 0, 2)]) == found
    assert Search(longest=1.0).changes((1, 2, 0, 1)) == sorted(skips)
    assert Search(skips=()).changes((1, 1)) == [(1, 2), (2, 1)]


def test_the_shortest_right_plan_is_found():
    """One example needs a block twice, one any three blocks but the last, one cannot be answered."""

    def right(example, plan):
        if example == 0:
            return plan[1] == 2
        if example == 1:
            return sum(plan[:3]) >= 3
        return False

    run, _ = asked(right)
    plans, found, whole = find_plans(Search(turns=300, enough=None), run, 3, 4)
    np.testing.assert_array_equal(found, [1, 1, 0])
    np.testing.assert_array_equal(whole, [0, 1, 0])
    assert plans[0].tolist() == [0, 2, 0, 0]
    assert sum(plans[1]) == 3
    assert plans[2].tolist() == [1, 1, 1, 1]


def test_of_plans_as_long_that_of_fewer_blocks_is_taken():
    run, _ = asked(lambda i, plan: sum(plan) >= 2)
    plans, _, _ = find_plans(Search(turns=300, enough=None), run, 1, 3)
    assert sorted(plans[0]) == [0, 0, 2]


def test_a_sure_plan_may_be_worth_its_layers():
    """Any two blocks are right, but only the first and the last are sure."""
    losses = {(1, 0, 1): 0.01, (1, 1, 1): 0.0}
    for worth, expected in ((0.0, 2), (30.0, [1, 0, 1]), (1000.0, [1, 1, 1])):
        run, _ = asked(lambda i, plan: sum(plan) >= 2, lambda plan: losses.get(plan, 0.5))
        plans, _, _ = find_plans(Search(turns=300, enough=None, worth=worth), run, 1, 3)
        assert (sum(plans[0]) if worth == 0 else plans[0].tolist()) == expected


def test_a_search_ends_when_it_found_enough():
    run, seen = asked(lambda i, plan: plan[0] > 0)
    plans, _, _ = find_plans(Search(turns=60, enough=1), run, 1, 3)
    assert sum(plans[0]) <= 2
    assert len(seen) < 20
    run, seen = asked(lambda i, plan: plan[2] == 2)  # a first right answer is enough where there was none
    plans, found, whole = find_plans(Search(turns=60), run, 1, 3)
    assert (found[0], whole[0], plans[0, 2]) == (1, 0, 2)
    assert len(seen) < 60
    assert all(shape.shape == (1, 3) for shape in seen)


def test_no_plan_is_longer_than_allowed_and_seeds_repeat():
    run, seen = asked(lambda i, plan: False)
    find_plans(Search(turns=50, longest=1.5), run, 2, 4)
    assert max(plans.sum(axis=1).max() for plans in seen) == 6
    assert max(plans.max() for plans in seen) == 2
    for example in range(2):
        # Nothing is tried twice: of 81 plans of 4 blocks 5 are longer than 6.
        assert len({tuple(plans[example]) for plans in seen}) == 50
    run, again = asked(lambda i, plan: False)
    find_plans(Search(turns=50, longest=1.5), run, 2, 4)
    np.testing.assert_array_equal(seen, again)
    assert not np.array_equal(np.array(seen)[:, 0], np.array(seen)[:, 1])


def test_a_search_ends_when_nothing_is_left_to_try():
    run, seen = asked(lambda i, plan: plan == (2, 2))
    plans, found, _ = find_plans(Search(turns=99, enough=None), run, 1, 2)
    assert plans.tolist() == [[2, 2]]
    assert found.all()
    assert len(seen) == 10  # 9 plans, and the turn that finds no other


def test_short_plans_are_tried_more_often():
    tried = {}
    for penalty in (0.0, 3.0):
        run, seen = asked(lambda i, plan: True)
        find_plans(Search(turns=80, length_penalty=penalty, enough=None, random=0.0), run, 4, 6)
        tried[penalty] = np.mean(seen[10:]) * 6
    assert tried[3.0] < tried[0.0] - 0.5


def test_examples_agree_on_plans():
    plans = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 0, 0]], np.int32)
    right = np.array([[1, 1, 0, 1, 0], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], bool)
    # A layer costs a tenth: 0.3, 0.2, 0.4 and 0.1.
    counts, known = agreed(plans, right, np.zeros((4, 5)), 0.3)
    assert counts.tolist() == [[1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1]]
    assert known.tolist() == [True, True, True, True, False]
    counts, _ = agreed(
        plans, right, np.zeros((4, 5)), 0.9
    )  # now a layer is three tenths: -0.3, -0.2, 0 and -0.1
    assert counts.tolist() == [[1, 0, 1], [0, 1, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1]]


def test_who_agrees_may_still_be_surer_of_another_plan():
    plans = np.array([[1, 0, 1], [1, 1, 0]], np.int32)
    right = np.array([[1, 1, 1], [1, 1, 0]], bool)
    losses = np.array([[0.5, 0.1, 0.1], [0.0, 0.1, 0.0]])
    counts, _ = agreed(plans, right, losses, 1.0, worth=10.0)
    assert counts.tolist() == [[1, 1, 0], [1, 0, 1], [1, 0, 1]]


def test_bad_searches_are_named():
    with pytest.raises(UsageError, match="turns=0"):
        Search(turns=0)
    with pytest.raises(UsageError, match="random=2"):
        Search(random=2.0)
    with pytest.raises(UsageError, match=r"longest=0\.5"):
        Search(longest=0.5)
