"""The policies by name."""

from typing import Any

from effjax.decoding.policies.dhsa import DHSA
from effjax.decoding.policies.heavy_hitters import HeavyHitters
from effjax.decoding.policies.kvmerger import KVMerger
from effjax.decoding.policies.policy import Policy
from effjax.decoding.policies.recycled import RecycledAttention
from effjax.decoding.policies.window import Window

POLICIES: dict[str, Any] = {
    "all": Policy,
    "dhsa": DHSA,
    "heavy_hitters": HeavyHitters,
    "kvmerger": KVMerger,
    "recycled": RecycledAttention,
    "window": Window,
}
