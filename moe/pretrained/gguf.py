"""GGUF files as a source of tensors: dequantised one by one, under Hugging Face's names, rotary rows in its order.

The `gguf` package parses the file and knows the block formats. Only the `llama` architecture is read. Its converter
stores the rows of the query and key projections so that the two coordinates of a rotated pair are neighbours
(interleaved RoPE); Hugging Face's Llama, and `moe.rope`, want the first coordinates of all pairs and then the second
ones (half-split RoPE). Rows are put back into that order here: half-split rotation of the raw rows would run, and be
wrong.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe.config import require
from moe.pretrained.safetensors import TensorInfo

EXTRA = "pip install -e '.[hf]'"
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Every key of the architecture that is understood, or that changes nothing; any other may change the function.
ARCHITECTURE_KEYS = frozenset((
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon",
    "attention.value_length", "block_count", "context_length", "embedding_length", "expert_count", "expert_used_count",
    "feed_forward_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.factor",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.type", "vocab_size",
))  # fmt: skip
END_MARKS = ("<|endoftext|>", "<|im_end|>")  # a model stops at these even if the file names another end


class GGUFError(ValueError):
    """A file that is no whole GGUF file, or holds what is not supported; names the file and what was expected."""


@dataclass(frozen=True)
class GGUFFile:
    """What the package parsed: metadata by key, and the tensors in file order (`gguf.gguf_reader.ReaderTensor`)."""

    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: tuple[Any, ...] = field(repr=False)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key; `default`, unless it is None, stands for a missing one.

        Raises:
          GGUFError: the key is missing or its value of another type; names both.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise GGUFError(f"{self.path}: the metadata {key} is missing: expected {kind.__name__}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise GGUFError(f"{self.path}: the metadata {key} = {value!r:.80}: expected {kind.__name__}")
        return value


def read_gguf(path: Path) -> GGUFFile:
    """Parses a file (a second or three for a vocabulary of 49,152); the last one is remembered until it changes.

    Raises:
      GGUFError: no GGUF file, a truncated one, or one in the other byte order.
    """
    require(path.is_file(), "gguf", str(path), "an existing file")
    status = path.stat()
    return _parse(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1)
def _parse(path: Path, mtime_ns: int, size: int) -> GGUFFile:
    del mtime_ns  # part of the cache's key
    gguf = _package()

    class Reader(gguf.GGUFReader):
        """One that stops at the end of the file; the package's reads nothing there, as often as a length says."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> np.ndarray:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > size:
                raise ValueError(f"it would have to go on to byte {end:,}")
            return super()._get(offset, dtype, count, *args, **kwargs)

    try:
        reader = Reader(path)
        metadata = {name: part.contents() for name, part in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise GGUFError(f"{path}: {size:,} bytes, not a whole GGUF file of version 2 or 3 ({error})") from error
    if reader.byte_order != "I":
        raise GGUFError(f"{path}: written in the other byte order: expected this machine's")
    return GGUFFile(path, metadata, tuple(reader.tensors))


def gguf_config(path: Path) -> dict[str, Any]:
    """The `config.json` that Hugging Face's Llama would have for this file.

    Raises:
      GGUFError: another architecture, missing metadata, or metadata that is not understood.
    """
    file = read_gguf(path)
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise GGUFError(f"{path}: general.architecture = {architecture!r}: expected llama")
    unknown = {key for key in file.metadata if key.startswith("llama.")} - {f"llama.{key}" for key in ARCHITECTURE_KEYS}
    if unknown:
        raise GGUFError(f"{path}: metadata that is not understood: {', '.join(sorted(unknown))}")
    if experts := file.get("llama.expert_count", int, 0):
        raise GGUFError(f"{path}: llama.expert_count = {experts}: expected a dense model")
    names = {tensor.name for tensor in file.tensors}
    if "token_embd.weight" not in names:
        raise GGUFError(f"{path}: the tensor token_embd.weight is missing")
    heads, hidden = file.get("llama.attention.head_count", int), file.get("llama.embedding_length", int)
    require(heads > 0, f"{path}: llama.attention.head_count", heads, "at least 1")
    ends = end_tokens(file)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": file.get("llama.feed_forward_length", int),
        "num_hidden_layers": file.get("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("llama.attention.head_count_kv", int, heads),
        "head_dim": _head_dim(file, hidden, heads),
        "max_position_embeddings": file.get("llama.context_length", int),
        "rms_norm_eps": _shortest(file.get("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(file.get("llama.rope.freq_base", float, 10_000.0)),
        "rope_scaling": _rope_scaling(file),
        "vocab_size": file.get("llama.vocab_size", int, _vocab_size(file)),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(ends) if len(ends) != 1 else ends[0],
        "torch_dtype": "float32",
    }


def end_tokens(file: GGUFFile) -> tuple[int, ...]:
    """Token ids at which the model stops: the file's end of sequence and of turn, and the usual marks."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = [file.metadata[key] for key in keys if key in file.metadata]
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    return tuple(dict.fromkeys([*ids, *(tokens.index(mark) for mark in END_MARKS if mark in tokens)]))


def open_gguf(path: Path) -> GGUFSource:
    """The file's tensors as float32 under Hugging Face's names.

    Raises:
      GGUFError: as `gguf_config`; a tensor with an unknown name or block format, or whose shape contradicts the heads.
    """
    return GGUFSource(read_gguf(path), gguf_config(path))


class GGUFSource:
    """A `moe.pretrained.safetensors.Source` over a GGUF file.

    Attributes:
      config: `gguf_config` of the file.
      tensors: name -> float32 and its shape, (out, in) for matrices.
      notes: which tensors were stored in blocks.
    """

    def __init__(self, file: GGUFFile, config: dict[str, Any]):
        self.file, self.config = file, config
        self._stored = {_translate(file.path, tensor.name, config): tensor for tensor in file.tensors}
        self.tensors = {name: TensorInfo(np.dtype(np.float32), _shape(t)) for name, t in self._stored.items()}
        self._heads = {}  # name -> heads whose rows are interleaved
        for name, info in self.tensors.items():
            for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
                if f"self_attn.{part}." in name:
                    self._check_heads(name, info.shape[0], config[key], config["head_dim"])
        kinds = Counter(tensor.tensor_type for tensor in file.tensors)
        for kind in kinds:
            _check_format(file, kind)
        blocks = {kind.name: count for kind, count in kinds.items() if kind.name != "F32"}
        counts = ", ".join(f"{count} stored as {name}" for name, count in sorted(blocks.items()))
        self.notes: tuple[str, ...] = (f"tensors read as float32: {counts}",) if blocks else ()

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, in fresh memory. Raises KeyError for a name that is not in `tensors`."""
        stored = self._stored[name]
        values = _package().quants.dequantize(np.asarray(stored.data), stored.tensor_type)
        values = values.reshape(self.tensors[name].shape)
        if name in self._heads:
            values = half_split(values, self._heads[name])
        if np.may_share_memory(values, stored.data):  # the file's own float32, mapped
            return np.array(values)
        return np.ascontiguousarray(values)

    def _check_heads(self, name: str, rows: int, heads: int, head_dim: int) -> None:
        if rows != heads * head_dim:
            raise GGUFError(f"{self.file.path}: {self._stored[name].name} has {rows} rows: expected {heads} heads of "
                            f"{head_dim}")
        self._heads[name] = heads


def half_split(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * D, ...] from interleaved pairs to first halves, then second ones, in each head."""
    paired = values.reshape(heads, -1, 2, *values.shape[1:])  # [heads, D/2, 2, ...]
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)


def _translate(path: Path, name: str, config: Mapping[str, Any]) -> str:
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and stem in NAMES:
        return f"{NAMES[stem]}.weight"
    match = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)", stem)
    known = match and int(match[1]) < config["num_hidden_layers"] and match[2] in LAYER_NAMES
    if match and known and (kind == "weight" or (kind == "bias" and "norm" not in match[2])):
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{kind}"
    raise GGUFError(f"{path}: the tensor {name} is no part of a Llama of {config['num_hidden_layers']} layers")


def _shape(tensor: Any) -> tuple[int, ...]:
    """GGUF lists the fastest dimension first."""
    return tuple(int(size) for size in reversed(tensor.shape.tolist()))


def _check_format(file: GGUFFile, kind: Any) -> None:
    """Tries one block of zeros, so that a format without a decoder is refused before anything is read."""
    gguf = _package()
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        names = [tensor.name for tensor in file.tensors if tensor.tensor_type == kind]
        raise GGUFError(f"{file.path}: {names[0]} is stored as {kind.name}: expected a floating-point format that the "
                        "gguf package decodes") from error


def _vocab_size(file: GGUFFile) -> int:
    return next(_shape(tensor)[0] for tensor in file.tensors if tensor.name == "token_embd.weight")


def _head_dim(file: GGUFFile, hidden: int, heads: int) -> int:
    head_dim = file.get("llama.attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = file.get(f"llama.{key}", int, head_dim)
        if found != head_dim:
            raise GGUFError(f"{file.path}: llama.{key} = {found}: expected {head_dim}, the size of a head")
    return head_dim


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    kind = file.get("llama.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise GGUFError(f"{file.path}: llama.rope.scaling.type = {kind!r}: expected none or linear")
    return {"rope_type": "linear", "factor": _shortest(file.get("llama.rope.scaling.factor", float))}


def _shortest(value: float) -> float:
    """The decimal number that was meant: the file has float32, where 1e-5 is 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _package() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ValueError(f"reading GGUF files needs the package `gguf`: {EXTRA}") from error
    return gguf
