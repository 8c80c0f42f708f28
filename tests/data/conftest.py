"""One data directory for the embedded data sets, prepared on first use."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Two classes; `cat` has three pictures and `ant` two, each of one grey value."""
    for name, values in (("cat", (10, 20, 30)), ("ant", (40, 50))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for value in values:
            pixels = np.full((6, 5, 3), value, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{value}.png")
    return tmp_path / "pictures"


class Numbers:
    """A source whose example i is the number i."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": np.full((3, 3, 1), index, np.uint8), "label": np.int32(index)}


@pytest.fixture
def numbers() -> type[Numbers]:
    return Numbers
