"""Decoding with attention computed in the memory's banks, beside a matrix unit or at the same time.

One block for a batch, weights W bytes, request r with L_r tokens cached, d = heads d_h channels:

    gemm(batch) = max(2 batch W / (b F), W / B)          F FLOP/s, B bytes/s, b bytes an element
    request(L)  = chunks (write + ceil(L / banks) tile)            with the keys: chunks = ceil(d / page)
                + chunks (write + ceil(d_h / banks) tile)          with the values: ceil(L / page) heads
    attention   = max over channels of the sum over their requests
    serial      = gemm(batch) + attention                one row buffer a bank: banks and pins take turns
    interleaved = two halves of the batch in a pipeline of both, in the long run
                  max(gemm(1st), attention(2nd)) + max(gemm(2nd), attention(1st))

Without computing banks a request reads its cache through the pins: attention = sum of 2 L d b / B. A channel
has `banks`, each with a row buffer of `page` elements; `write` loads a vector, `tile` multiplies it with a
page in every bank. Requests go to channels longest first, each to the least loaded.

Source: Heo et al., "NeuPIMs: NPU-PIM Heterogeneous Acceleration for Batched LLM Inferencing", ASPLOS 2024,
arXiv:2403.00579, sections 6.2 to 6.5 and algorithms 1 to 3; the device is that of the configuration files of
github.com/casys-kaist/NeuPIMs. Softmax, norms, the head and what tensor-parallel devices tell each other are
left out, and the matrix unit works at its peak: the paper's cycle-level simulation has all of them.

    >>> compare(DecoderShape.of(model), lengths=[300] * 512)["interleaved"]    # tokens/s
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence

from effjax.errors import UsageError
from effjax.measure.analytic.shape import DecoderShape, Number


@dataclasses.dataclass(frozen=True)
class Device:
    """A matrix unit on a memory with computing banks.

    The defaults are the reference's configuration files: eight 128 x 128 systolic arrays at 1 GHz; 32
    channels of HBM, 16 bytes wide at 2e9 transfers a second; 32 banks a channel with pages of 1024 bytes.
    """

    peak: Number = 8 * 128 * 128 * 2 * 1e9
    """FLOP/s of the matrix unit."""
    bandwidth: Number = 32 * 16 * 2e9
    """Bytes/s between memory and matrix unit."""
    channels: int = 32
    banks: int = 32
    """Of a channel."""
    page: int = 512
    """Elements in a row buffer."""
    write_seconds: Number = 100e-9
    """A vector into the buffer that a channel's banks share."""
    tile_seconds: Number = 184e-9
    """That vector times one page in every bank of a channel."""
    element_bytes: Number = 2

    @property
    def internal_bandwidth(self) -> Number:
        """Bytes/s that the banks read for themselves: 5.7e12, over five times what the pins carry."""
        tile = self.banks * self.page * self.element_bytes
        return self.channels * tile / self.tile_seconds


def gemm_seconds(shape: DecoderShape, batch: int, device: Device, shards: int = 1) -> float:
    """The matrices of one block with a batch of tokens, split over `shards` devices."""
    matrices = shape.block_matrices / shards
    weights = matrices * device.element_bytes / device.bandwidth
    return max(2 * batch * matrices / device.peak, weights)


def request_seconds(shape: DecoderShape, length: int, device: Device, shards: int = 1) -> float:
    """Attention of one new token to `length` cached ones, in the banks of one channel: algorithm 1."""
    heads = math.ceil(shape.heads / shards)
    kv_channels = math.ceil(shape.kv_heads / shards) * shape.head_dim
    # With grouped queries a page of keys meets one vector for each query head that shares it.
    vectors = shape.heads // shape.kv_heads
    keys = math.ceil(kv_channels / device.page) * vectors
    values = math.ceil(length / device.page) * heads
    tiles = keys * math.ceil(length / device.banks) + values * math.ceil(shape.head_dim / device.banks)
    return (keys + values) * device.write_seconds + tiles * device.tile_seconds


def read_seconds(shape: DecoderShape, length: int, device: Device, shards: int = 1) -> float:
    """The same attention where the cache is read through the pins; its arithmetic is free beside that."""
    kv = 2 * shape.kv_heads * shape.head_dim * length * device.element_bytes / shards
    return kv / device.bandwidth


