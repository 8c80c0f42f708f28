"""Records a toy of the published looped transformer for tests/models/test_algoformer.py.

    python -m tests.parity.record_looped LOOPED

The argument is a checkout of Leiay/looped_transformer.
"""

import sys
from pathlib import Path

import numpy as np
import torch

TARGET = Path(__file__).resolve().parents[1] / "models" / "fixtures" / "looped.npz"
EXAMPLES, DIMS, ITERATIONS, BEFORE = 5, 3, 4, 1


def record(checkout: Path) -> None:
    """Two layers of width 8 that run four times; the gradient reaches back over the last three."""
    sys.path.insert(0, str(checkout / "scripts"))
    import models

    model = models.TransformerModelLooped(DIMS, EXAMPLES, n_embd=8, n_layer=2, n_head=2)
    generator = torch.Generator().manual_seed(3)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for leaf in weights.values():
            leaf.copy_(0.4 * torch.randn(leaf.shape, generator=generator))
    x = torch.randn(2, EXAMPLES, DIMS, generator=generator)
    y = torch.randn(2, EXAMPLES, generator=generator)
    made = torch.stack(model(x, y, BEFORE, ITERATIONS))
    made.square().mean().backward()
    slope = weights["_read_in.weight"].grad
    assert slope is not None
    prompt = model._combine(x, y)
    arrays = {name: leaf.detach().numpy() for name, leaf in weights.items()}
    extra = dict(__input=prompt, __output=made.detach(), __gradient=slope)
    np.savez_compressed(TARGET, **arrays, **{name: value.numpy() for name, value in extra.items()})


if __name__ == "__main__":
    record(Path(sys.argv[1]))
