"""The storages by name."""

from typing import Any

from effjax.decoding.storage.plain import Plain

STORAGES: dict[str, Any] = {"plain": Plain}
