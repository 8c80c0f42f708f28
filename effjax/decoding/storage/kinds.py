"""The storages by name."""

from typing import Any

from effjax.decoding.storage.paged import Paged
from effjax.decoding.storage.plain import Plain

STORAGES: dict[str, Any] = {"paged": Paged, "plain": Plain}
