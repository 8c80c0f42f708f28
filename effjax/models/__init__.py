"""The skeletons that compose parts into networks."""

from effjax.models.dit import DiT
from effjax.models.lm import LM
from effjax.models.pose import PoseTransformer
from effjax.models.pyramid import Pyramid
from effjax.models.vit import ViT

KINDS = {"vit": ViT, "dit": DiT, "lm": LM, "pose": PoseTransformer, "pyramid": Pyramid}
