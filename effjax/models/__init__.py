"""The skeletons that compose parts into networks."""

from effjax.models.vit import ViT

KINDS = {"vit": ViT}
