"""Records a toy of the published Switch-DiT for tests/models/blocks/test_switch_dit.py.

    python -m tests.parity.record_switch_dit SWITCH_DIT

The argument is a checkout of byeongjun-park/Switch-DiT. Its grouped product needs no kernel on a CPU.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

TARGET = Path(__file__).resolve().parents[1] / "models" / "fixtures" / "switch_dit.npz"
# Early and late, where the paths of the toy differ; 4 is "no label".
TIMES, LABELS = (0, 500, 999, 30, 700, 950), (0, 1, 2, 3, 4, 1)


class Section(dict):
    """A mapping that is read by attribute and unpacked, as the configuration of the original is."""

    __getattr__ = dict.__getitem__


def network(checkout: Path) -> torch.nn.Module:
    """Three layers of width 16 on 4 x 4 pictures of two channels."""
    sys.path[:0] = [str(checkout), str(checkout / "models" / "parallel_linear")]
    from models.DiT.models import DiT  # type: ignore[import-not-found]
    from models.MoE import TaskMoE  # type: ignore[import-not-found]

    routing = Section(name="DMoE", taskcount=1000, w_JSD=1, param=Section(num_experts=3, k=2))
    sizes = SimpleNamespace(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=3, num_heads=2)
    return DiT(router=TaskMoE, routing_config=routing, num_classes=4, **vars(sizes))


def record(checkout: Path) -> None:
    """Draws weights anew, so that no initial zero hides a mistake, and writes weights, output and prior."""
    model, generator = network(checkout), torch.Generator().manual_seed(1)
    weights = {name: leaf for name, leaf in model.named_parameters() if name != "pos_embed"}
    x = torch.empty(6, 2, 4, 4)
    with torch.no_grad():
        for name, leaf in weights.items():
            spread = 0.75 if "f_gate" in name else 0.25
            leaf.copy_(spread * torch.randn(leaf.shape, generator=generator))
        x.normal_(generator=generator)
        args = x, torch.tensor(TIMES), torch.tensor(LABELS)
        out = model.eval()(*args)
        model.train().y_embedder.dropout_prob = 0
        # The order in which it looks for the best matching is random, the matching is not.
        _, prior = model(*args)
    arrays = {name: leaf.detach().numpy() for name, leaf in weights.items()}
    np.savez_compressed(
        TARGET,
        **arrays,
        __x=x.permute(0, 2, 3, 1).numpy(),
        __t=np.float32(TIMES),
        __y=np.int32(LABELS),
        __out=out.permute(0, 2, 3, 1).numpy(),
        __prior=prior.numpy(),
        __windows=model.prior._unit_mapping.numpy().argmax(1).astype(np.int16),
    )


if __name__ == "__main__":
    record(Path(sys.argv[1]))
