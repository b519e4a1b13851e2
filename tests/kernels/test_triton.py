"""The door to Triton on a machine that has neither it nor a GPU, and the table of tiles."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import _triton, tiles
from kernels.grouped_ffn import grouped_ffn
from kernels.grouped_matmul import grouped_matmul
from kernels.tiles import Tile


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(_triton, "available", lambda: False)
    monkeypatch.setattr(_triton, "installed", lambda name: "")


def grouped(implementation):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((20, 8), (3, 8, 4)))
    sizes = jnp.array([7, 0, 9], jnp.int32)
    out, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return [out, *vjp(jnp.cos(out))]


def test_on_cpu_it_is_the_path_of_cpus(without_triton):
    for got, want in zip(grouped("triton"), grouped("reference"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_for_cuda_it_says_what_is_missing(without_triton, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    missing = pytest.raises(ValueError, match=r"jax-triton = None: expected an installed package; pip install")
    with missing, _triton.target(90):
        jax.jit(lambda: grouped("triton")).trace().lower(lowering_platforms=("cuda",))


GOOD = [("0.10.2", "0.3.1"), ("0.11.2", "0.4.1"), ("0.12.1", "0.5.0")]
BAD = [
    ("0.12.0.1", "0.4.1", "jax below 0.12 with this jax-triton"),
    ("0.12.0", "0.3.1", "jax below 0.12 with this jax-triton"),
    ("0.10.2", "0.4.1", "jax-triton 0.3 with this jax"),
    ("0.10.2", "", "an installed package"),
]


@pytest.mark.parametrize("pair", GOOD, ids="-".join)
def test_versions_that_work(pair):
    _triton.require_versions(*pair)


@pytest.mark.parametrize(("jax_version", "jax_triton", "message"), BAD)
def test_versions_known_not_to_work(jax_version, jax_triton, message):
    with pytest.raises(ValueError, match=f"expected {re.escape(message)}"):
        _triton.require_versions(jax_version, jax_triton)


def test_the_target_is_a_capability_of_80_or_more():
    assert _triton.capability() == 90
    with _triton.target(80):
        assert (_triton.capability(), _triton.multiprocessors()) == (80, 108)
    assert _triton.multiprocessors() == 132
    with pytest.raises(ValueError, match=r"compute capability = 75: expected at least 80"), _triton.target(75):
        pass


class OldGPU:
    compute_capability = "7.5"


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [OldGPU()])
    with pytest.raises(ValueError, match=r"compute capability = 75: expected at least 80"):
        _triton.capability()


@pytest.mark.parametrize(("change", "message"), [
    ({"activation": "relu"}, r"\('relu', 'no biases', 'output'\)"),
    ({"scale_on": "input"}, r"\('swiglu', 'no biases', 'input'\)"),
    ({"down_bias": jnp.zeros((2, 4))}, r"\('swiglu', 'biases', 'output'\)"),
])  # fmt: skip
def test_what_the_fused_ffn_does_not_know(change, message):
    width = 6 if change.get("activation") == "relu" else 12
    arrays = jnp.ones((3, 4)), jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1)), jnp.ones((3, 1), bool)
    with pytest.raises(ValueError, match=rf"activation, biases, scale_on = {message}: expected swiglu, no biases"):
        grouped_ffn(*arrays, jnp.ones((2, 4, width)), jnp.ones((2, 6, 4)), implementation="triton", **change)


@pytest.mark.parametrize(("values", "message"), [
    ((48, 64, 32, 4, 2), "BM = 48: expected a power of two"),
    ((16, 8, 32, 4, 2), "BN = 8: expected a power of two, at least 16"),
    ((16, 16, 16, 3, 2), "warps = 3: expected one of 1, 2, 4"),
    ((16, 16, 16, 4, 0), "stages = 0: expected at least 1"),
])  # fmt: skip
def test_a_bad_tile_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        Tile(*values)


def test_every_kernel_has_a_tile_for_every_class_and_card():
    for kernel, capabilities in tiles.table().items():
        for capability in (80, 90):
            assert list(capabilities[str(capability)]) == list(tiles.CLASSES)
            with _triton.target(capability):
                for rows, name in ((1, "few"), (32, "few"), (33, "some"), (256, "some"), (257, "many")):
                    assert tiles.tile_for(kernel, jnp.bfloat16, rows) == capabilities[str(capability)][name]
    sources = [tile.source for of in tiles.table().values() for by in of.values() for tile in by.values()]
    assert all(re.fullmatch("estimated|measured on .+", source) for source in sources)


def test_a_tile_may_be_chosen_for_a_while():
    mine = Tile(16, 32, 16, 2, 1)
    with tiles.using(mine):
        assert tiles.tile_for("anything", jnp.bfloat16, 5) is mine
    with pytest.raises(ValueError, match="kernel = 'anything': expected one of 'rows_kernel'"):
        tiles.tile_for("anything", jnp.bfloat16, 5)
