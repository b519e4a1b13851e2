"""GGUF files written by the package's own writer, read back against a block decoder spelled out here."""

import struct

import gguf
import numpy as np
import pytest

from moe.pretrained import gguf as ours
from moe.pretrained.gguf import GGUFError, gguf_config, half_split, open_gguf

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, VOCAB = 64, 4, 2, 96, 2, 40
HEAD = HIDDEN // HEADS
SHAPES = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)} | {
    f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in {
        "attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (KV_HEADS * HEAD, HIDDEN),
        "attn_v": (KV_HEADS * HEAD, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,),
        "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}.items()}
METADATA = {"block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": FFN,
            "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.freq_base": 1e5,
            "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": HEAD, "vocab_size": VOCAB}
Kind = gguf.GGMLQuantizationType


def write(path, architecture="llama", metadata=METADATA, shapes=SHAPES, kinds=None, values=None):
    """Writes a model; returns {GGUF name: (kind, stored bytes or float32)} as the file has them."""
    kinds, stored = kinds or {}, {}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}" if not key.startswith("tokenizer.") else key, value)
    rng = np.random.default_rng(0)
    for stem, shape in shapes.items():
        name = stem if stem.endswith((".weight", ".bias")) else f"{stem}.weight"
        array = (values or {}).get(name, rng.standard_normal(shape).astype(np.float32))
        kind = kinds.get(stem.rpartition(".")[2], Kind.F32)
        data = array if kind == Kind.F32 else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        stored[name] = (kind, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def decode(kind, data):
    """Rows of blocks to numbers, one number at a time. Both formats have blocks of 32."""
    if kind == Kind.F32:
        return data
    size = {Kind.Q4_1: 20, Kind.Q8_0: 34}[kind]
    rows = []
    for row in data:
        numbers = []
        for start in range(0, len(row), size):
            block = bytes(row[start : start + size])
            if kind == Kind.Q8_0:  # scale, 32 signed bytes
                (scale,) = struct.unpack("<e", block[:2])
                numbers += [np.float32(scale) * np.float32(q) for q in struct.unpack("<32b", block[2:])]
            else:  # scale, minimum, 16 low halves of a byte, then 16 high ones
                scale, low = (np.float32(value) for value in struct.unpack("<2e", block[:4]))
                quants = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
                numbers += [scale * np.float32(q) + low for q in quants]
        rows.append(numbers)
    return np.array(rows, np.float32)


def interleaved(rows, heads):
    """What the converter of such files does to query and key rows: i and i + D/2 become neighbours."""
    order = [h * HEAD + half * HEAD // 2 + i for h in range(heads) for i in range(HEAD // 2) for half in range(2)]
    return rows[order]


def test_blocks_are_decoded_and_rows_are_put_back(tmp_path):
    kinds = {"token_embd": Kind.Q8_0, "attn_q": Kind.Q4_1, "attn_k": Kind.Q4_1, "ffn_down": Kind.Q4_1}
    stored = write(tmp_path / "m.gguf", kinds=kinds)
    source = open_gguf(tmp_path / "m.gguf")
    assert len(source.tensors) == len(stored) == 2 + 9 * LAYERS
    assert source.notes == ("tensors read as float32: 6 stored as Q4_1, 1 stored as Q8_0",)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
             "model.layers.1.input_layernorm": "blk.1.attn_norm", "model.layers.1.mlp.gate_proj": "blk.1.ffn_gate",
             "model.layers.1.self_attn.v_proj": "blk.1.attn_v", "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
             "model.layers.0.mlp.up_proj": "blk.0.ffn_up", "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
             "model.layers.1.post_attention_layernorm": "blk.1.ffn_norm"}
    for name, raw in names.items():
        value = source.read(f"{name}.weight")
        np.testing.assert_array_equal(value, decode(*stored[f"{raw}.weight"]))
        assert (value.dtype, value.shape) == source.tensors[f"{name}.weight"]
        assert value.flags.c_contiguous
        assert value.flags.writeable
    for part, raw, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        value = source.read(f"model.layers.0.self_attn.{part}.weight")
        np.testing.assert_array_equal(interleaved(value, heads), decode(*stored[f"blk.0.{raw}.weight"]))


def test_what_is_read_is_fresh_memory(tmp_path):
    write(tmp_path / "m.gguf")
    source = open_gguf(tmp_path / "m.gguf")
    before = source.read("model.norm.weight")
    source.read("model.norm.weight")[:] = 0
    np.testing.assert_array_equal(source.read("model.norm.weight"), before)
    assert source.notes == ()


def test_half_split_makes_interleaved_rotation_half_split_rotation():
    """Scores of rotated queries and keys are the same in both conventions, and not without the reordering."""
    rng = np.random.default_rng(1)
    q, k, x = rng.standard_normal((HEAD, 8)), rng.standard_normal((HEAD, 8)), rng.standard_normal((5, 8))
    angles = np.arange(5)[:, None] * 10_000.0 ** (-np.arange(HEAD // 2) * 2 / HEAD)

    def rotated(rows, pairs):
        first, second = (x @ rows.T)[:, pairs[0]], (x @ rows.T)[:, pairs[1]]
        return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                               second * np.cos(angles) + first * np.sin(angles)], 1)

    neighbours = np.arange(0, HEAD, 2), np.arange(1, HEAD, 2)
    halves = np.arange(HEAD // 2), np.arange(HEAD // 2, HEAD)
    expected = rotated(q, neighbours) @ rotated(k, neighbours).T
    np.testing.assert_allclose(rotated(half_split(q, 1), halves) @ rotated(half_split(k, 1), halves).T, expected)
    assert np.abs(rotated(q, halves) @ rotated(k, halves).T - expected).max() > 0.1


def test_config_is_what_the_metadata_says(tmp_path):
    extra = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "rope.scaling.type": "linear",
             "rope.scaling.factor": 4.0}
    write(tmp_path / "m.gguf", metadata=METADATA | extra,
          shapes=SHAPES | {"output": (VOCAB, HIDDEN), "blk.0.attn_q.bias": (HIDDEN,)})
    config = gguf_config(tmp_path / "m.gguf")
    expected = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
                "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
                "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 100_000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "vocab_size": VOCAB,
                "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": False, "bos_token_id": 1,
                "eos_token_id": 2, "torch_dtype": "float32"}
    assert config == expected
    assert "lm_head.weight" in open_gguf(tmp_path / "m.gguf").tensors
    write(tmp_path / "n.gguf")
    plain = gguf_config(tmp_path / "n.gguf")
    assert (plain["tie_word_embeddings"], plain["rope_scaling"], plain["eos_token_id"]) == (True, None, [])


def test_biases_of_queries_are_put_back_like_their_rows(tmp_path):
    bias = np.arange(HIDDEN, dtype=np.float32)
    write(tmp_path / "m.gguf", shapes=SHAPES | {"blk.0.attn_q.bias": (HIDDEN,)},
          values={"blk.0.attn_q.bias": interleaved(bias, HEADS)})
    np.testing.assert_array_equal(open_gguf(tmp_path / "m.gguf").read("model.layers.0.self_attn.q_proj.bias"), bias)


def without(key):
    return {name: value for name, value in METADATA.items() if name != key}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"architecture": "gemma3"}, r"general.architecture = 'gemma3': expected llama"),
    ({"metadata": without("attention.head_count")}, r"llama.attention.head_count is missing: expected int"),
    ({"metadata": METADATA | {"context_length": "long"}}, r"llama.context_length = 'long': expected int"),
    ({"metadata": METADATA | {"attention.head_count": 0}}, r"llama.attention.head_count = 0: expected at least 1"),
    ({"metadata": METADATA | {"logit_scale": 2.0}}, r"not understood: llama.logit_scale"),
    ({"metadata": METADATA | {"expert_count": 8}}, r"llama.expert_count = 8: expected a dense model"),
    ({"metadata": METADATA | {"rope.dimension_count": 8}}, r"llama.rope.dimension_count = 8: expected 16"),
    ({"metadata": METADATA | {"rope.scaling.type": "yarn"}}, r"rope.scaling.type = 'yarn': expected none or linear"),
    ({"shapes": SHAPES | {"blk.0.attn_rot": (4,)}}, r"the tensor blk.0.attn_rot.weight is no part of a Llama of 2"),
    ({"shapes": SHAPES | {"blk.2.attn_norm": (4,)}}, r"the tensor blk.2.attn_norm.weight is no part"),
    ({"shapes": SHAPES | {"blk.0.attn_norm.bias": (4,)}}, r"the tensor blk.0.attn_norm.bias is no part"),
    ({"shapes": {"output_norm": (HIDDEN,)}}, r"the tensor token_embd.weight is missing"),
    ({"shapes": SHAPES | {"blk.1.attn_k": (HIDDEN, HIDDEN)}}, r"blk.1.attn_k.weight has 64 rows: expected 2 heads"),
])
def test_what_is_not_supported_is_named(tmp_path, arguments, message):
    write(tmp_path / "m.gguf", **arguments)
    with pytest.raises(ValueError, match=message):
        open_gguf(tmp_path / "m.gguf")


