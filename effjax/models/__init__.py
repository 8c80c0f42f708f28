"""The skeletons that compose parts into networks."""

from effjax.models.autoencoder import Autoencoder
from effjax.models.dit import DiT
from effjax.models.e_mmdit import EMMDiT
from effjax.models.lego import Lego
from effjax.models.lingen import LinGen
from effjax.models.lm import LM
from effjax.models.lookup import LookupViT
from effjax.models.pose import PoseTransformer
from effjax.models.pt_dit import PTDiT
from effjax.models.pyramid import Pyramid
from effjax.models.sparseformer import SparseFormer
from effjax.models.vdt import VDT
from effjax.models.vit import ViT

KINDS = {
    "autoencoder": Autoencoder,
    "dit": DiT,
    "e_mmdit": EMMDiT,
    "lingen": LinGen,
    "lego": Lego,
    "lm": LM,
    "lookup_vit": LookupViT,
    "pose": PoseTransformer,
    "pt_dit": PTDiT,
    "pyramid": Pyramid,
    "sparseformer": SparseFormer,
    "vdt": VDT,
    "vit": ViT,
}