def pack(loads: Sequence[Number], bins: int) -> list[list[int]]:
    """Puts loads into bins, the largest first, each into the least loaded: at most 4/3 of the best maximum.

    Returns:
      The positions in `loads` of each bin's members.

    Raises:
      UsageError: for no bins.
    """
    if bins < 1:
        raise UsageError(f"there must be at least one bin to pack into, not {bins}.")
    heap: list[tuple[Number, int]] = [(0, bin) for bin in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for position in sorted(range(len(loads)), key=lambda i: -loads[i]):
        load, bin = heapq.heappop(heap)
        members[bin].append(position)
        heapq.heappush(heap, (load + loads[position], bin))
    return members


def deal(count: int, bins: int) -> list[list[int]]:
    """Round robin: what the plain combination does with requests as they come."""
    return [list(range(bin, count, bins)) for bin in range(bins)]


def heaviest(loads: Sequence[Number], members: Sequence[Sequence[int]]) -> Number:
    """The load of the fullest bin."""
    return max(sum(loads[i] for i in each) for each in members)


def halve(members: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Splits every channel's requests in two, the odd one to either half in turn: algorithm 3."""
    first, second, turn = [], [], True
    for each in members:
        half = len(each) // 2
        if len(each) % 2:
            half, turn = half + turn, not turn
        first.append(list(each[:half]))
        second.append(list(each[half:]))
    return first, second


def pipeline(gemms: Sequence[float], attentions: Sequence[float], blocks: int) -> float:
    """Seconds until all sub-batches have passed all blocks: each unit serves one sub-batch at a time.

    Within a block a sub-batch needs the matrix unit, then the banks; both serve in order of arrival. With one
    sub-batch this is the serial sum, with two it tends to the larger of each pair.
    """
    unit_free, banks_free = 0.0, 0.0
    ready = [0.0] * len(gemms)
    for _ in range(blocks):
        for batch in sorted(range(len(gemms)), key=ready.__getitem__):
            unit_free = max(unit_free, ready[batch]) + gemms[batch]
            banks_free = max(banks_free, unit_free) + attentions[batch]
            ready[batch] = banks_free
    return max(ready)


def compare(
    shape: DecoderShape,
    lengths: Sequence[int],
    *,
    device: Device | None = None,
    gpu: Device | None = None,
    shards: int = 1,
) -> dict[str, float]:
    """Tokens a second of one decoding step for every request, by system.

    Args:
      shape: of the model; its `depth` blocks all run on the device.
      lengths: tokens cached of each request.
      device: the matrix unit with computing banks.
      gpu: a device whose banks are not used, such as `A100_40GB`, for a row of its own.
      shards: devices that share every matrix and head.

    Returns:
      `gpu` where one is given; `npu`: the device's own matrix unit alone; `blocked`: requests dealt round
      robin, banks and matrix unit in turn; `packed`: longest first to the least loaded; `interleaved`:
      packed, and two sub-batches at once.

    Raises:
      UsageError: without requests, or with heads that the shards do not divide.
    """
    if not lengths or shape.kv_heads % shards:
        raise UsageError(f"give requests, and shards={shards} that divide {shape.kv_heads} key/value heads.")
    device = device or Device()
    count = len(lengths)
    loads = [request_seconds(shape, length, device, shards) for length in lengths]
    gemm, channels = gemm_seconds(shape, count, device, shards), pack(loads, device.channels)
    halves = halve(channels)
    sizes = [sum(map(len, half)) for half in halves]
    steps = {"gpu": _through_the_pins(shape, lengths, gpu, shards)} if gpu else {}
    steps |= {
        "npu": _through_the_pins(shape, lengths, device, shards),
        "blocked": gemm + heaviest(loads, deal(count, device.channels)),
        "packed": gemm + heaviest(loads, channels),
        "interleaved": pipeline(
            [gemm_seconds(shape, size, device, shards) if size else 0.0 for size in sizes],
            [heaviest(loads, half) for half in halves],
            shape.depth,
        )
        / shape.depth,
    }
    return {name: count / (shape.depth * step) for name, step in steps.items()}


def _through_the_pins(shape: DecoderShape, lengths: Sequence[int], device: Device, shards: int) -> float:
    """Seconds of one block without computing banks."""
    attention = sum(read_seconds(shape, length, device, shards) for length in lengths)
    return gemm_seconds(shape, len(lengths), device, shards) + attention


A100_40GB = Device(peak=312e12, bandwidth=1555e9)
"""At its peak rates; the paper timed a real one under PyTorch, which it finds below 40% of its arithmetic."""
