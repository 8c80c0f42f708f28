"""Weights in and out: from timm, transformers and diffusers to our models, and back.

model, params = load_pretrained("timm:vit_small_patch16_224", "model.safetensors")
tensors = export(model, params, "timm:vit_small_patch16_224")
"""

from effjax.interop.converted import load_converted, read_parameters, save_converted
from effjax.interop.export import export, export_to
from effjax.interop.load import load_pretrained

__all__ = ["export", "export_to", "load_converted", "load_pretrained", "read_parameters", "save_converted"]
