"""Records toys of public reference code that no library ships, for tests/models/test_published_code.py.

    python -m tests.parity.record_public unireplknet unireplknet.py
    python -m tests.parity.record_public lsnet lsnet.py

The second argument is the model file of AILab-CVC/UniRepLKNet, or of jameslahm/lsnet (model/lsnet.py), whose
Triton kernel is replaced by the same sum in plain torch.
"""

import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).resolve().parents[1] / "models" / "fixtures"


class UnfoldedSKA(torch.nn.Module):
    """Sum over the 3 x 3 neighbours, channel c with the weights of group c mod groups."""

    def forward(self, x, weights):
        batch, channels, height, width = x.shape
        groups = weights.shape[1]
        neighbours = torch.nn.functional.unfold(x, 3, padding=1)
        neighbours = neighbours.view(batch, channels // groups, groups, 9, height, width)
        return (neighbours * weights[:, None]).sum(3).reshape(x.shape)


def imported(path: str) -> types.ModuleType:
    """The model file as a module of a package whose `ska` is ours."""
    package, ska = types.ModuleType("public"), types.ModuleType("public.ska")
    package.__path__ = []  # type: ignore[attr-defined]
    ska.SKA = UnfoldedSKA  # type: ignore[attr-defined]
    sys.modules |= {"public": package, "public.ska": ska}
    # Nothing is registered: an entry of the older timm that they were written for stops the present one.
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    sys.modules["timm.models.registry"] = registry
    spec = importlib.util.spec_from_file_location("public.model", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["public.model"] = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def unireplknet(public: types.ModuleType) -> torch.nn.Module:
    """All kinds of stages: small kernels, large ones, in turn, and a remainder behind the turns."""
    kernels = (3,), (7, 7), (13, 3, 13), (5,)
    return public.UniRepLKNet(
        depths=(1, 2, 3, 1),
        dims=(8, 8, 16, 16),
        kernel_sizes=kernels,
        num_classes=5,
        attempt_use_lk_impl=False,
    )


def lsnet(public: types.ModuleType) -> torch.nn.Module:
    """Both mixers of a stage, the dynamic one and attention; a stage without blocks."""
    return public.LSNet(
        img_size=96, patch_size=8, num_classes=5, embed_dim=[32, 32, 32, 32], depth=[0, 2, 3, 2],
        num_heads=[2] * 4, key_dim=[8] * 4, distillation=True,
    )  # fmt: skip


def record(name: str, path: str) -> Path:
    """Draws weights anew, so that no initial zero or one hides a mistake, and writes weights and outputs."""
    model = {"unireplknet": unireplknet, "lsnet": lsnet}[name](imported(path)).eval()
    generator = np.random.default_rng(0)
    weights = {}
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        draw = generator.standard_normal(tensor.shape)
        if key.endswith("running_var"):
            draw = 0.5 + abs(draw)
        elif tensor.ndim > 1:
            draw = draw * tensor[0].numel() ** -0.5
        else:
            draw = 0.3 * draw + (1 if key.endswith("weight") else 0)
        # Half precision holds these numbers exactly, in half of the space.
        weights[key] = draw.astype(np.float16)
    model.load_state_dict({key: torch.from_numpy(w).float() for key, w in weights.items()}, strict=False)
    # Attention keeps a copy of its biases in evaluation.
    model.train().eval()
    # Drawn again by the tests: this generator's numbers never change.
    pictures = np.random.RandomState(1).standard_normal((2, 96, 96, 3)).astype(np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(pictures).permute(0, 3, 1, 2)).numpy()
    out = FOLDER / f"{name}.npz"
    np.savez_compressed(out, logits=logits, **{f"weight/{key}": w for key, w in weights.items()})
    return out


if __name__ == "__main__":
    written = record(*sys.argv[1:])
    print(f"{written.name}: {written.stat().st_size} bytes")