def test_a_format_without_a_decoder_is_refused_before_anything_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in METADATA.items():
        if isinstance(value, float):
            writer.add_float32(f"llama.{key}", value)
        else:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(HIDDEN, np.int8), raw_dtype=Kind.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=r"output_norm.weight is stored as I8: expected a floating-point format"):
        open_gguf(tmp_path / "m.gguf")


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    write(path)
    whole = path.read_bytes()
    for size in (*range(0, 1200, 37), len(whole) // 2, len(whole) - 33):
        path.write_bytes(whole[:size])
        with pytest.raises(GGUFError, match=rf"m.gguf: {size:,} bytes, not a whole GGUF file"):
            open_gguf(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(GGUFError, match="not a whole GGUF file"):
        open_gguf(path)
    with pytest.raises(ValueError, match=r"gguf = '.*none.gguf': expected an existing file"):
        open_gguf(tmp_path / "none.gguf")


def test_lengths_beyond_the_end_of_the_file_are_refused(tmp_path):
    """The package alone would go on reading nothing, until there is no memory left."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    at = whole.index(b"token_type") + len(b"token_type") + 8  # past the types: of the value, of its items
    assert struct.unpack_from("<Q", whole, at) == (3,)
    path.write_bytes(whole[:at] + struct.pack("<Q", 1_000_000) + whole[at + 8 :])
    with pytest.raises(GGUFError, match=r"not a whole GGUF file .*would have to go on to byte"):
        open_gguf(path)


def test_a_file_that_changed_is_read_anew(tmp_path):
    write(tmp_path / "m.gguf")
    assert gguf_config(tmp_path / "m.gguf")["max_position_embeddings"] == 128
    write(tmp_path / "m.gguf", metadata=METADATA | {"context_length": 64, "tokenizer.ggml.pre": "smollm"})
    assert gguf_config(tmp_path / "m.gguf")["max_position_embeddings"] == 64


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf")
    ours._parse.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"needs the package `gguf`: pip install -e '.\[hf\]'"):
        open_gguf(tmp_path / "m.gguf")
