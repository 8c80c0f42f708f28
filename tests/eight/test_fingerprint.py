"""Fingerprints of more arrays than programs of several devices may run at once."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from effjax.train.fingerprint import fingerprints


def test_of_many_arrays_no_sum_waits_for_another(monkeypatch):
    """All sent at once, the sums of two arrays wait for each other's threads for good."""
    monkeypatch.setattr("effjax.train.fingerprint._SMALL", -1)  # none is read on the host
    cut = NamedSharding(jax.make_mesh((4, 2), ("a", "b")), PartitionSpec("a", "b"))
    values = np.random.default_rng(0).normal(size=(400, 8, 8)).astype(np.float32)
    single = fingerprints({str(i): jax.device_put(value, jax.devices()[0]) for i, value in enumerate(values)})
    for _ in range(3):
        parts = fingerprints({str(i): jax.device_put(value, cut) for i, value in enumerate(values)})
        assert parts == single
