"""`--model smollm2`: a small file in its place is the model of its Hugging Face form; anchors of the real one."""

import json
from dataclasses import replace

import gguf
import jax
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from moe.generate import generate
from moe.pretrained.gguf import LAYER_NAMES, NAMES, half_split
from moe.pretrained.model import load
from moe.pretrained.safetensors import TensorInfo, write_safetensors
from moe.pretrained.smollm2 import FETCH_COMMAND, FILE, open_smollm2, smollm2_path, smollm2_tokenizer
from moe.transformer import Transformer
from parallel.mesh import make_mesh

Kind = gguf.GGMLQuantizationType
HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 32, 4, 2, 64, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
SHAPES = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,)} | {
    f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in {
        "attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN),
        "attn_v": (HIDDEN // 2, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}.items()}
CAPITALS = ("The capital of France is Paris. The capital of Germany is Berlin. The capital of Japan is Tokyo. "
            "The capital of Italy is Rome.")


def write(path, architecture="llama", norm=Kind.F32, tokenizer=True):
    """A small model with a tokenizer; returns {GGUF name: float32}."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN,
                       "feed_forward_length": FFN, "attention.head_count": HEADS,
                       "attention.head_count_kv": KV_HEADS, "vocab_size": len(TOKENS)}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e5)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    if tokenizer:
        writer.add_string("tokenizer.ggml.model", "gpt2")
        writer.add_string("tokenizer.ggml.pre", "smollm")
        writer.add_array("tokenizer.ggml.tokens", TOKENS)
        writer.add_array("tokenizer.ggml.merges", ["a b"])
        writer.add_array("tokenizer.ggml.token_type", [3] * 3 + [1] * (len(TOKENS) - 3))
    rng, values = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        values[name] = rng.standard_normal(shape).astype(np.float32)
        other = norm != Kind.F32 and name == "output_norm"
        data = values[name].astype(np.int8) if other else values[name]
        writer.add_tensor(f"{name}.weight", data, raw_dtype=norm if other else Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Where the package's file would lie."""
    monkeypatch.setenv("SWITCHYARD_DATA", str(tmp_path))
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / FILE


def hugging_face(folder, values):
    """The same model as a folder of a Llama, its rows in that order."""
    arrays = {}
    for name, value in values.items():
        stem, _, part = name.rpartition(".")
        if part in ("attn_q", "attn_k"):
            value = half_split(value, HEADS if part == "attn_q" else KV_HEADS)
        layer = stem.removeprefix("blk.")
        arrays[f"{NAMES[part]}.weight" if not stem else f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"] = value
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(folder, infos, arrays.values())
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": len(TOKENS), "rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "hidden_act": "silu"}))
    return folder


@pytest.mark.parametrize("mesh", [None, (2, 4, 1), (1, 2, 4)])
def test_the_model_is_the_one_that_its_hugging_face_form_is(tmp_path, small, mesh):
    folder = hugging_face(tmp_path / "hf", write(small))
    mesh = mesh and make_mesh(*mesh)
    ours, theirs = load("smollm2", mesh=mesh), load(folder)
    assert (ours.family, ours.config) == ("llama", theirs.config)
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    for mine, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
    assert smollm2_tokenizer().encode("ab c") == [TOKENS.index(token) for token in ("ab", "Ġ", "c")]


def truncate(path):
    write(path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("act", "make", "message"), [
    (open_smollm2, lambda path: None, r"the model smollm2 is missing \(looked for .*\): run `{}` first"),
    (smollm2_tokenizer, lambda path: None, r"the model smollm2 is missing \(looked for .*\): run `{}` first"),
    (open_smollm2, truncate, r"not a whole GGUF file.*; `{}` lays the file down anew"),
    (smollm2_tokenizer, truncate, r"not a whole GGUF file.*; `{}` lays the file down anew"),
    (open_smollm2, lambda path: write(path, "gemma3"), r"general.architecture = 'gemma3': expected llama; `{}` lays"),
    (open_smollm2, lambda path: write(path, norm=Kind.I8), r"output_norm.weight is stored as I8: .*; `{}` lays"),
    (smollm2_tokenizer, lambda path: write(path, tokenizer=False), r"tokenizer.ggml.model is missing: .*; `{}` lays"),
])
def test_another_file_than_the_pinned_one_is_named_with_the_command(small, act, make, message):
    make(small)
    with pytest.raises(ValueError, match=message.format(FETCH_COMMAND)):
        act()


# --- the model itself: nothing is downloaded here ---


@pytest.fixture(scope="module")
def model():
    try:
        smollm2_path()
    except ValueError as error:
        pytest.skip(str(error))
    return load("smollm2")


def mean_nll(model, ids):
    """nats per token [S] after the first."""
    tokens = np.array([ids], np.int32)
    positions = np.arange(len(ids), dtype=np.int32)[None]
    out = Transformer(model.config).apply(
        {"params": model.params}, tokens, np.ones_like(tokens), positions, model.router_state, None)
    logits = np.asarray(out.hidden[0, :-1] @ out.head.T, np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))
    return -chosen.mean()


def with_raw_rows(model):
    """The model as it is when the file's interleaved rows are taken for half-split ones."""
    attention = model.params["runs_0"]["attention"]
    raw = {name: attention[name].reshape(*attention[name].shape[:-1], 2, -1).swapaxes(-1, -2).reshape(
        attention[name].shape) for name in ("wq", "wk")}  # [L, d, H, D]
    layers = model.params["runs_0"] | {"attention": attention | raw}
    return replace(model, params=model.params | {"runs_0": layers})


@pytest.mark.slow
def test_text_has_the_likelihood_that_the_released_model_gives_it(model):
    ids = smollm2_tokenizer().encode(CAPITALS)
    assert len(ids) == 28
    assert mean_nll(model, ids) == pytest.approx(1.279, abs=0.005)
    assert mean_nll(with_raw_rows(model), ids) == pytest.approx(2.56, abs=0.01)


@pytest.mark.slow
def test_a_question_gets_the_answer_that_the_released_model_gives(model):
    words = smollm2_tokenizer()
    ids = words.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    made = [int(token[0]) for token in generate(model, [ids], max_new_tokens=16, stop=words.eos)]
    assert words.decode(made) == "The capital of France is Paris."
    assert made[-1] == 2  # <|im_end|>
    assert model.config.num_layers == 30
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 134_515_008
