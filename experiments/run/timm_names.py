"""Which architecture of timm is the model of a config, for benchmarks side by side."""

from typing import Final

NAMES: Final = {
    "configs/vision/vit.py:ti16": "vit_tiny_patch16_224",
    "configs/vision/vit.py:s16": "vit_small_patch16_224",
    "configs/vision/vit.py:b16": "vit_base_patch16_224",
    "configs/vision/vit.py:l16": "vit_large_patch16_224",
    "configs/vision/swin.py:tiny": "swin_tiny_patch4_window7_224",
    "configs/vision/swin.py:small": "swin_small_patch4_window7_224",
    "configs/vision/swin.py:base": "swin_base_patch4_window7_224",
    "configs/vision/swin.py:large": "swin_large_patch4_window7_224",
    "configs/vision/swin.py:base-384": "swin_base_patch4_window12_384",
    "configs/vision/swin.py:large-384": "swin_large_patch4_window12_384",
    "configs/vision/convnext.py:tiny": "convnext_tiny",
    "configs/vision/convnext.py:small": "convnext_small",
    "configs/vision/convnext.py:base": "convnext_base",
    "configs/vision/convnext.py:large": "convnext_large",
    "configs/vision/convnext.py:xlarge": "convnext_xlarge",
    "configs/vision/poolformer.py:s12": "poolformer_s12",
    "configs/vision/poolformer.py:s24": "poolformer_s24",
    "configs/vision/poolformer.py:s36": "poolformer_s36",
    "configs/vision/poolformer.py:m36": "poolformer_m36",
    "configs/vision/poolformer.py:m48": "poolformer_m48",
}
