import numpy as np
import pytest

from effjax.data.chosen import read_scores
from tests.experiments.driver import drive, metric_rows

pytestmark = pytest.mark.slow
CONFIG = "--config=configs/language/miniplm.py"
FEW = "--config.data.source.source.split=train[:2%]", "--config.evaluators.test.data.source.split=test[:2%]"


def test_from_a_run_to_scores_to_a_student(tmp_path):
    run, scores, student = tmp_path / "run", tmp_path / "scores.npz", tmp_path / "student"
    drive("train", f"{CONFIG}:smoke", f"--workdir={run}", f"{FEW[1]}")
    asked = f"{CONFIG}:pydocs", FEW[0], f"--workdir={run}", f"--reference={run}", f"--out={scores}"
    said, _ = drive("score_text", *asked)
    found, sizes = read_scores(scores)
    assert f"scores of {len(found)} documents" in said
    bits = [line.split()[-1] for line in said.splitlines() if "bits a byte" in line]
    assert bits[0] == bits[1]
    assert 3 < float(bits[0]) < 8
    np.testing.assert_array_equal(found, 0)  # one model knows as much as itself
    assert sizes.min() > 1
    _, error = drive("score_text", *asked, code=2)
    assert "exists: name another file" in error
    steps = (
        "--config.train.steps=2 steps",
        "--config.data.batch_size=4",
        f"--config.data.source.scores={scores}",
    )
    drive("train", f"{CONFIG}:pydocs", f"--workdir={student}", *FEW, *steps)
    assert np.isfinite([row["loss"] for row in metric_rows(student)]).all()
