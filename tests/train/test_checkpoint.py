"""Checkpoints: what is read is what was saved, or it is said aloud that it is not."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import RunError, UsageError
from effjax.train.checkpoint import Checkpoints
from effjax.train.state import TrainState


def make_state(step=0):
    """A small state with everything that is awkward to store."""
    rng = np.random.default_rng(step)
    params = {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(5, 7)), jnp.bfloat16),
        "odd": jnp.asarray([np.nan, -0.0, np.inf, 1e-40], jnp.float32),
        "none": jnp.zeros((0, 3)),
        "packed": jnp.asarray(rng.integers(-8, 8, size=(9,)), jnp.int4),
    }
    state = TrainState.create(
        params, opt_state=((), {"mu": jax.tree.map(jnp.copy, params)}), key=jax.random.key(7)
    )
    return state.replace(step=jnp.int32(step))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def said():
    return []


def child(code, *arguments, devices=1, **kwargs):
    """Starts a Python of its own, which no kill or limit of ours can hurt."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("async_", [True, False])
def test_a_round_trip_is_bit_exact(tmp_path, async_):
    state = make_state(3)
    extra = {"examples": 2**53 + 1, "rate": 0.1, "list": (1, 2), "names": {2: "two", 10: "ten"}}
    checkpoints = Checkpoints(tmp_path, async_=async_)
    checkpoints.save(3, state, extra)
    assert checkpoints.steps() == ([] if async_ else [3])
    checkpoints.close()
    fresh = Checkpoints(tmp_path)
    restored = fresh.restore(jax.eval_shape(make_state))
    fresh.close()
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)
    assert [x.dtype for x in jax.tree.leaves(restored.state)] == [x.dtype for x in jax.tree.leaves(state)]
    assert restored.extra == {**extra, "list": [1, 2], "names": {"2": "two", "10": "ten"}}
    assert (restored.step, restored.skipped) == (3, ())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the steps 1 and 2, to be copied and spoiled."""
    directory = tmp_path_factory.mktemp("two")
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.close()
    return directory


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    path.write_bytes(bytes(content))


def delete(path):
    path.unlink()


@pytest.mark.parametrize("spoil", [truncate, flip, delete])
def test_no_spoilt_file_gives_a_spoilt_state(two_steps, tmp_path, spoil, said):
    files = sorted(path.relative_to(two_steps) for path in (two_steps / "2").rglob("*") if path.is_file())
    detected = set()
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(two_steps, directory)
        spoil(directory / file)
        said.clear()
        checkpoints = Checkpoints(directory, report=said.append)
        restored = checkpoints.restore(jax.eval_shape(make_state))
        checkpoints.close()
        # Some files are notes that nothing depends on. Whatever was spoilt, one whole state comes back.
        assert bits(restored.state) == bits(make_state(restored.step)), file
        assert restored.extra == {"step": restored.step}
        if restored.step == 2:
            assert not said
            assert not restored.skipped
        else:
            detected.add(str(file.relative_to("2")))
            assert said[0].startswith("The checkpoint of step 2 is damaged: "), file
            assert said[-1] == "Using the checkpoint of step 1 instead."
            assert [step for step, _ in restored.skipped] == [2]
            assert (directory / "2.corrupt").is_dir()
    assert {"manifest/metadata", "state/manifest.ocdbt"} <= detected
    assert {str(file.relative_to("2")) for file in files if "state/d/" in str(file)} <= detected
    assert any("ocdbt.process_0/d/" in file for file in detected)


def test_a_flipped_bit_anywhere_in_the_data_is_detected(two_steps, tmp_path, said):
    files = [path.relative_to(two_steps) for path in (two_steps / "2" / "state").rglob("d/*")]
    data = max(files, key=lambda path: (two_steps / path).stat().st_size)
    size = (two_steps / data).stat().st_size
    directory = tmp_path / "run"
    shutil.copytree(two_steps, directory)
    checkpoints = Checkpoints(directory, read_only=True, report=said.append)
    outcomes = []
    for place in np.linspace(0, size - 1, 25).astype(int):
        content = bytearray((two_steps / data).read_bytes())
        content[place] ^= 1
        (directory / data).write_bytes(bytes(content))
        restored = checkpoints.restore(jax.eval_shape(make_state))
        assert bits(restored.state) == bits(make_state(restored.step)), place
        outcomes.append(restored.step)
    # Orbax leaves some bytes that nothing refers to, and how many differs from run to run.
    assert outcomes.count(1) > 5, outcomes


def test_a_damaged_step_does_not_block_saving_it_again(two_steps, tmp_path, said):
    directory = tmp_path / "run"
    shutil.copytree(two_steps, directory)
    for round_ in (1, 2):
        for data in (directory / "2" / "state" / "d").iterdir():
            truncate(data)
        checkpoints = Checkpoints(directory, report=said.append)
        assert checkpoints.restore(make_state()).step == 1
        assert checkpoints.steps() == [1]
        checkpoints.save(2, make_state(20), {})
        checkpoints.wait()
        assert bits(checkpoints.restore(make_state()).state) == bits(make_state(20))
        checkpoints.close()
        assert len(list(directory.glob("2.corrupt*"))) == round_


def test_an_altered_array_is_named(two_steps, tmp_path, monkeypatch, said):
    directory = tmp_path / "run"
    shutil.copytree(two_steps, directory)
    checkpoints = Checkpoints(directory, report=said.append)
    load = Checkpoints._load

    def tamper(self, step, **arguments):
        found = load(self, step, **arguments)
        if step == 2 and "state" in found:
            found["state"]["params/half"] = found["state"]["params/half"].at[1, 2].multiply(2)
        return found

    monkeypatch.setattr(Checkpoints, "_load", tamper)
    assert checkpoints.restore(make_state()).step == 1
    assert "the contents of params/half are not what was saved" in said[0]
    checkpoints.close()


def test_no_sound_step_lists_each_and_leaves_them(two_steps, tmp_path, said):
    directory = tmp_path / "run"
    shutil.copytree(two_steps, directory)
    truncate(directory / "1" / "manifest" / "metadata")
    delete(directory / "2" / "state" / "manifest.ocdbt")
    checkpoints = Checkpoints(directory, report=said.append)
    with pytest.raises(RunError, match=r"holds no sound checkpoint \(step 2: .*; step 1: .*\)"):
        checkpoints.restore(make_state())
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


def test_a_machine_out_of_memory_is_no_damage(two_steps, monkeypatch, said):
    checkpoints = Checkpoints(two_steps, read_only=True, report=said.append)

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.restore(make_state())
    assert not said


def test_a_mismatch_is_one_message_with_every_path(two_steps):
    checkpoints = Checkpoints(two_steps, read_only=True)
    target = make_state()
    target.params["half"] = jnp.zeros((5, 8), jnp.bfloat16)
    target.params["odd"] = target.params["odd"].astype(jnp.float16)
    target.params["new"] = jnp.zeros((2,))
    del target.params["packed"]
    with pytest.raises(UsageError) as caught:
        checkpoints.restore(target)
    message = str(caught.value)
    assert "params/half: expected bfloat16[5, 8], found bfloat16[5, 7]" in message
    assert "params/odd: expected float16[4], found float32[4]" in message
    assert "params/new: expected float32[2], found nothing" in message
    assert "params/packed: expected nothing, found int4[9]" in message
    assert "4 arrays differ" in message


def test_a_part_can_be_read_alone(two_steps):
    checkpoints = Checkpoints(two_steps, read_only=True)
    restored = checkpoints.restore({"params": make_state().params}, partial=True)
    assert bits(restored.state["params"]) == bits(make_state(2).params)
    with pytest.raises(UsageError, match="params/absent: expected"):
        checkpoints.restore({"params": {"absent": jnp.zeros(1)}}, partial=True)


def test_a_step_can_be_asked_for_and_is_not_replaced_by_another(two_steps, tmp_path, said):
    directory = tmp_path / "run"
    shutil.copytree(two_steps, directory)
    checkpoints = Checkpoints(directory, report=said.append)
    assert checkpoints.restore(make_state(), step=1).step == 1
    with pytest.raises(UsageError, match=r"no checkpoint of step 5.*the steps \[1, 2\]"):
        checkpoints.restore(make_state(), step=5)
    truncate(directory / "2" / "manifest" / "metadata")
    with pytest.raises(RunError, match="no sound checkpoint"):
        checkpoints.restore(make_state(), step=2)
    checkpoints.close()


def test_an_empty_folder_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.steps() == []
    with pytest.raises(UsageError, match="holds no checkpoint"):
        checkpoints.restore(make_state())
    checkpoints.close()


def test_old_steps_go_and_periodic_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_period=4)
    for step in range(1, 8):
        checkpoints.save(step, {"w": jnp.full((2,), step)}, {})
    checkpoints.close()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 6, 7]


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in (1, 2, 3):
        checkpoints.save(5, {"w": jnp.full((2,), value)}, {"value": value})
    checkpoints.wait()
    assert checkpoints.restore({"w": jnp.zeros((2,), jnp.int32)}).extra == {"value": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
    with pytest.raises(UsageError, match=r"already holds the later steps \[5\]"):
        checkpoints.save(4, {"w": jnp.zeros((2,))}, {})
    checkpoints.close()


def test_a_replacement_cut_short_is_undone_or_completed(two_steps, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(two_steps, directory)
    shutil.copytree(directory / "1", directory / "1.replaced")  # killed after the commit
    (directory / "2").rename(directory / "2.replaced")  # killed before it
    (directory / "2.orbax-checkpoint-tmp").mkdir()
    watching = Checkpoints(directory, read_only=True)
    assert watching.steps() == [1]
    assert (directory / "2.orbax-checkpoint-tmp").exists()
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2"]
    checkpoints.close()


def test_the_state_can_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = step({"w": jnp.arange(3_000_000, dtype=jnp.float32), "n": jnp.int32(0)})
    checkpoints = Checkpoints(tmp_path, keep=4)
    expected = {}
    for number in range(4):
        expected[number] = float(state["w"][0]), float(state["w"][-1])
        checkpoints.save(number, state, {})
        for _ in range(3):
            state = step(state)  # overwrites the buffers in place while orbax writes
    checkpoints.wait()
    for number, ends in expected.items():
        restored = checkpoints.restore(state, step=number)  # verified against the fingerprints of the save
        assert (float(restored.state["w"][0]), float(restored.state["w"][-1])) == ends
    checkpoints.close()


@pytest.mark.slow
def test_kill_while_saving_leaves_a_sound_step(tmp_path):
    code = """
        import sys
        import jax.numpy as jnp
        from effjax.train.checkpoint import Checkpoints

        checkpoints = Checkpoints(sys.argv[1], keep=2)
        first = max(checkpoints.steps(), default=-1) + 1
        for step in range(first, first + 10_000):
            state = {"w": jnp.full((300_000,), step), "b": jnp.full((7,), step)}
            checkpoints.save(step, state, {"step": step})
            print(step, flush=True)
    """
    newest = -1
    for round_ in range(3):
        process = child(code, tmp_path)
        for _ in range(3 + round_):
            printed = int(process.stdout.readline())
        time.sleep(0.005 * round_)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        checkpoints = Checkpoints(tmp_path, report=pytest.fail)
        target = {"w": jnp.zeros((300_000,), jnp.int32), "b": jnp.zeros((7,), jnp.int32)}
        restored = checkpoints.restore(target)
        # A save waits for the one before, so at most the last one said is lost.
        assert restored.step >= printed - 1 > newest
        assert (np.asarray(restored.state["w"]) == restored.step).all()
        assert restored.extra == {"step": restored.step}
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, checkpoints.steps()))
        checkpoints.close()
        newest = restored.step


def test_a_full_disk_is_one_message_and_the_steps_before_are_intact(tmp_path):
    code = """
        import resource, signal, sys
        import jax.numpy as jnp
        from effjax.errors import RunError
        from effjax.train.checkpoint import Checkpoints

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # past the limit a write is then an error
        big = {"w": jnp.arange(300_000)}
        for async_ in (True, False):
            checkpoints = Checkpoints(sys.argv[1] + f"/{async_}", async_=async_)
            checkpoints.save(1, big, {"step": 1})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            for step in (1, 2):
                try:
                    checkpoints.save(step, big, {"step": step + 10})
                    checkpoints.wait()
                except RunError as error:
                    assert f"The checkpoint of step {step} could not be written" in str(error), error
                    assert "The checkpoints of the steps [1] are intact" in str(error), error
                else:
                    raise AssertionError("the write should have failed")
                assert checkpoints.restore(big).extra == {"step": 1}
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            checkpoints.save(2, big, {"step": 2})
            checkpoints.wait()
            assert checkpoints.restore(big).extra == {"step": 2}
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            try:
                checkpoints.save(3, big, {})
                checkpoints.close()
            except RunError:
                pass
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            again = Checkpoints(sys.argv[1] + f"/{async_}")
            assert again.steps() == [1, 2], again.steps()
            again.close()
    """
    finish(child(code, tmp_path))


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot hold checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_eight_devices_to_four_to_one(tmp_path):
    code = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from effjax.train.checkpoint import Checkpoints

        values = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
        devices = np.array(jax.devices())

        def place(count, spec):
            mesh = jax.sharding.Mesh(devices[:count].reshape(count // 2 or 1, -1), ("a", "b"))
            return NamedSharding(mesh, spec)

        checkpoints = Checkpoints(sys.argv[1])
        state = {"w": jax.device_put(values, place(8, P("a", "b"))), "s": jax.device_put(3, place(8, P()))}
        for step, (count, spec) in enumerate([(4, P("b", "a")), (1, P()), (8, P(("a", "b")))]):
            checkpoints.save(step, state, {})
            target = {
                "w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=place(count, spec)),
                "s": jax.ShapeDtypeStruct((), jnp.int32, sharding=place(count, P())),
            }
            state = checkpoints.restore(target).state
            assert state["w"].sharding == target["w"].sharding and len(state["w"].devices()) == count
            assert np.array_equal(state["w"], values) and int(state["s"]) == 3
        checkpoints.close()
    """
    finish(child(code, tmp_path, devices=8))
