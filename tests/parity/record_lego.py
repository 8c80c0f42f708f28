"""Records a toy of the published LEGO for tests/models/test_lego.py.

    python -m tests.parity.record_lego LEGO

The argument is a checkout of JegZheng/LEGODiffusion.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

TARGET = Path(__file__).resolve().parents[1] / "models" / "fixtures" / "lego.npz"
SIZES, DEPTHS, CLASSES = (2, 4, 8), (2, 1, 1), 4
TIMES = (3.0, 500.0, 999.0)


def network(checkout: Path) -> torch.nn.Module:
    """Three growing bricks of width 16 on 8 x 8 pictures of two channels; the second has larger patches."""
    spec = importlib.util.spec_from_file_location("lego_models", checkout / "training" / "lego_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.lego_module_dict.update(toy_1=[16, 1, 2], toy_2=[16, 2, 2])
    return module.LEGO(
        list(SIZES),
        2,
        label_dim=CLASSES,
        class_dropout_prob=0.0,
        model_type=["toy_1", "toy_2", "toy_2"],
        depths=list(DEPTHS),
        train_intermediate_stages=True,
    )


def record(checkout: Path) -> None:
    """Draws weights anew, so that no initial zero hides a mistake, and writes what every brick predicts."""
    model, generator = network(checkout), torch.Generator().manual_seed(2)
    weights = {name: leaf for name, leaf in model.named_parameters() if "pos_embed" not in name}
    with torch.no_grad():
        for leaf in weights.values():
            leaf.copy_(0.25 * torch.randn(leaf.shape, generator=generator))
        x = torch.randn(3, 2, 8, 8, generator=generator)
        labels = torch.eye(CLASSES)[[1, 3, 0]]
        labels[2] = 0  # no label
        made = model.train()(x, torch.tensor(TIMES), labels)
    arrays = {name: leaf.detach().numpy() for name, leaf in weights.items()}
    outs = np.stack([out.permute(0, 2, 3, 1).numpy() for out in made])
    np.savez_compressed(
        TARGET, **arrays, __x=x.permute(0, 2, 3, 1).numpy(), __t=np.float32(TIMES), __out=outs
    )


if __name__ == "__main__":
    record(Path(sys.argv[1]))
