"""What the names of timm's Swin Transformers stand for: keyword arguments that differ from the defaults.

Source: the registered functions and default configurations of timm 1.0.31, in its
`models/swin_transformer.py` and `models/swin_transformer_v2.py`; `tests/parity` holds these tables against
them.
"""

import re
from typing import Any

_TINY = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
_SMALL = dict(_TINY, depths=(2, 2, 18, 2))
_BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
_LARGE = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))
_22K = dict(num_classes=21841)
_FROM_12 = dict(pretrained_window_sizes=(12, 12, 12, 6))

_SWIN: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": dict(_TINY, window_size=7),
    "swin_small_patch4_window7_224": dict(_SMALL, window_size=7),
    "swin_base_patch4_window7_224": dict(_BASE, window_size=7),
    "swin_base_patch4_window12_384": dict(_BASE, window_size=12),
    "swin_large_patch4_window7_224": dict(_LARGE, window_size=7),
    "swin_large_patch4_window12_384": dict(_LARGE, window_size=12),
    "swin_s3_tiny_224": dict(_TINY, window_size=(7, 7, 14, 7)),
    "swin_s3_small_224": dict(_SMALL, window_size=(14, 14, 14, 7)),
    "swin_s3_base_224": dict(_TINY, depths=(2, 2, 30, 2), window_size=(7, 7, 14, 7)),
}
_SWIN_V2: dict[str, dict[str, Any]] = {
    "swinv2_tiny_window8_256": dict(_TINY, window_size=8),
    "swinv2_tiny_window16_256": dict(_TINY, window_size=16),
    "swinv2_small_window8_256": dict(_SMALL, window_size=8),
    "swinv2_small_window16_256": dict(_SMALL, window_size=16),
    "swinv2_base_window8_256": dict(_BASE, window_size=8),
    "swinv2_base_window16_256": dict(_BASE, window_size=16),
    "swinv2_base_window12_192": dict(_BASE, window_size=12, **_22K),
    "swinv2_base_window12to16_192to256": dict(_BASE, window_size=16, **_FROM_12),
    "swinv2_base_window12to24_192to384": dict(_BASE, window_size=24, **_FROM_12),
    "swinv2_large_window12_192": dict(_LARGE, window_size=12, **_22K),
    "swinv2_large_window12to16_192to256": dict(_LARGE, window_size=16, **_FROM_12),
    "swinv2_large_window12to24_192to384": dict(_LARGE, window_size=24, **_FROM_12),
}


def architectures(version: int) -> dict[str, dict[str, Any]]:
    """Keyword arguments by name, of Swin 1 or 2; the last number of a name is the side of the picture."""
    table = {1: _SWIN, 2: _SWIN_V2}[version]
    return {name: dict(given, img_size=int(re.findall(r"\d+", name)[-1])) for name, given in table.items()}
