"""Layouts of stored weights, by the name that a config gives them."""

from effjax.compress.storage.binary_coding import BinaryCoding
from effjax.compress.storage.bit_planes import BitPlanes
from effjax.compress.storage.fake import Fake
from effjax.compress.storage.masked import Masked
from effjax.compress.storage.shift import Shift
from effjax.compress.storage.sparse_blocks import SparseBlocks
from effjax.compress.storage.uniform import Uniform

KINDS = {
    "uniform": Uniform,
    "binary_coding": BinaryCoding,
    "bit_planes": BitPlanes,
    "shift": Shift,
    "fake": Fake,
    "masked": Masked,
    "sparse_blocks": SparseBlocks,
}
