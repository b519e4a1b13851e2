"""Conversion and saving: bit by bit there and back, in little memory, all or nothing, and what is refused."""

import json
import struct
import tracemalloc
from dataclasses import fields, replace

import jax
import ml_dtypes
import numpy as np
import pytest

from moe.config import ModelConfig, MoEConfig
from moe.pretrained.checkpoint import Tensors, open_checkpoint
from moe.pretrained.convert import write_model
from moe.pretrained.model import convert, load, read_config, save
from moe.pretrained.ours import model_tensors
from moe.pretrained.quantized import dequantized
from moe.pretrained.safetensors import TensorInfo, open_safetensors, write_safetensors
from moe.routing import make_router

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def read_all(folder):
    source = open_safetensors(folder)
    return {name: source.read(name) for name in source.tensors}


def write_all(folder, arrays, **config):
    """Tensors into a folder, and changes of its config.json; None takes a field out."""
    write_safetensors(folder, {name: TensorInfo(a.dtype, a.shape) for name, a in arrays.items()}, arrays.values())
    raw = json.loads((folder / "config.json").read_text()) | config
    text = {name: value for name, value in raw.items() if value is not None or name not in config}
    (folder / "config.json").write_text(json.dumps(text))


def read_json(folder):
    return json.loads((folder / "config.json").read_text())


