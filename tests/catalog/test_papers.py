"""`python -m experiments.papers`, as a person runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from effjax import catalog

ROOT = Path(__file__).parents[2]


def papers(*arguments):
    command = [sys.executable, "-m", "experiments.papers", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr
    return done


def test_lists_every_system_on_a_line_of_its_own():
    done = papers()
    assert done.returncode == 0, done.stderr
    for entry in catalog.load():
        [line] = [line for line in done.stdout.splitlines() if line.startswith(f"{entry.slug} ")]
        assert entry.room in line
        assert entry.title in line


def test_filters():
    done = papers("--room=models", "--find=PATCHES", "--status=" + catalog.get("dit", catalog.load()).status)
    assert done.stdout.splitlines()[-1].startswith("1 of ")
    assert "dit " in done.stdout


def test_shows_an_entry_whole():
    entry = catalog.get("uba_schedule", catalog.load())
    text = papers("uba_schedule").stdout
    for value in (entry.title, *entry.files, *entry.tests, entry.status, "arXiv:2505.24452"):
        assert value in text


def test_prints_the_page():
    assert papers("--markdown").stdout == catalog.render_markdown(catalog.load())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vti"], "error: 'vti' is not in the catalogue. Did you mean 'vit' or 'vim' or 'vdt'?"),
        (["--room=model"], "error: No room 'model' in the catalogue. Did you mean 'models'?"),
        (["--status=done"], "error: No status 'done'."),
        (["--markdown", "vit"], "error: Give names of systems, or filters, or --markdown: one of the three."),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(arguments, message):
    done = papers(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_starts_without_jax():
    program = "import sys, experiments.papers; sys.exit(bool({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_help():
    done = papers("--help")
    assert done.returncode == 0
    assert "--find" in done.stdout
