"""The strictest settings: shapes are checked at run time, and ranks never promote silently."""

import collections
import gc
import os
import time
from pathlib import Path

from tests.flags import QUICK_TO_COMPILE

# The embedded data sets are prepared once for all tests, and nothing is written into anybody's home.
os.environ["TFDS_DATA_DIR"] = str(Path(__file__).resolve().parents[1] / ".testdata")
# Before jax starts: a test never takes an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are compiled once and run for milliseconds: cheap code is the fast choice.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK_TO_COMPILE])
# Which lines an operation came from is not asked here, and to write it into a program takes a fourteenth.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax
import numpy as np
import pytest

from tests import annotations

jax.config.update("jax_numpy_rank_promotion", "raise")
# A third of a test run is compiling: what an earlier run compiled of the same program is read.
COMPILED = Path(os.environ["TFDS_DATA_DIR"], "compiled")
jax.config.update("jax_compilation_cache_dir", str(COMPILED / "tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# Every function of the library has its annotations checked on every call; but for what walks programs, by a
# million calls of one line that see no arrays.
LIBRARY = Path(__file__).resolve().parents[1] / "effjax"
WALKS = {"graph", "loops", "traffic", "walk", "work"}
annotations.install(
    [f"effjax.{path.stem}" for path in LIBRARY.iterdir() if path.stem != "measure"]
    + [f"effjax.measure.{path.stem}" for path in (LIBRARY / "measure").iterdir() if path.stem not in WALKS]
)

# Tests that took long when `pytest -n 2 --write-slow` last timed them all, one a line: they are marked slow.
SLOW = Path(__file__).with_name("slow.txt")
SECONDS = 0.3


# Compiled programs stay mapped, and Linux gives a process 65,530 mappings: a compiler that asks for more
# crashes. After so many tests they are counted, and let go where there are many.
COUNTED, MANY = 20, 25_000
MAPS = Path("/proc/self/maps")
RUN = pytest.StashKey[int]()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    run = item.session.stash[RUN] = item.session.stash.get(RUN, 0) + 1
    if run % COUNTED == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        jax.clear_caches()


@pytest.fixture
def draw():
    """Numbers that do not depend on which tests ran before in this process."""
    return np.random.default_rng(0)


def pytest_addoption(parser):
    parser.addoption("--write-slow", action="store_true", help=f"write tests over {SECONDS} s to {SLOW.name}")


def pytest_configure(config):
    if config.getoption("--write-slow"):
        # A test is as long as it is in a fresh clone.
        jax.config.update("jax_enable_compilation_cache", False)
        if not hasattr(config, "workerinput"):
            config.pluginmanager.register(Timer(), "timer")


def pytest_sessionstart(session):
    """Forgets programs that were compiled a week ago, of which most are no longer made."""
    if not hasattr(session.config, "workerinput"):
        for file in COMPILED.rglob("*-cache"):
            if time.time() - file.stat().st_mtime > 7 * 86_400:
                file.unlink()


def pytest_collection_finish():
    """What is there before the first test stays: looking through it again and again takes a twentieth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    listed = _listed()
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)


def _listed():
    return set(SLOW.read_text().splitlines()) if SLOW.exists() else set()


class Timer:
    """Adds up set-up and call of every test, and writes the long ones at the end."""

    def __init__(self):
        self.seconds = collections.Counter()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        slow = _listed() - self.seconds.keys()  # not timed now
        slow |= {test for test, seconds in self.seconds.items() if seconds > SECONDS}
        SLOW.write_text("".join(f"{test}\n" for test in sorted(slow)))
