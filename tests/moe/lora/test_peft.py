"""Folders of Hugging Face PEFT: read, written, computed with; goldens are PEFT's own logits and gradients."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe.config import require
from moe.lora import presets
from moe.lora.adapters import with_routers
from moe.lora.config import ExpertsConfig
from moe.lora.peft import layer_places, read_peft, stack_adapters, write_peft
from moe.pretrained.model import Pretrained, load
from tests.moe.lora.models import CONFIG, assert_close, base, logits, run, trained

GOLDENS = Path(__file__).parents[2] / "goldens"
FOLDERS = GOLDENS / "lora_adapters"
GOLDEN = dict(np.load(GOLDENS / "lora.npz"))
CASES = sorted(path.name for path in FOLDERS.iterdir())
UNIFORM = ["lora", "rslora", "dora"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    spec = importlib.util.spec_from_file_location("golden_language_models", GOLDENS / "language_models.py")
    require(spec is not None and spec.loader is not None, "goldens", str(GOLDENS), "language_models.py")
    module = importlib.util.module_from_spec(spec)  # pyright: ignore[reportArgumentType]
    spec.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
    folder = tmp_path_factory.mktemp("llama")
    module.write_checkpoint("llama", folder)
    return load(folder)


def cross_entropy(model: Pretrained, adapters: Any, tree: Any) -> tuple[jax.Array, jax.Array]:
    rows = jnp.asarray(GOLDEN["tokens"])
    scores = logits(model.params, adapters, tree, rows, config=model.config)
    logp = jax.nn.log_softmax(scores[:, :-1])
    return -jnp.mean(jnp.take_along_axis(logp, rows[:, 1:, None], axis=-1)), scores


@pytest.mark.parametrize("case", CASES)
def test_computes_what_peft_computes(llama: Pretrained, case: str):
    """Logits and loss, ranks and scales that differ by module and layer included."""
    adapters, tree = read_peft(FOLDERS / case, llama.config)
    loss, scores = cross_entropy(llama, adapters, tree)
    assert_close(scores, GOLDEN[f"{case}/logits"], 1e-5)
    assert loss == pytest.approx(float(GOLDEN[f"{case}/loss"]), rel=1e-5)


@pytest.mark.parametrize("case", UNIFORM)
@pytest.mark.slow_after(1)
def test_gradients_are_those_of_peft(llama: Pretrained, case: str):
    adapters, tree = read_peft(FOLDERS / case, llama.config)
    found = jax.grad(lambda tree: cross_entropy(llama, adapters, tree)[0])(tree)
    places, seen = layer_places(llama.config), 0
    for key, wanted in GOLDEN.items():
        if not key.startswith(f"{case}/grads/"):
            continue
        *_, layer, part, module, leaf = key.removesuffix(".weight").split(".")
        run_name, place = places[int(layer)]
        of = found[run_name]["ffn" if part == "mlp" else "attention"][f"lora_{module.removesuffix('_proj')}"]
        ours = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}[leaf]
        assert_close(of[ours][place, 0].T, wanted, 2e-5)
        seen += 1
    assert seen == len(load_file(FOLDERS / case / "adapter_model.safetensors"))


@pytest.mark.parametrize("case", UNIFORM)
def test_read_and_written_is_the_same_file(llama: Pretrained, case: str, tmp_path: Path):
    write_peft(tmp_path / "out", llama.config, *read_peft(FOLDERS / case, llama.config), base="tiny-llama")
    before, after = FOLDERS / case, tmp_path / "out"
    name = "adapter_model.safetensors"
    assert (after / name).read_bytes() == (before / name).read_bytes()
    mine, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in (after, before))
    assert {key: theirs[key] for key in mine if key != "target_modules"} == {
        key: value for key, value in mine.items() if key != "target_modules"
    }
    assert set(mine["target_modules"]) == set(theirs["target_modules"])
    assert {path.name for path in after.iterdir()} == {name, "adapter_config.json"}


def test_patterns_written_again_compute_the_same(llama: Pretrained, tmp_path: Path):
    adapters, tree = read_peft(FOLDERS / "patterns_by_layer", llama.config)
    write_peft(tmp_path / "out", llama.config, adapters, tree)
    again = read_peft(tmp_path / "out", llama.config)
    np.testing.assert_array_equal(cross_entropy(llama, *again)[1], cross_entropy(llama, adapters, tree)[1])


def test_ours_comes_back_from_a_peft_folder(tmp_path: Path):
    for name in ("lora", "rslora", "dora"):
        adapters = getattr(presets, name)(4, 6.0)
        tree = trained(adapters)
        write_peft(tmp_path / name, CONFIG, adapters, tree)
        found, again = read_peft(tmp_path / name, CONFIG)
        assert replace(found, targets=adapters.targets) == adapters
        assert set(found.targets) == set(adapters.targets)
        jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_a_bfloat16_folder_is_read_as_it_is(llama: Pretrained, tmp_path: Path):
    folder = broken(tmp_path, tensors=lambda found: found.update({k: v.astype(jnp.bfloat16) for k, v in found.items()}))
    (_, tree), (_, wide) = (read_peft(path, llama.config) for path in (folder, FOLDERS / "lora"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16).astype(np.float32)), tree, wide)


# --- experts from folders ---


def two(llama: Pretrained) -> list[Any]:
    return [read_peft(FOLDERS / case, llama.config) for case in ("lora", "patterns")]


def test_stacked_adapters_are_each_of_them(llama: Pretrained):
    """Ranks and scales differ; a sequence's label chooses: each row is that adapter alone."""
    found = two(llama)
    stacked, experts = stack_adapters(found)
    assert stacked.scale == 1.0
    mixture = replace(stacked, experts=ExpertsConfig(2, 2, targets=stacked.targets, routing="input"))
    tree = with_routers(llama.config, mixture, experts, llama.params, jax.random.key(0))
    rows = jnp.asarray(GOLDEN["tokens"])
    both = logits(llama.params, mixture, tree, rows, config=llama.config, labels=jnp.array([1, 0]))
    for row, one in ((0, 1), (1, 0)):
        assert_close(both[row], logits(llama.params, *found[one], rows, config=llama.config)[row], 1e-5)


