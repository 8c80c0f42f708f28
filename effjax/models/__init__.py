"""The skeletons that compose parts into networks."""

from effjax.mixers.boundaries import BoundaryPredictor
from effjax.models.algoformer import AlgoFormer
from effjax.models.autoencoder import Autoencoder
from effjax.models.block_transformer import BlockTransformer
from effjax.models.dit import DiT
from effjax.models.e_mmdit import EMMDiT
from effjax.models.inception import Inception
from effjax.models.lego import Lego
from effjax.models.lingen import LinGen
from effjax.models.lm import LM
from effjax.models.lookup import LookupViT
from effjax.models.mixture_of_transformers import MixtureOfTransformers
from effjax.models.pose import PoseTransformer
from effjax.models.pt_dit import PTDiT
from effjax.models.pyramid import Pyramid
from effjax.models.routed_lm import RoutedLM
from effjax.models.sparseformer import SparseFormer
from effjax.models.vdt import VDT
from effjax.models.vit import ViT

KINDS = {
    "algoformer": AlgoFormer,
    "autoencoder": Autoencoder,
    "block_transformer": BlockTransformer,
    "boundary_predictor": BoundaryPredictor,
    "dit": DiT,
    "e_mmdit": EMMDiT,
    "inception": Inception,
    "lego": Lego,
    "lingen": LinGen,
    "lm": LM,
    "lookup_vit": LookupViT,
    "mixture_of_transformers": MixtureOfTransformers,
    "pose": PoseTransformer,
    "pt_dit": PTDiT,
    "pyramid": Pyramid,
    "routed_lm": RoutedLM,
    "sparseformer": SparseFormer,
    "vdt": VDT,
    "vit": ViT,
}
