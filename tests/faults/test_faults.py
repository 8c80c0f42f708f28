"""The faults in short; `make faults` has them at full length, with its figures."""

import random
import signal

import pytest

from tests.experiments.driver import start
from tests.faults import surroundings
from tests.faults.damage import damaged
from tests.faults.moments import CONFIG, interrupted, wait
from tests.train.toy import FAMILIES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_kill_9_loses_nothing_and_resuming_is_bit_exact(family, tmp_path):
    figures = interrupted(tmp_path, 2, random.Random(1), family=family, length=8.0)
    assert not figures.failures
    assert sum(figures.outcomes.values()) == 2


def test_sigterm_leads_to_75_and_a_resumable_run(tmp_path):
    figures = interrupted(tmp_path, 4, random.Random(2), by=signal.SIGTERM, length=8.0)
    assert not figures.failures
    assert sum(figures.outcomes.values()) == 4


@pytest.mark.parametrize("delay", [0.4, 1.5])
def test_sigterm_before_there_is_a_run(tmp_path, delay):
    """While it imports."""
    process = start("train", CONFIG["vision"], f"--workdir={tmp_path / 'run'}")
    wait(process, lambda: False, delay)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "stopped: " in errors


def test_damage_is_said_and_never_read(tmp_path):
    figures = damaged(tmp_path, 24, random.Random(3))
    assert not figures.failures
    # How many files hold nothing that is read, orbax decides anew in every run: about half.
    assert figures.outcomes["detected, an older one used"] > 0


@pytest.mark.parametrize("fault", ["full_disk", "no_place", "two_in_one_folder", "jumping_clock"])
def test_what_happens_around_a_run(fault, tmp_path):
    assert not getattr(surroundings, fault)(tmp_path).failures
