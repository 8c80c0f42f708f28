"""Linear layers of 2, 3, 4 or 8 bits as the files of GPTQ and AWQ hold them.

A layer `X` of torch with the weight `[o, i] ~ scale (code - zero)`, in groups of inputs, is

    X.qweight, X.qzeros   codes in int32 words      X.scales   [G, o]      X.g_idx   [i], the group of each

    gptq       qweight [i b / 32, o], along the inputs;  qzeros [G, o b / 32], along the outputs, of zero - 1
    gptq_v2    the same, of the zeros themselves
    awq        qweight [i, o / 8] and qzeros [G, o / 8], both along the outputs; 4 bits; no g_idx

Codes fill words from the lowest bit on. Those of 3 bits are one stream, 32 of them in 3 words, and two of
these cross a word. A word of awq holds the outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight, in this order.

A symmetric grid has no other form: its zeros are 2^(b-1), which gptq writes as 2^(b-1) - 1. A zero of 0 has
no place in gptq: its -1 borrows from the neighbours in a word, and readers disagree on what it is. It is read
as 0 where a file holds one, and never written.

Sources: AutoGPTQ, `nn_modules/qlinear/qlinear_cuda_old.py` (streams, shapes, zero - 1); GPTQModel,
`utils/model.py`, `convert_gptq_v1_to_v2_format_module` (gptq_v2); AutoAWQ, `modules/linear/gemm.py` and
`utils/packing_utils.py` (order of outputs). Frantar et al. 2023, arXiv:2210.17323; Lin et al. 2024,
arXiv:2306.00978.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from effjax.errors import RunError, UsageError
from effjax.interop.weights import Spec

Format = Literal["gptq", "gptq_v2", "awq"]
FORMATS: tuple[Format, ...] = ("gptq", "gptq_v2", "awq")
# Bits of a code that a format has.
BITS: dict[Format, tuple[int, ...]] = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "awq": (4,)}
# Of which the tensors of a layer are, behind its name.
PARTS = ("qweight", "qzeros", "scales", "g_idx")

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ELSE = "--quantised=whole writes the weights that the codes stand for."


@dataclasses.dataclass(frozen=True)
class Linear:
    """The codes of a layer.

    Attributes:
      bits: of a code.
      codes: `[i, o]` uint8.
      scales: `[G, o]` float16 or bfloat16.
      zeros: `[G, o]` uint8, the code that stands for 0.
      groups: `[i]`, the group of every input.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    groups: np.ndarray

    def scale(self) -> np.ndarray:
        """The scale of every weight, `[i, o]`."""
        return self.scales[self.groups]

    def zero(self) -> np.ndarray:
        """The zero of every weight, `[i, o]`."""
        return self.zeros[self.groups]

    def weights(self) -> np.ndarray:
        """What the codes stand for, `[i, o]` in float32."""
        offset = self.codes.astype(np.float32) - self.zero().astype(np.float32)
        return offset * self.scale().astype(np.float32)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of codes that follow each other along the last axis, `[..., n]` to `[..., n bits / 32]`."""
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)  # [..., n, bits]
    packed = np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    return packed.view("<i4").astype(np.int32)


def codes_of(packed: np.ndarray, bits: int) -> np.ndarray:
    """The codes that `words` was given."""
    bytes_ = np.ascontiguousarray(packed).astype("<i4").view(np.uint8)
    stream = np.unpackbits(bytes_, axis=-1, bitorder="little")  # [..., 32 words]
    pieces = stream.reshape(*packed.shape[:-1], -1, bits) << np.arange(bits, dtype=np.uint8)
    return np.asarray(np.sum(pieces, -1, dtype=np.uint8))


def pack(layer: Linear, form: Format, name: str) -> dict[str, np.ndarray]:
    """The tensors of a layer, by what stands behind its name.

    Args:
      layer: its codes.
      form: how they are packed.
      name: of the layer, for messages.

    Raises:
      UsageError: for bits that the format does not have, sizes that do not fill words, a dtype of scales that
        its readers do not have, and in `gptq` a zero of 0.
    """
    ins, outs = layer.codes.shape
    if layer.bits not in BITS[form]:
        raise UsageError(f"{name}: {form} has codes of {BITS[form]} bits, not of {layer.bits}. {_ELSE}")
    wanted = (1, 8) if form == "awq" else (32, 32)
    if ins % wanted[0] or outs % wanted[1]:
        raise UsageError(
            f"{name}: {ins} inputs and {outs} outputs do not fill the words of {form}, which take multiples "
            f"of {wanted[0]} and {wanted[1]}. {_ELSE}"
        )
    if layer.scales.dtype.name not in ("float16", "bfloat16"):
        raise UsageError(
            f"{name}: scales of {layer.scales.dtype} would be rounded by every reader of {form}. Compress "
            f"with scale='float16'. {_ELSE}"
        )
    if form == "awq":
        return {
            "qweight": words(_interleaved(layer.codes, _AWQ_ORDER), 4),
            "qzeros": words(_interleaved(layer.zeros, _AWQ_ORDER), 4),
            "scales": layer.scales,
        }
    if form == "gptq" and not layer.zeros.all():
        raise UsageError(
            f"{name}: a zero of 0 has no place in gptq. Give --quantised=gptq_v2, which has one."
        )
    return {
        "qweight": np.ascontiguousarray(words(layer.codes.T, layer.bits).T),
        "qzeros": words(layer.zeros - np.uint8(form == "gptq"), layer.bits),
        "scales": layer.scales,
        "g_idx": layer.groups.astype(np.int32),
    }


def specs(name: str, layout: tuple[int, int, int, int], scale: np.dtype, form: Format) -> dict[str, Spec]:
    """Shapes and dtypes of what `pack` makes.

    Args:
      name: of the layer.
      layout: its inputs, outputs, groups and bits.
      scale: dtype of its scales.
      form: how it is packed.
    """
    ins, outs, groups, bits = layout
    rows = (ins, outs * bits // 32) if form == "awq" else (ins * bits // 32, outs)
    told = {
        "qweight": Spec(rows, np.dtype(np.int32)),
        "qzeros": Spec((groups, outs * bits // 32), np.dtype(np.int32)),
        "scales": Spec((groups, outs), scale),
    }
    told |= {} if form == "awq" else {"g_idx": Spec((ins,), np.dtype(np.int32))}
    return {f"{name}.{part}": spec for part, spec in told.items()}


def unpack(tensors: Mapping[str, np.ndarray], form: Format) -> Linear:
    """A layer from its tensors; the inverse of `pack`.

    Args:
      tensors: by what stands behind its name; without a `g_idx`, groups follow each other.
      form: how they are packed.
    """
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    ins, _, bits = measures(qweight.shape, qzeros.shape, scales.shape, form)
    if form == "awq":
        back = np.argsort(_AWQ_ORDER)
        codes, zeros = (_interleaved(codes_of(part, 4), back) for part in (qweight, qzeros))
    else:
        codes, zeros = np.ascontiguousarray(codes_of(qweight.T, bits).T), codes_of(qzeros, bits)
    if form == "gptq":
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    in_order = np.arange(ins) // (ins // scales.shape[0])
    return Linear(bits, codes, scales, zeros, tensors.get("g_idx", in_order))


def measures(
    qweight: tuple[int, ...], qzeros: tuple[int, ...], scales: tuple[int, ...], form: Format
) -> tuple[int, int, int]:
    """Inputs, outputs and bits of a layer, from the shapes of its tensors.

    Raises:
      RunError: where they do not belong together.
    """
    fits = len(qweight) == len(qzeros) == len(scales) == 2 and scales[1] > 0
    bits = 32 * qzeros[1] // scales[1] if fits else 0
    if bits not in BITS[form]:
        raise RunError(f"qzeros {list(qzeros)} and scales {list(scales)} are not those of a layer of {form}.")
    ins = qweight[0] if form == "awq" else 32 * qweight[0] // bits
    outs = 8 * qweight[1] if form == "awq" else qweight[1]
    if outs != scales[1] or qzeros[0] != scales[0] or scales[0] < 1 or ins % scales[0]:
        raise RunError(
            f"qweight {list(qweight)}, qzeros {list(qzeros)} and scales {list(scales)} are not of one layer."
        )
    return ins, outs, bits


def _interleaved(codes: np.ndarray, order: tuple[int, ...] | np.ndarray) -> np.ndarray:
    """Every eight columns in another order."""
    return codes.reshape(codes.shape[0], -1, 8)[..., list(order)].reshape(codes.shape)
