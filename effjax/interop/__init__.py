"""Weights in and out: from timm, transformers and diffusers to our models, and back.

model, params = load_pretrained("timm:vit_small_patch16_224", "model.safetensors")
tensors = export(model, params, "timm:vit_small_patch16_224")
"""

from effjax.interop.export import export
from effjax.interop.load import load_pretrained

__all__ = ["export", "load_pretrained"]
