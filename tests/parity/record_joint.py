"""Records joint attention of picture and text, for tests/models/test_e_mmdit.py.

    python -m tests.parity.record_joint block
    python -m tests.parity.record_joint e_mmdit transformer_emmdit.py

The second argument is the model file of AMD-AGI/Nitro-E, core/models/transformer_emmdit.py.
"""

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention import JointTransformerBlock

from tests.models.official import FOLDER, drawn

WIDTH, HEADS = 16, 2


def joint_block(last: bool = False, norm: str | None = "rms_norm") -> JointTransformerBlock:
    """The block of Stable Diffusion 3 with weights drawn; both streams are modulated alike."""
    block = JointTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, context_pre_only=last, qk_norm=norm).eval()
    with_weights(block)
    with torch.no_grad():
        for name in ("weight", "bias"):
            theirs = getattr(block.norm1_context.linear, name)
            theirs.copy_(0 * theirs if last else getattr(block.norm1.linear, name))
    return block


def with_weights(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Draws the weights of a model by their names; returns the shapes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in drawn(shapes).items()}, strict=False)
    return shapes


def block() -> Path:
    """Picture and text behind the block, in its two forms; what it is given is drawn again by the test."""
    draw = np.random.RandomState(0)
    image, text, time = (
        draw.standard_normal((2, *s)).astype(np.float32) for s in ((6, WIDTH), (3, WIDTH), (WIDTH,))
    )
    arrays = dict(image=image, text=text, time=time)
    for name, last in (("inner", False), ("last", True)):
        theirs = joint_block(last)
        arrays[f"{name}_shapes"] = encoded({k: tuple(p.shape) for k, p in theirs.named_parameters()})
        with torch.no_grad():
            other, own = theirs(*(torch.from_numpy(a) for a in (image, text, time)))
        arrays[f"{name}_image"] = own.numpy()
        if other is not None:
            arrays[f"{name}_text"] = other.numpy()
    return written("sd3_joint_block", arrays)


def e_mmdit(path: str) -> Path:
    """The whole network, all 24 blocks, two heads of 16 channels wide."""
    spec = importlib.util.spec_from_file_location("public", path)
    assert spec is not None
    assert spec.loader is not None
    public = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(public)
        model = public.EMMDiTTransformer(
            sample_size=16, in_channels=4, out_channels=4, attention_head_dim=16, num_attention_heads=2,
            caption_channels=12, caption_projection_dim=32,
        ).eval()  # fmt: skip
    shapes = with_weights(model)
    draw = np.random.RandomState(0)
    x, text = (draw.standard_normal(shape).astype(np.float32) for shape in ((2, 16, 16, 4), (2, 32, 12)))
    times = np.array([30.0, 801.0], np.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(text), torch.from_numpy(times)
        (out,) = model(*given, return_dict=False)
    return written(
        "e_mmdit",
        dict(x=x, text=text, times=times, __shapes=encoded(shapes), out=out.permute(0, 2, 3, 1).numpy()),
    )


def encoded(shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Names and shapes as bytes."""
    return np.frombuffer(json.dumps(shapes).encode(), np.uint8)


def written(name: str, arrays: dict[str, np.ndarray]) -> Path:
    """Writes a recording."""
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    made = {"block": block, "e_mmdit": e_mmdit}[kind](*paths)
    print(f"{made.name}: {made.stat().st_size} bytes")
