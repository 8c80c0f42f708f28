"""The storages by name."""

from typing import Any

from effjax.decoding.storage.plain import Plain
from effjax.decoding.storage.quantised import Quantised

STORAGES: dict[str, Any] = {"plain": Plain, "quantised": Quantised}
