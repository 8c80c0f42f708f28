"""timm's plain vision transformer, a toy and a full size."""

import timm

from tests.parity.case import Case, channels_first, images

_TOY = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, init_values=0.5)

CASES = {
    "timm_vit_toy": Case(
        source="timm:vit_tiny_patch16_224",
        config=_TOY,
        module=lambda: timm.create_model("vit_tiny_patch16_224", **_TOY),
        inputs=images(16),
        call=channels_first,
        gradient=True,
        fixture=True,
    ),
    "timm_vit_tiny_patch16_224": Case(
        source="timm:vit_tiny_patch16_224",
        config={},
        module=lambda: timm.create_model("vit_tiny_patch16_224"),
        inputs=images(224),
        call=channels_first,
        gradient=True,
    ),
}
