import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.matching import explain, match, named_leaves

TREE = {"blocks": {"mixer": {"kernel": np.zeros(2), "bias": np.zeros(1)}}, "head": {"kernel": np.zeros(3)}}


def test_first_matching_rule_wins_and_the_rest_take_the_default():
    rules = ((r"head/.*", "head"), (r".*/kernel", "kernel"))
    assert explain(rules, TREE, default=None) == {
        "blocks/mixer/bias": None,
        "blocks/mixer/kernel": "kernel",
        "head/kernel": "head",
    }
    assert match(rules, TREE, default="-")["blocks"]["mixer"] == {"bias": "-", "kernel": "kernel"}


def test_a_rule_must_match_the_whole_path():
    with pytest.raises(UsageError, match=r"decay\[0\]: 'kernel' matches no parameter.*'blocks/mixer/bias'"):
        match((("kernel", 1),), TREE, default=0, where="decay")


def test_a_shadowed_rule_is_of_use():
    assert named_leaves(match(((r".*", 1), (r"head/.*", 2)), TREE, default=0)) == dict.fromkeys(
        named_leaves(TREE), 1
    )


def test_a_bad_expression_is_named():
    with pytest.raises(UsageError, match=r"freeze\[1\]: '\(' is not a regular expression"):
        match(((".*", 1), ("(", 1)), TREE, default=0, where="freeze")