def test_stacking_keeps_what_one_of_them_lacks_at_zero(llama: Pretrained):
    found = [read_peft(FOLDERS / case, llama.config) for case in ("lora", "rslora")]  # the latter has q and v alone
    stacked, experts = stack_adapters(found)
    mixture = replace(stacked, experts=ExpertsConfig(2, 1, targets=stacked.targets, routing="input"))
    tree = with_routers(llama.config, mixture, experts, llama.params, jax.random.key(0))
    rows = jnp.asarray(GOLDEN["tokens"])
    second = logits(llama.params, mixture, tree, rows, config=llama.config, labels=jnp.array([1, 1]))
    assert_close(second, logits(llama.params, *found[1], rows, config=llama.config), 1e-5)


def test_routers_over_frozen_experts_learn(llama: Pretrained):
    stacked, experts = stack_adapters(two(llama))
    mixture = replace(stacked, experts=ExpertsConfig(2, 2, targets=stacked.targets, routing="input"))
    tree = with_routers(llama.config, mixture, experts, llama.params, jax.random.key(0))
    found = jax.grad(lambda tree: cross_entropy(llama, mixture, tree)[0])(tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if path[-1].key == "weight":
            assert np.abs(leaf).max() > 0


# --- bad input ---


def broken(tmp_path: Path, change: Any = None, tensors: Any = None) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(FOLDERS / "lora", folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    if change is not None:
        change(raw)
        (folder / "adapter_config.json").write_text(json.dumps(raw))
    if tensors is not None:
        found = load_file(folder / "adapter_model.safetensors")
        tensors(found)
        save_file(found, folder / "adapter_model.safetensors")
    return folder


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
EIGHTH = FIRST.replace("layers.0", "layers.7")


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        (lambda raw: raw.update(peft_type="IA3"), None, "adapter_config.json peft_type = 'IA3': expected LORA"),
        (lambda raw: raw.pop("lora_alpha"), None, "adapter_config.json lora_alpha = None: expected a positive number"),
        (lambda raw: raw.update(r=0), None, "adapter_config.json r = 0"),
        (lambda raw: raw.update(r=8), None, "r = 8"),
        (lambda raw: raw.update(bias="all"), None, "adapter_config.json bias = 'all'"),
        (lambda raw: raw.update(modules_to_save=["lm_head"]), None, "modules_to_save"),
        (lambda raw: raw.update(lora_dropout=1.0), None, "adapters.dropout = 1.0"),
        (lambda raw: raw.update(init_lora_weights="pissa"), None, "init_lora_weights = 'pissa'"),
        (lambda raw: raw.update(alpha_pattern={"q_proj": "8"}), None, "alpha_pattern q_proj = '8': expected"),
        (lambda raw: raw.update(rank_pattern={"(": 2}), None, "rank_pattern = '(': expected a regular expression"),
        (lambda raw: raw.update(rank_pattern=[2]), None, "rank_pattern = [2]: expected an object"),
        (None, lambda found: found.pop(FIRST), "['b']: expected ['a', 'b']"),
        (None, lambda found: found.update({FIRST: zeros(4, 21)}), "as the base has it"),
        (None, lambda found: found.update({FIRST.replace("mlp.down_proj", "head"): zeros(4, 4)}), "layers.0.head"),
        (None, lambda found: found.update({EIGHTH: zeros(4, 20), EIGHTH.replace("_A", "_B"): zeros(32, 4)}),
         "layer = 7: expected layers 0 to 1"),
    ],
)  # fmt: skip
def test_bad_folder(llama: Pretrained, tmp_path: Path, change: Any, tensors: Any, message: str):
    with pytest.raises(ValueError) as error:
        read_peft(broken(tmp_path, change, tensors), llama.config)
    assert message in str(error.value)


@pytest.mark.slow
def test_bad_calls(llama: Pretrained, tmp_path: Path):
    with pytest.raises(ValueError, match=r"adapter_config.json = .*: expected an existing file"):
        read_peft(tmp_path / "nowhere", llama.config)
    mixture = presets.mixlora(4, 8.0)
    with pytest.raises(ValueError, match="PEFT has no mixtures"):
        write_peft(tmp_path / "out", CONFIG, mixture, trained(mixture))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="adapters = \\[\\]: expected one or more"):
        stack_adapters([])
    plain = [(config, trained(config)) for config in (presets.lora(4, 8.0), presets.lora(2, 8.0))]
    with pytest.raises(ValueError, match=r"adapters.rank = \[2, 4\]: expected one rank, or padding"):
        stack_adapters(plain, pad=False)
    with pytest.raises(ValueError, match="adapters of one base"):
        stack_adapters([plain[0], read_peft(FOLDERS / "lora", llama.config)])
    config, tree = plain[0]
    zero = jax.tree.map(jnp.zeros_like, stack_adapters([(config, tree)])[1])
    one = presets.mola(4, 4.0, num_experts=1, top_k=1)
    with pytest.raises(ValueError, match="all zero"):
        with_routers(CONFIG, one, zero, base(), jax.random.key(0))
    assert run(base()).hidden.shape == (2, 12, 32)
