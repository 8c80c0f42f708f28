"""How far a loop runs ahead."""

import pytest

from effjax.parallel.pace import Pace


class Result:
    """Stands for an array: notes when it was waited for."""

    def __init__(self, number, waited):
        self.number, self.waited = number, waited

    def block_until_ready(self):
        self.waited.append(self.number)
        return self


@pytest.mark.parametrize("ahead", [0, 2, 5])
def test_each_result_waits_for_the_one_so_far_before_it(ahead):
    waited, pace = [], Pace(ahead)
    for number in range(9):
        pace({"loss": Result(number, waited)})
        assert waited == list(range(number + 1 - ahead))
