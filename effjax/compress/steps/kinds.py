"""Steps of a recipe, by the name that a config gives them."""

from effjax.compress.steps.abq_llm import ABQ
from effjax.compress.steps.axformer import AxFormer
from effjax.compress.steps.compressed_experts import CompressedExperts
from effjax.compress.steps.dgq import Dgq
from effjax.compress.steps.efficientqat import EfficientQAT
from effjax.compress.steps.evopress import EvoPress
from effjax.compress.steps.fake_quantise import FakeQuantise, Freeze
from effjax.compress.steps.finequant import FineQuant
from effjax.compress.steps.fusegpt import FuseGPT
from effjax.compress.steps.inputs import CalibrateInputs
from effjax.compress.steps.llama_nas import LlamaNas
from effjax.compress.steps.modegpt import MoDeGPT
from effjax.compress.steps.prune import Prune
from effjax.compress.steps.recover import Recover
from effjax.compress.steps.round import Round
from effjax.compress.steps.slice import Slice
from effjax.compress.steps.sparsify import Densify, Sparsify
from effjax.compress.steps.stitch import Member, Stitch

KINDS = {
    "round": Round,
    "finequant": FineQuant,
    "efficientqat": EfficientQAT,
    "abq_llm": ABQ,
    "calibrate_inputs": CalibrateInputs,
    "dgq": Dgq,
    "fake_quantise": FakeQuantise,
    "freeze": Freeze,
    "modegpt": MoDeGPT,
    "prune": Prune,
    "recover": Recover,
    "sparsify": Sparsify,
    "densify": Densify,
    "evopress": EvoPress,
    "slice": Slice,
    "stitch": Stitch,
    "member": Member,
    "fusegpt": FuseGPT,
    "compressed_experts": CompressedExperts,
    "axformer": AxFormer,
    "llama_nas": LlamaNas,
}
