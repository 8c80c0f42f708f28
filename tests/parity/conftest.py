"""These tests need the extra `[parity]` and run by themselves: `make parity`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models come from configurations, never from a hub

import jax
import pytest

# Programs of full-size networks would fill the disk.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_collection_modifyitems(items):
    """What the libraries warn about among themselves is not ours to mend."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:::(torch|timm|transformers|diffusers)"))


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file():
    """Compiled programs of full-size networks are not kept for the files to come: they took 10 GB."""
    yield
    jax.clear_caches()
