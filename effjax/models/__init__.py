"""The skeletons that compose parts into networks."""

from effjax.models.dit import DiT
from effjax.models.lego import Lego
from effjax.models.lm import LM
from effjax.models.lookup import LookupViT
from effjax.models.pose import PoseTransformer
from effjax.models.pyramid import Pyramid
from effjax.models.sparseformer import SparseFormer
from effjax.models.vit import ViT

KINDS = {
    "dit": DiT,
    "lego": Lego,
    "lm": LM,
    "lookup_vit": LookupViT,
    "pose": PoseTransformer,
    "pyramid": Pyramid,
    "sparseformer": SparseFormer,
    "vit": ViT,
}