def assert_same_bytes(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def there_and_back(folder, tmp_path):
    notes = convert(folder, tmp_path / "ours"), convert(tmp_path / "ours", tmp_path / "back")
    return notes, tmp_path / "ours", tmp_path / "back"


def check_round_trip(checkpoint, tmp_path, case, dtype):
    folder = checkpoint(case, shards=2)
    arrays = {name: array.astype(DTYPES[dtype]) for name, array in read_all(folder).items()}
    write_all(folder, arrays, dtype=dtype)
    notes, ours, back = there_and_back(folder, tmp_path)
    assert notes == ((), ())
    assert_same_bytes(read_all(back), arrays)
    assert read_json(back) == read_json(folder)
    assert {array.dtype for array in read_all(ours).values()} == {np.dtype(DTYPES[dtype])}


@pytest.mark.slow_after(3)
def test_there_and_back_is_the_same_bytes(checkpoint, tmp_path, golden_case):
    check_round_trip(checkpoint, tmp_path, golden_case, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_there_and_back_in_half_precision(checkpoint, tmp_path, family_case, dtype):
    check_round_trip(checkpoint, tmp_path, family_case, dtype)


def test_our_form_says_everything(checkpoint, tmp_path):
    folder = checkpoint("qwen2_moe_mixed")
    convert(folder, tmp_path / "ours")
    raw, config = read_json(tmp_path / "ours"), read_config(folder)[1]
    assert raw["model_type"] == "switchyard"
    assert raw["origin"] == read_json(folder)
    assert raw["model"].keys() == {field.name for field in fields(ModelConfig)}
    assert raw["model"]["moe"].keys() == {field.name for field in fields(MoEConfig)}
    assert read_config(tmp_path / "ours") == ("switchyard", config)
    shapes = {name: array.shape for name, array in read_all(tmp_path / "ours").items()}
    assert shapes == {name: info.shape for name, info in model_tensors(config).items()}
    assert shapes["layers.3.moe.experts.gate_up"] == (6, 32, 24)
    assert shapes["layers.0.ffn.down"] == (20, 32)


def test_tokenizer_and_licence_come_along_and_code_and_pickles_do_not(checkpoint, tmp_path):
    folder = checkpoint("llama")
    kept = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "merges.txt",
            "vocab.json", "special_tokens_map.json", "LICENSE")  # fmt: skip
    for name in (*kept, "modeling_llama.py", "optimizer.pt", "training_args.bin"):
        (folder / name).write_text(f"text of {name}")
    _, ours, back = there_and_back(folder, tmp_path)
    for made in (ours, back):
        found = {path.name for path in made.iterdir()}
        assert found == {*kept, "config.json", "model.safetensors"}
        assert all((made / name).read_text() == f"text of {name}" for name in kept)


# --- tensors that no model uses ---


def test_unused_tensors_are_carried_there_and_back(checkpoint, tmp_path):
    """Layers for multi-token prediction, and what old checkpoints have."""
    folder = checkpoint("deepseek_v3")
    arrays = read_all(folder)
    arrays["model.layers.3.eh_proj.weight"] = np.arange(6, dtype=np.float16).reshape(2, 3)
    arrays["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write_all(folder, arrays)
    notes, ours, back = there_and_back(folder, tmp_path)
    assert sorted(notes[0]) == [
        "tensors that are not used (RoPE follows from the config): 1",
        "tensors that are not used (the layers for multi-token prediction are left out): 1",
    ]
    assert_same_bytes(read_all(back), arrays)
    assert "carried.model.layers.3.eh_proj.weight" in read_all(ours)
    assert load(ours).config == load(folder).config


def test_a_tied_head_that_is_the_embedding_is_carried(checkpoint, tmp_path):
    folder = checkpoint("qwen2_tied")
    arrays = read_all(folder)
    write_all(folder, arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"].copy()})
    _, _, back = there_and_back(folder, tmp_path)
    assert_same_bytes(read_all(back), read_all(folder))


# --- quantised sources ---


def fp8_checkpoint(folder, rng):
    """DeepSeek-V3 with every matrix of a layer but the routers in fp8, a scale for each 16 x 16 block."""
    arrays = read_all(folder)
    for name in [n for n in arrays if n.startswith("model.layers") and arrays[n].ndim == 2 and "mlp.gate." not in n]:
        rows, columns = arrays[name].shape
        arrays[name] = arrays[name].astype(ml_dtypes.float8_e4m3fn)
        scales = (-(-rows // 16), -(-columns // 16))
        arrays[f"{name}_scale_inv"] = rng.uniform(0.5, 2.0, scales).astype(np.float32)
    write_all(folder, arrays, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    return (16, 16)


def mxfp4_checkpoint(folder, rng):
    """gpt-oss with its experts' matrices in MXFP4; these rows must be whole groups of 32."""
    arrays = read_all(folder)
    for name in [name for name in arrays if "experts" in name]:
        experts, layer = arrays[name].shape[0], name.rsplit(".", 1)[0]
        kind = name.rsplit(".", 1)[1]
        if kind in ("gate_up_proj", "down_proj"):
            rows = 64 if kind == "gate_up_proj" else 32
            del arrays[name]
            arrays[f"{layer}.{kind}_blocks"] = rng.integers(0, 256, (experts, rows, 1, 16), dtype=np.uint8)
            arrays[f"{layer}.{kind}_scales"] = rng.integers(121, 125, (experts, rows, 1), dtype=np.uint8)
        elif kind == "gate_up_proj_bias":
            arrays[name] = rng.standard_normal((experts, 64)).astype(np.float32)
    write_all(folder, arrays, intermediate_size=32, quantization_config={"quant_method": "mxfp4"})
    return None


@pytest.mark.parametrize(
    ("case", "make", "kind"), [("deepseek_v3", fp8_checkpoint, "fp8"), ("gpt_oss", mxfp4_checkpoint, "MXFP4")]
)
def test_quantised_sources_are_read_as_bfloat16_and_said_to_be(checkpoint, tmp_path, case, make, kind):
    folder = checkpoint(case)
    block = make(folder, np.random.default_rng(0))
    plain = dequantized(open_safetensors(folder), weight_block_size=block)
    notes, ours, back = there_and_back(folder, tmp_path)
    assert len(notes[0]) == 1
    assert notes[0][0].startswith(f"tensors read as bfloat16 because they are {kind}")
    assert_same_bytes(read_all(back), {name: plain.read(name) for name in plain.tensors})
    raw = read_json(back)
    assert raw.pop("torch_dtype") == "bfloat16"
    released = read_json(folder)
    assert raw == {name: value for name, value in released.items() if name not in ("quantization_config", "dtype")}
    assert load(folder).notes == notes[0]
    trees = [jax.tree.map(np.asarray, load(form).params) for form in (folder, ours, back)]
    for tree in trees[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, trees[0], tree))


# --- memory ---


def test_a_conversion_holds_one_layers_experts_at_most(tmp_path):
    shape = MoEConfig(num_experts=8, top_k=2, expert_dim=128)
    config = ModelConfig(vocab_size=512, hidden=128, num_layers=10, num_heads=4, num_kv_heads=2, head_dim=32,
                         ffn_dim=128, moe=shape, context=64)  # fmt: skip
    made = Random(config)
    (tmp_path / "released").mkdir()
    write_model(tmp_path / "released", config, made, "mixtral")
    largest, total = (f(info.nbytes for info in made.tensors.values()) for f in (max, sum))
    assert total > 12 * largest
    for source, target in (("released", "ours"), ("ours", "back")):
        tracemalloc.start()
        convert(tmp_path / source, tmp_path / target)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2.5 * largest, (source, peak, largest)
    assert_same_bytes(read_all(tmp_path / "back"), read_all(tmp_path / "released"))


class Random:
    """A model of random bfloat16 numbers, each tensor drawn when it is read."""

    def __init__(self, config):
        self.tensors = {
            name: TensorInfo(np.dtype(ml_dtypes.bfloat16), info.shape) for name, info in model_tensors(config).items()
        }

    def read(self, name):
        bits = np.random.default_rng(len(name)).integers(0, 1 << 14, self.tensors[name].shape, dtype=np.uint16)
        return bits.view(ml_dtypes.bfloat16)


# --- saving ---


def trained(model):
    """Parameters that no checkpoint has."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), model.params)


@pytest.mark.parametrize("form", ["family", "switchyard"])
def test_saved_parameters_load_again(checkpoint, tmp_path, family_case, form):
    """Family's own config.json is made from ours: read again, it says the same."""
    model = load(checkpoint(family_case))
    params, family = trained(model), model.family if form == "family" else form
    save(tmp_path / "saved", model.config, params, model.router_state, family=family)
    again = load(tmp_path / "saved")
    assert (again.family, again.config) == (family, model.config)
    for got, wanted in ((again.params, params), (again.router_state, model.router_state)):
        assert jax.tree.all(jax.tree.map(np.array_equal, got, wanted))
    if form == "family":
        raw = read_json(tmp_path / "saved")
        assert raw["torch_dtype"] == "float32"
        assert open_safetensors(tmp_path / "saved").tensors == open_safetensors(checkpoint(family_case)).tensors


def test_saved_in_bfloat16(checkpoint, tmp_path):
    model = load(checkpoint("deepseek_v3"))
    save(tmp_path / "saved", model.config, model.params, model.router_state, family="deepseek_v3", dtype="bfloat16")
    rounded, kept = read_all(tmp_path / "saved"), read_all(checkpoint("deepseek_v3"))
    for name, array in kept.items():
        wanted = array if "e_score_correction_bias" in name else array.astype(ml_dtypes.bfloat16)
        assert rounded[name].dtype == wanted.dtype, name
        assert rounded[name].tobytes() == wanted.tobytes(), name
    assert read_json(tmp_path / "saved")["torch_dtype"] == "bfloat16"


def test_a_dense_model_may_be_written_as_a_family_of_mixtures(checkpoint, tmp_path):
    folder = checkpoint("qwen3_biases")
    assert convert(folder, tmp_path / "other", to="qwen3_moe") == ()
    again, model = load(tmp_path / "other"), load(folder)
    assert again.family == "qwen3_moe"
    assert replace(again.config, dense_layers=(), moe_every=1) == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, model.params))


LLAMA = ModelConfig(vocab_size=9, hidden=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, ffn_dim=6, moe=None,
                    context=16)  # fmt: skip
MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=6)
MIXTRAL = replace(LLAMA, moe=MOE)
LOSES = {  # family, a config that it cannot hold -> the field that is named
    ("llama", "qwen biases"): (replace(LLAMA, attention_bias="qkv"), "model.attention_bias = 'qkv'"),
    ("llama", "norms"): (replace(LLAMA, qk_norm="head"), "model.qk_norm = 'head'"),
    ("llama", "windows"): (replace(LLAMA, windows=(4, 0)), r"model.windows = \(4, 0\)"),
    ("llama", "mixture"): (MIXTRAL, "model.moe"),
    ("llama", "no context"): (replace(LLAMA, context=0), "model.context = 0"),
    ("qwen2", "no biases"): (LLAMA, "model.attention_bias = 'none'"),
    ("mixtral", "dense"): (LLAMA, "model.moe = None"),
    ("mixtral", "mixed"): (replace(MIXTRAL, dense_layers=(0,)), "model.dense_layers"),
    ("mixtral", "windows"): (replace(MIXTRAL, windows=(4, 5)), r"model.windows = \(4, 5\)"),
    ("mixtral", "shared"): (replace(MIXTRAL, moe=replace(MOE, shared_dim=6)), "model.moe.shared_dim = 6"),
    ("mixtral", "gelu"): (replace(MIXTRAL, moe=replace(MOE, activation="gelu")), "model.moe.activation = 'gelu'"),
    ("mixtral", "capacity"): (replace(MIXTRAL, moe=replace(MOE, policy="capacity(factor=2)")), "moe.policy = 'capac"),
    ("mixtral", "raw"): (
        replace(MIXTRAL, moe=replace(MOE, router="softmax_topk(renormalize=False)")), "model.moe.router",
    ),
    ("olmoe", "no norms"): (MIXTRAL, "model.qk_norm = 'none'"),
    ("deepseek_v3", "no latent"): (MIXTRAL, "model.latent = None"),
    ("gpt_oss", "no sinks"): (MIXTRAL, "model"),
}  # fmt: skip


@pytest.mark.parametrize("row", LOSES)
def test_a_family_that_cannot_say_it_is_refused(tmp_path, row):
    config, message = LOSES[row]
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", config, Random(config), "switchyard")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", tmp_path / "other", to=row[0])
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_router_is_compared_by_what_it_does(tmp_path):
    config = replace(MIXTRAL, moe=replace(MOE, router="softmax_topk(renormalize=True)", dispatcher="einsum"))
    assert make_router(config.moe) == make_router(MOE)
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", config, Random(config), "switchyard")
    convert(tmp_path / "ours", tmp_path / "other", to="mixtral")
    assert read_config(tmp_path / "other")[1].moe.router == "softmax_topk"


def test_what_save_refuses(checkpoint, tmp_path):
    model, target = load(checkpoint("llama")), tmp_path / "saved"
    given = model.config, model.params, model.router_state
    with pytest.raises(ValueError, match="family = 'gpt2': expected one of llama"):
        save(target, *given, family="gpt2")
    with pytest.raises(ValueError, match="dtype = 'int8': expected none, or one of float32, bfloat16"):
        save(target, *given, dtype="int8")
    params = jax.tree.map(lambda leaf: leaf, model.params)
    del params["runs_0"]["attention"]["wq"]
    with pytest.raises(ValueError, match=r"params.*runs_0.*wq.*shape = None"):
        save(target, model.config, params, model.router_state)
    with pytest.raises(ValueError, match=r"final_norm.*shape = \(1,\): expected \(32,\)"):
        save(target, model.config, model.params | {"final_norm": {"scale": np.ones(1)}}, model.router_state)
    assert not target.exists()
    target.mkdir()
    with pytest.raises(ValueError, match="folder = .*expected a path that does not exist"):
        save(target, *given)


# --- all or nothing ---


def test_an_interrupt_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    folder, calls = checkpoint("mixtral"), []

    def interrupted(self, name, read=Tensors.read):
        calls.append(name)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(Tensors, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "deep" / "ours")
    assert len(calls) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_target_is_left_alone(checkpoint, tmp_path, kind):
    target = tmp_path / "there"
    target.write_text("mine") if kind == "file" else target.mkdir()
    with pytest.raises(ValueError, match="target = .*there.*: expected a path that does not exist"):
        convert(checkpoint("llama"), target)
    assert target.read_text() == "mine" if kind == "file" else not list(target.iterdir())


def test_a_model_from_no_family_needs_one_named(tmp_path):
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", LLAMA, Random(LLAMA), "switchyard")
    with pytest.raises(ValueError, match="to = None: expected one of llama"):
        convert(tmp_path / "ours", tmp_path / "other")
    convert(tmp_path / "ours", tmp_path / "other", to="llama")
    assert read_config(tmp_path / "other") == ("llama", LLAMA)


def tensors(change, **config):
    """A way to break a checkpoint: `change` edits its arrays, and fields of config.json are replaced."""

    def apply(folder):
        arrays = read_all(folder)
        change(arrays)
        write_all(folder, arrays, **config)

    return apply


def text(content):
    return lambda folder: (folder / "config.json").write_text(content)


def header(change):
    """Edits the header of the file, with the same length of data."""

    def apply(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        new = change(raw[8 : 8 + size].decode()).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + size :])

    return apply


