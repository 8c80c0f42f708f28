"""A driver for tests: says what it was given.

python -m experiments.nothing --config=PATH
"""

import errno
import os
import subprocess
import sys

import pytest
from absl import flags

from effjax.errors import Preempted, RunError, UsageError
from experiments import cli

CONFIG = """
from ml_collections import ConfigDict, config_dict

VARIANTS = ("base", "smoke", "large")

def get_config(variant="base"):
    return ConfigDict(dict(
        seed=0, name=variant, resume=True, shape=(1, 2),
        table=None, sizes=[1], top=config_dict.placeholder(int),
        optimizer=dict(kind="adamw", lr=1e-3, schedule=dict(warmup=10)),
        stages=(dict(depth=2), dict(depth=4)),
    ))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "configs" / "vision").mkdir(parents=True)
    (tmp_path / "configs" / "vision" / "vit.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def drive(folder, monkeypatch, capfd):
    """Runs a driver on a command line; returns its exit code, output, errors."""

    def go(arguments, main=None, **options):
        values = flags.FlagValues()
        cli.define_config(flag_values=values)
        flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
        flags.DEFINE_integer("steps", 3, "how many", flag_values=values)
        monkeypatch.setattr(sys, "argv", ["driver", *arguments])

        def show(argv):
            loaded = cli.load_config(values)
            print(loaded.name, loaded.overrides, loaded.config.to_dict())

        with pytest.raises(SystemExit) as ended:
            cli.run(main or show, flag_values=values, **options)
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return go


VIT = "--config=configs/vision/vit.py:smoke"


def test_the_config_is_loaded_with_its_variant_and_overrides(drive):
    changes = [
        "--config.optimizer.lr=0.5",
        "--config.stages[1].depth=9",
        "--config.shape=(3,)",
        "--noconfig.resume",
    ]
    code, out, err = drive([VIT, *changes, "--config.top=7", "--config.seed", "4"])
    assert (code, err) == (0, "")
    assert out.startswith("configs/vision/vit.py:smoke {'optimizer.lr': 0.5, 'stages[1].depth': 9")
    for said in ("'lr': 0.5", "'depth': 9", "'shape': (3,)", "'resume': False", "'top': 7", "'seed': 4"):
        assert said in out.split("} {")[-1]
    assert "'name': 'smoke'" in out


def test_a_key_that_the_file_leaves_at_its_default_can_be_set(drive):
    new = [
        "--config.optimizer.b2=0.95",
        "--config.mesh.fsdp=2",
        "--config.table=(1, 2)",
        "--config.note=words",
    ]
    code, out, err = drive([VIT, *new])
    assert (code, err) == (0, "")
    for said in ("'b2': 0.95", "'mesh': {'fsdp': 2}", "'table': (1, 2)", "'note': 'words'"):
        assert said in out.split("} {")[-1]


def test_the_default_variant_is_the_file_s_own(drive):
    code, out, _ = drive(["--config", "configs/vision/vit.py"])
    assert code == 0
    assert out.startswith("configs/vision/vit.py {}")
    assert "'name': 'base'" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config is missing: it names the experiment, for example --config=configs/vision/vit.py:smo"),
        (["--wrokdir=a"], "--wrokdir is no flag of this program. Did you mean 'workdir'?"),
        (["--steps=many"], "flag --steps=many: invalid literal for int() with base 10: 'many'"),
        (["--config.seed=1"], "--config.seed needs a --config=PATH that it changes."),
        ([VIT, "stray"], "'stray' stands alone; this program takes flags only."),
        (["--config=configs/vison/vti.py"], "no file 'configs/vison/vti.py'. Near: configs/vision/vit.py"),
        (["--config=vit"], "there is no file 'vit'. Near: configs/vision/vit.py"),
        ([VIT + "r"], "has no variant 'smoker'. Did you mean 'smoke'?"),
        ([VIT, "--config.seed.x=1"], "config.seed is 0, not a section."),
        ([VIT, "--config.stages[2].depth=1"], "config.stages holds 2 values, from [0] to [1]."),
        ([VIT, "--config.stages[=1"], "--config.stages[ is no key. Write it like"),
        ([VIT, "--config.seed=1e3"], "--config.seed is of type int (0 in the file); '1e3' is not."),
        ([VIT, "--config.optimizer.lr=fast"], "optimizer.lr is of type float (0.001 in the file); 'fast'"),
        ([VIT, "--config.optimizer.lr", "fast"], "optimizer.lr=fast: could not convert string to float"),
        ([VIT, "--config.resume=maybe"], "config.resume=maybe"),
        ([VIT, "--config.sizes=[1]"], "--config.sizes is a list in the config file"),
        (["--config.seed=1", VIT], "Found --config.seed=1 in argv before a value for --config"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line_and_exit_code_2(drive, arguments, said):
    code, out, err = drive(arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "'bad.py', line 1: invalid syntax"),
        (
            "import ml_collectoins\n",
            "'bad.py', line 1: ModuleNotFoundError: No module named 'ml_collectoins'",
        ),
        ("def get_config(variant='a'):\n    return dict()[variant]\n", "'bad.py:a', line 2: KeyError: 'a'"),
        ("def get_config():\n    raise TypeError('no')\n", "'bad.py' has no variants; leave ':a' away"),
        (
            "def get_config(variant='a'):\n    return 3\n",
            "get_config() of 'bad.py' must return a ConfigDict, not 3",
        ),
        ("def configure():\n    pass\n", "'bad.py' has no get_config()"),
        (
            "from effjax.errors import UsageError\ndef get_config(v):\n    raise UsageError('mine')\n",
            "error: mine",
        ),
    ],
)
def test_a_wrong_config_file_is_one_line_that_names_the_line(drive, folder, text, said):
    (folder / "bad.py").write_text(text)
    code, _, err = drive(["--config=bad.py:a"])
    assert code == 2
    assert err.count("\n") == 1
    assert said in err


def fail(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("wrong"), 2, "error: wrong\n"),
        (RunError("broke"), 1, "error: broke\n"),
        (Preempted("saved step 3"), 75, "stopped: saved step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            ValueError("odd\nand more"),
            1,
            "error: ValueError: odd (run again with --debug for the traceback)\n",
        ),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"),
            1,
            "error: The disk is full: 'runs/a' could not be written. "
            "Free some space and start again to resume.\n",
        ),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(drive, error, code, said):
    assert drive([], fail(error)) == (code, "", said)


def test_a_full_disk_is_recognised_beneath_other_errors(drive):
    def main(argv):
        try:
            raise RuntimeError("RESOURCE_EXHAUSTED: write: No space left on device")
        except RuntimeError as error:
            raise ValueError("could not save") from error

    code, _, err = drive([], main)
    assert code == 1
    assert "The disk is full" in err


def test_debug_shows_the_traceback_and_keeps_the_code(drive):
    code, _, err = drive(["--debug"], fail(UsageError("wrong")))
    assert code == 2
    assert "Traceback" in err
    assert "fail.<locals>.main" in err or "raise error" in err
    assert err.endswith("error: wrong\n")


def test_the_exit_code_of_main_is_kept(drive):
    assert drive([], lambda argv: 1)[0] == 1
    assert drive([], lambda argv: None)[0] == 0


def test_positional_arguments_reach_main_where_it_takes_them(drive):
    code, out, _ = drive(["one", "two"], lambda argv: print(argv), positional="names of rows")
    assert (code, out) == (0, "['driver', 'one', 'two']\n")


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_is_the_docstring_and_the_own_flags(drive, flag):
    code, out, err = drive(["--config=missing.py", flag], positional="names of rows")
    assert (code, err) == (0, "")
    assert out.startswith("A driver for tests: says what it was given.\n\npython -m")
    assert "--config=PATH[:VARIANT]" in out
    assert "--[no]debug" in out
    assert "--steps=INT" in out
    assert "how many (default: 3)" in out
    assert "names of rows" in out


DRIVER = '''"""Says what it was given."""
import sys
from absl import flags, logging
from experiments import cli

cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "where the run lives")

def main(argv):
    assert "jax" not in sys.modules
    print(cli.command_line(), WORKDIR.value, cli.load_config().config.seed)
    for number in range(100_000 if WORKDIR.value == "long" else 0):
        print(number)

if __name__ == "__main__":
    cli.run(main)
'''


@pytest.fixture
def driver(folder):
    (folder / "driver.py").write_text(DRIVER)
    home = os.path.dirname(os.path.dirname(cli.__file__))
    return [sys.executable, "-W", "error", "-m", "driver"], {**os.environ, "PYTHONPATH": home}


def test_a_real_driver_with_the_shared_flags(driver):
    command, environment = driver
    given = [VIT, "--workdir=a b", "--config.seed=3"]
    done = subprocess.run([*command, *given], env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == f"python -m driver {VIT} '--workdir=a b' --config.seed=3 a b 3\n"
    shown = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True)
    names = [line.split("=")[0].strip() for line in shown.stdout.splitlines() if line.startswith("  --")]
    assert names == ["--config", "--[no]debug", "--workdir"]


def test_a_reader_that_leaves_is_no_error(driver):
    command, environment = driver
    piped = subprocess.Popen(
        [*command, VIT, "--workdir=long"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    piped.stdout.readline()
    piped.stdout.close()
    assert piped.stderr.read() == b""
    piped.stderr.close()
    assert piped.wait(20) == 141
