"""The storages by name."""

from typing import Any

from effjax.decoding.storage.paged import Paged
from effjax.decoding.storage.plain import Plain
from effjax.decoding.storage.quantised import Quantised

STORAGES: dict[str, Any] = {"paged": Paged, "plain": Plain, "quantised": Quantised}
