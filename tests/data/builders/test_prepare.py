"""Preparation as a fresh machine meets it: several processes at once, no TensorFlow, a disk that refuses."""

import subprocess
import sys
import textwrap

import pytest

from effjax.data import builders
from effjax.errors import RunError, UsageError

PREPARE_AND_READ = """
    import sys
    from effjax.data import sources
    reader = sources.Tfds("digits", split="test", data_dir=sys.argv[1]).open()
    print(len(reader), reader[0]["image"].shape, reader.metadata.num_classes)
    assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
def test_two_processes_at_once_without_tensorflow(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(PREPARE_AND_READ), str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.split("\n")[0] == "360 (8, 8, 1) 10"
        assert "TensorFlow" not in err
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_the_loser_of_the_race_takes_what_the_winner_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(builders.scenes, "SPLITS", {"train": range(1)})
    place = tmp_path / "scenes" / "1.0.0"
    draw = builders.scenes.draw

    def draw_late(number):
        place.mkdir(parents=True, exist_ok=True)
        (place / "winner").touch()
        return draw(number)

    monkeypatch.setattr(builders.scenes, "draw", draw_late)
    assert builders.prepare("scenes", tmp_path) == place
    assert [path.name for path in place.iterdir()] == ["winner"]
    assert [path.name for path in place.parent.iterdir()] == ["1.0.0"]


def test_what_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        RunError, match=r"'digits' could not be written to .*file.*data_dir or \$TFDS_DATA_DIR"
    ):
        builders.prepare("digits", tmp_path / "file")


def test_unknown_name():
    with pytest.raises(UsageError, match=r"'digit' is not an embedded data set. Did you mean 'digits'"):
        builders.prepare("digit")
