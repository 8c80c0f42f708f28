"""Fingerprints: any altered bit shows, and no sharding does."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.train.fingerprint import fingerprint, fingerprints, host_fingerprint

DTYPES = ["bool", "int4", "int8", "uint8", "int16", "bfloat16", "float16", "int32", "uint32", "float32"]


def mix(h):
    """MurmurHash3's finaliser on Python integers."""
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


def reference(bits):
    """The definition in plain Python, for an array of unsigned integers."""
    first = second = 0
    for flat, index in enumerate(np.ndindex(bits.shape)):
        leading = index[0] if index else 0
        place = mix((mix((leading + 0x9E3779B9) % 2**32) + flat) % 2**32)
        a = mix(int(bits[index]) ^ place)
        first = (first + a) % 2**32
        second = (second + mix((a + place * 0xBB67AE85) % 2**32)) % 2**32
    return f"{first:08x}{second:08x}"


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_it_is_its_definition(shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = reference(values.view(np.uint32))
    first, second = np.asarray(fingerprint(jnp.asarray(values)))
    assert f"{first:08x}{second:08x}" == expected
    assert fingerprints({"x": jnp.asarray(values)}) == {"x": expected}


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 5)])
def test_on_the_host_it_is_the_same(dtype, shape, draw):
    values = jnp.asarray(draw.normal(size=shape) * 3).astype(dtype)
    np.testing.assert_array_equal(host_fingerprint(np.asarray(values)), fingerprint(values))


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_on_the_host_wide_elements_are_words_too(dtype, draw):
    values = (draw.normal(size=(3, 5)) * 2**31).astype(dtype)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(host_fingerprint(values), fingerprint(jnp.asarray(values)))


def test_arrays_above_and_below_the_size_for_the_host_stand_in_one_tree(draw):
    tree = {name: draw.normal(size=size).astype(np.float32) for name, size in (("a", 7), ("b", 70_000))}
    for path, words in fingerprints(jax.tree.map(jnp.asarray, tree)).items():
        first, second = host_fingerprint(tree[path])
        assert words == f"{first:08x}{second:08x}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_flipped_bit_changes_both_words(dtype):
    width = {"bool": 1, "int4": 4}.get(dtype, 8 * np.dtype(jnp.dtype(dtype)).itemsize)
    word = jnp.dtype(f"uint{max(width, 8)}")
    bits = np.random.default_rng(1).integers(0, 2**width, size=(2, 3)).astype(word)

    def words(b):
        if dtype == "bool":
            return fingerprint(jnp.asarray(b, jnp.bool_))
        if dtype == "int4":
            return fingerprint(jax.lax.bitcast_convert_type(jnp.asarray(b).astype(jnp.uint4), jnp.int4))
        return fingerprint(jax.lax.bitcast_convert_type(jnp.asarray(b), jnp.dtype(dtype)))

    before = np.asarray(words(bits))
    for index in np.ndindex(bits.shape):
        for bit in range(width):
            altered = bits.copy()
            altered[index] ^= np.asarray(1 << bit, word)
            assert (np.asarray(words(altered)) != before).all(), (index, bit)


def test_swapped_elements_and_moved_rows_show():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    seen = {fingerprints({"x": jnp.asarray(values)})["x"]}
    for i in range(24):
        for j in range(i):
            swapped = values.ravel().copy()
            swapped[[i, j]] = swapped[[j, i]]
            seen.add(fingerprints({"x": jnp.asarray(swapped.reshape(4, 6))})["x"])
    seen.add(fingerprints({"x": jnp.asarray(np.roll(values, 1, axis=0))})["x"])
    assert len(seen) == 1 + 24 * 23 // 2 + 1


def test_bits_are_compared_not_numbers():
    pair = fingerprints({"plus": jnp.float32([0.0]), "minus": jnp.float32([-0.0])})
    assert pair["plus"] != pair["minus"]
    nan = fingerprints({"nan": jnp.float32([np.nan])})
    assert nan == fingerprints({"nan": jnp.float32([np.nan])})


def test_only_integers_are_computed_with_and_nothing_is_stored_between():
    x = jax.ShapeDtypeStruct((64, 1024, 1024), jnp.float32)
    for equation in jax.make_jaxpr(fingerprint.__wrapped__)(x).eqns:
        assert all(jnp.issubdtype(v.aval.dtype, jnp.integer) for v in equation.outvars), equation.primitive
    memory = fingerprint.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1e5


def test_more_than_two_to_the_32_elements_are_well_defined():
    assert jax.eval_shape(fingerprint, jax.ShapeDtypeStruct((5, 2**31), jnp.int8)).shape == (2,)


@pytest.mark.slow
def test_one_and_eight_devices_agree():
    code = """
        import sys
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from effjax.train import fingerprint
        from effjax.train.fingerprint import fingerprints

        fingerprint._SMALL = -1  # nothing is read on the host
        assert jax.device_count() == int(sys.argv[1])
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 24, 8)), jnp.bfloat16)
        print(fingerprints({"x": x})["x"])
        if jax.device_count() == 8:
            mesh = jax.make_mesh((4, 2), ("a", "b"))
            for spec in (P(), P("a"), P(None, "b"), P("b", None, "a"), P(("a", "b"))):
                print(fingerprints({"x": jax.device_put(x, NamedSharding(mesh, spec))})["x"])
    """
    printed = set()
    for devices in (1, 8):
        flags = f"--xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code), str(devices)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        )
        printed |= set(done.stdout.split())
    assert len(printed) == 1, printed
