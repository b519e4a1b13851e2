"""Parts that several families' name maps share. Their names are those of released checkpoints (transformers 4.x)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe.config import ModelConfig
from moe.pretrained.layouts import Entry, Flat, GateUp, Linear, Same, entry, in_layers


@dataclass(frozen=True)
class Family:
    """One family of released models.

    Attributes:
      name: `model_type` of config.json.
      architecture: of config.json, the class with the language model's head.
      read: config.json to our config; ValueError naming a field that is wrong or not built.
      write: our config to the fields of config.json that say the same, as far as they can.
      entries: the name map, from config.json.
      neutral: names of tensors that a checkpoint may hold and that change nothing, from config.json: a list of
        (regular expression, why it is left out).
    """

    name: str
    architecture: str
    read: Callable[[Mapping[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    entries: Callable[[Mapping[str, Any]], tuple[Entry, ...]]
    neutral: Callable[[Mapping[str, Any]], tuple[tuple[str, str], ...]] = lambda _: ()


ENDS = (
    entry("embedding", "model.embed_tokens.weight", Same()),
    entry("final_norm.scale", "model.norm.weight", Same()),
    entry("head", "lm_head.weight", Same()),
)
NORMS = in_layers([
    entry("attention_norm.scale", "input_layernorm.weight", Same()),
    entry("ffn_norm.scale", "post_attention_layernorm.weight", Same()),
])  # fmt: skip
ATTENTION = in_layers([
    entry("attention.wq", "self_attn.q_proj.weight", Linear()),
    entry("attention.wk", "self_attn.k_proj.weight", Linear()),
    entry("attention.wv", "self_attn.v_proj.weight", Linear()),
    entry("attention.wo", "self_attn.o_proj.weight", Linear(inputs=2)),
])  # fmt: skip
QKV_BIAS = in_layers([
    entry("attention.bq", "self_attn.q_proj.bias", Flat()),
    entry("attention.bk", "self_attn.k_proj.bias", Flat()),
    entry("attention.bv", "self_attn.v_proj.bias", Flat()),
])  # fmt: skip
OUT_BIAS = in_layers([entry("attention.bo", "self_attn.o_proj.bias", Same())])
QK_NORM = in_layers([
    entry("attention.q_norm.scale", "self_attn.q_norm.weight", Same()),
    entry("attention.k_norm.scale", "self_attn.k_norm.weight", Same()),
])  # fmt: skip
FFN = in_layers([
    entry("ffn.gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
    entry("ffn.down", "mlp.down_proj.weight", Linear()),
])  # fmt: skip
MOE = in_layers([
    entry("moe.router", "mlp.gate.weight", Linear()),
    entry(
        "moe.experts.gate_up", ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"), GateUp()
    ),
    entry("moe.experts.down", "mlp.experts.{e}.down_proj.weight", Linear()),
])  # fmt: skip
