"""Records a toy of PT-DiT's published code, for tests/models/test_pt_dit.py.

    python -m tests.parity.record_pt_dit pt_dit_diffusers.py pos_patch_encoding.py

The files are those of Ascend/MindSpeed-MM, in mindspeed_mm/models: predictor/dits and common/embeddings.
Each example runs by itself: the code mixes up the times of a batch. Prints how many parameters the code has
at the sizes of the paper's table.
"""

import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch

OUT = Path(__file__).resolve().parents[1] / "models" / "fixtures" / "pt_dit.npz"
#            heads, channels of a head, layers
SIZES = {"b": (10, 64, 12), "l": (12, 72, 28), "xl": (16, 72, 28), "h": (20, 72, 30)}


def imported(name: str, path: str) -> types.ModuleType:
    """A file as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def model(public: types.ModuleType, heads: int, head: int, layers: int, **fields: object) -> torch.nn.Module:
    """A model of the published configuration, but for some fields."""
    published = {
        "in_channels": 4, "out_channels": 8, "attention_bias": True, "sample_size": 32, "frame": 1,
        "patch_size": 2, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 4096, "shift_window": True,
        "compress_ratios": [1, 8, 8], "proxy_compress_ratios": [1, 8, 8],
    }  # fmt: skip
    options = published | {"cross_attention_dim": heads * head} | fields
    return public.PTDiTDiffuser(num_heads=heads, head_dim=head, num_layers=layers, **options).eval()


def record(public: types.ModuleType) -> None:
    """A video of eight windows, times that differ, texts of three and four words of five."""
    torch.manual_seed(0)
    window = [2, 2, 2]
    toy = model(
        public, 2, 8, 2, in_channels=2, out_channels=4, sample_size=8, frame=4, caption_channels=6,
        compress_ratios=window, proxy_compress_ratios=window,
    )  # fmt: skip
    weights = {key: 0.25 * torch.randn(w.shape) for key, w in toy.named_parameters()}
    weights = {key: w.half().float() for key, w in weights.items()}  # half the space, and no less exact
    toy.load_state_dict(weights, strict=False)
    x, t, text = torch.randn(2, 2, 4, 8, 8), torch.tensor([17.0, 803.0]), torch.randn(2, 5, 6)
    text[0, 3:], text[1, 4:] = 0.0, 0.0
    words = (text != 0).any(-1).float()
    with torch.no_grad():
        out = torch.cat([toy(x[i, None], t[i, None], text[i, None], words[i, None]) for i in range(2)])
    last = (0, 2, 3, 4, 1)  # channels behind the places
    np.savez_compressed(
        OUT,
        x=x.permute(last).numpy(),
        t=t.numpy(),
        text=text.numpy(),
        prediction=out.permute(last).numpy(),
        **{f"weight/{key}": w.numpy().astype(np.float16) for key, w in weights.items()},
    )


if __name__ == "__main__":
    import diffusers.models.attention  # before torch_npu, which it looks for  # noqa: F401

    sys.modules["torch_npu"] = types.ModuleType("torch_npu")
    for package in ("mindspeed_mm", "mindspeed_mm.models", "mindspeed_mm.models.common"):
        sys.modules[package] = types.ModuleType(package)
    imported("mindspeed_mm.models.common.embeddings", sys.argv[2])
    code = imported("pt_dit_diffusers", sys.argv[1])
    record(code)
    print(f"{OUT.name}: {OUT.stat().st_size} bytes")
    for name, size in SIZES.items():
        with torch.device("meta"):
            print(name, sum(weight.numel() for weight in model(code, *size).parameters()))
