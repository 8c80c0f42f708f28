import pytest

from effjax.decoding.serving.pages import Pages
from effjax.errors import UsageError


def test_pages_are_taken_once_and_given_back_once():
    pages = Pages(5)
    first, second = pages.take(2), pages.take(3)
    assert sorted((*first, *second)) == [0, 1, 2, 3, 4]
    assert pages.free == 0
    assert pages.take(1) is None
    assert pages.take(0) == ()
    pages.give(first)
    assert pages.free == 2
    assert pages.take(3) is None
    assert pages.free == 2  # nothing was taken
    assert set(pages.take(2)) == set(first)


@pytest.mark.parametrize("strange", [(0, 0), (4,), (9,)])
def test_what_nobody_took_is_not_taken_back(strange):
    pages = Pages(5)
    assert pages.take(2) == (0, 1)
    with pytest.raises(ValueError, match="nobody took them"):
        pages.give(strange)
    assert pages.free == 3


def test_bad_input():
    with pytest.raises(UsageError, match="pages=0"):
        Pages(0)
