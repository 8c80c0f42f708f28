"""These tests run in a process of their own with eight fake CPU devices: `pytest tests/eight`."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

# Programs of several devices are compiled anew in every run.
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(autouse=True, scope="session")
def _eight_devices():
    assert jax.device_count() == 8, "jax started before this file: run `pytest tests/eight` by itself"