def sharded(change):
    def apply(folder):
        arrays = read_all(folder)
        infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
        write_safetensors(folder, infos, arrays.values(), max_shard_bytes=20_000)
        change(sorted(folder.glob("*.safetensors"))[1])

    return apply


def same(arrays):
    del arrays


def cast(name, dtype):
    return lambda arrays: arrays.update({name: arrays[name].astype(dtype)})


GATE = "model.layers.0.mlp.gate_proj.weight"
KEY = "model.layers.1.self_attn.k_proj"
BAD = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json = .*: expected an existing file"),
    "no json": (text("{"), "is no JSON"),
    "a list": (text("[]"), r"config.json = \[\]: expected an object|config.json.*= \[\]: expected an object"),
    "no family": (text("{}"), "config.json model_type = None: expected one of llama, qwen2, .*switchyard"),
    "another family": (tensors(same, model_type="gpt2"), "config.json model_type = 'gpt2': expected one of llama"),
    "another head": (
        tensors(same, architectures=["LlamaForSequenceClassification"]), "architectures = .*LlamaForCausalLM",
    ),
    "a missing size": (tensors(same, hidden_size=None), "config.json hidden_size = None"),
    "an unknown dtype": (tensors(same, dtype="int4"), "config.json dtype = 'int4': expected one of float32"),
    "another activation": (tensors(same, hidden_act="gelu"), "config.json hidden_act = 'gelu'"),
    "another quantisation": (
        tensors(same, quantization_config={"quant_method": "gptq"}), "quantization_config.quant_method = 'gptq'",
    ),
    "no quantised tensor": (
        tensors(same, quantization_config={"quant_method": "fp8"}), "config.json quantization_config.*no tensor",
    ),
    "a missing tensor": (tensors(lambda a: a.pop(f"{KEY}.weight")), rf"tensors missing: {KEY}\.weight$"),
    "an unused tensor": (
        tensors(lambda a: a.update({"model.extra": np.ones(2, np.float32)})), "no place in the model: model.extra$",
    ),
    "biases the config denies": (
        tensors(lambda a: a.update({f"{KEY}.bias": np.ones(16, np.float32)})), rf"no place in the model: {KEY}\.bias$",
    ),
    "biases the config promises": (tensors(same, attention_bias=True), rf"tensors missing: .*{KEY}\.bias"),
    "fewer layers": (tensors(same, num_hidden_layers=1), r"no place in the model: model\.layers\.1\."),
    "a wrong shape": (
        tensors(lambda a: a.update({GATE: a[GATE][:-1]})), rf"shape than.*: {GATE} \[19, 32\] \(not \[20, 32\]\)",
    ),
    "other heads": (tensors(same, num_key_value_heads=4), rf"shape.*{KEY}\.weight \[16, 32\] \(not \[32, 32\]\)"),
    "a tensor of whole numbers": (tensors(cast(GATE, np.int8)), rf"of a dtype other than float32.*: {GATE} int8"),
    "gate and up in two dtypes": (tensors(cast(GATE, np.float16)), r"dtypes of what is layers\.0\.ffn\.gate_up = "),
    "a tied head that differs": (
        tensors(same, tie_word_embeddings=True), "tie_word_embeddings = True: expected false: lm_head.weight is not",
    ),
    "a dtype the format lacks": (
        header(lambda h: h.replace('"F32"', '"F31"', 1)), "dtype = 'F31': expected one of BOOL",
    ),
    "a truncated file": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        r"model\.safetensors = '\d+ bytes': expected \d+ bytes \(truncated\)",
    ),
    "a missing shard": (sharded(lambda path: path.unlink()), "missing shards = 'model-00002-of"),
    "a truncated shard": (sharded(lambda path: path.write_bytes(path.read_bytes()[:-1])), "00002-of.*truncated"),
    "pickles alone": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "unpickling can run code",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_checkpoint_is_named_and_nothing_is_written(checkpoint, tmp_path, name):
    breaks, message = BAD[name]
    folder = checkpoint("llama")
    breaks(folder)
    for call in (lambda: convert(folder, tmp_path / "ours"), lambda: load(folder)):
        with pytest.raises(ValueError, match=message):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


OURS = {
    "an unknown field": (lambda raw: raw["model"].update(depth=3), "config.json model = 'depth': expected no further"),
    "a missing field": (lambda raw: raw["model"].pop("sinks"), "config.json model = 'sinks': expected all fields"),
    "a wrong type": (lambda raw: raw["model"].update(hidden="32"), "model.hidden = '32': expected a value of type int"),
    "a number for a flag": (lambda raw: raw["model"].update(sinks=1), "model.sinks = 1: expected a value of type bool"),
    "a value out of range": (lambda raw: raw["model"].update(num_heads=3), "model.num_kv_heads = 2: expected"),
    "an unknown origin": (lambda raw: raw.update(origin={"model_type": "gpt2"}), "config.json model_type = 'gpt2'"),
    "another model": (lambda raw: raw["model"].update(hidden=16), "contradict each other.*embedding"),
}


@pytest.mark.parametrize("name", OURS)
def test_a_bad_config_of_ours_is_named(checkpoint, tmp_path, name):
    change, message = OURS[name]
    convert(checkpoint("llama"), tmp_path / "ours")
    raw = read_json(tmp_path / "ours")
    change(raw)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "ours")
