"""What a model is made of: frozen, hashable, checked where values meet.

Hashable on purpose: a config is a static argument of `jax.jit` and names a compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Remat = Literal["none", "dots", "full"]
ComputeDtype = Literal["float32", "bfloat16"]
LayerKind = Literal["dense", "moe"]
BalanceScope = Literal[
    "none", "sequence", "microbatch", "device", "shuffle_micro", "global_prefix", "global_exact", "ema"
]
Activation = Literal["swiglu", "swiglu_oai", "relu", "gelu"]
QKNorm = Literal["none", "head", "width"]
AttentionBias = Literal["none", "qkv", "all"]
RopeKind = Literal["linear", "dynamic", "yarn", "llama3"]


def require(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises the one kind of error bad input gets: it names the field, the value and what was expected."""
    if not ok:
        raise ValueError(f"{field} = {value!r}: expected {expected}")


@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts feed-forward layer. Published families are in `moe.presets`.

    Attributes:
      num_experts: E, routed experts.
      top_k: k, experts per token.
      expert_dim: hidden width of one routed expert.
      shared_dim: width of the always-on SwiGLU beside them, 0 for none (n shared experts are one of n times the width).
      shared_gate: the shared expert is scaled by sigmoid(x w), w learned (Qwen2-MoE).
      activation: of the routed experts; see `kernels.grouped_ffn`.
      expert_bias: routed experts have biases (gpt-oss).
      router: a name in `moe.routers` or an import path `package.module:factory`, with options as in a call,
        `softmax_topk(renormalize=False)`; the factory is called as `factory(num_experts=E, top_k=k, **options)` and
        returns a `moe.routing.Router`.
      policy: `dropless`, or a token policy of `moe.policies` in the same form, `capacity(factor=1.25)`.
      allow_noncausal: permit a router or policy whose choice for a token depends on later tokens.
      dispatcher: `blocks` (CPU default), `einsum` (the oracle), `ragged` (grouped GEMM on GPU), `triton`
        (fused kernels on GPU, `blocks` on CPU), or `auto`.
      block_size: rows of one block of the `blocks` dispatcher; 0 lets each expert choose among several sizes.
    """

    num_experts: int = 16
    top_k: int = 2
    expert_dim: int = 128
    shared_dim: int = 0
    shared_gate: bool = False
    activation: Activation = "swiglu"
    expert_bias: bool = False
    router: str = "softmax_topk"
    policy: str = "dropless"
    allow_noncausal: bool = False
    dispatcher: Literal["auto", "blocks", "einsum", "ragged", "triton"] = "auto"
    block_size: int = 0

    def __post_init__(self) -> None:
        require(self.num_experts >= 1, "moe.num_experts", self.num_experts, "at least 1")
        require(
            1 <= self.top_k <= self.num_experts,
            "moe.top_k",
            self.top_k,
            f"1 <= top_k <= num_experts = {self.num_experts}",
        )
        require(self.expert_dim >= 1, "moe.expert_dim", self.expert_dim, "at least 1")
        require(self.shared_dim >= 0, "moe.shared_dim", self.shared_dim, "0 (none) or a positive width")
        require(
            self.shared_dim > 0 or not self.shared_gate, "moe.shared_gate", True, "a shared expert (moe.shared_dim > 0)"
        )
        require(
            self.activation in get_args(Activation),
            "moe.activation",
            self.activation,
            f"one of {', '.join(get_args(Activation))}",
        )
        require(self.block_size >= 0, "moe.block_size", self.block_size, "0 (automatic) or a positive row count")


@dataclass(frozen=True)
class RopeScaling:
    """How a model trained on a short context stretches its rotary angles to a longer one; see `moe.rope`.

    Attributes:
      kind: `linear` divides positions by the factor; `dynamic` raises the base with the length; `yarn` (2309.00071) and
        `llama3` treat slow and fast dimensions apart.
      factor: the stretch, s.
      original_context: the context before it; all kinds but `linear` need it.
      beta_fast, beta_slow, truncate: yarn: rotations over the original context that bound the ramp between both
        treatments; whether its ends are rounded to whole dimensions.
      attention_factor: yarn: multiplies cos and sin; 0 derives it from factor, mscale and mscale_all_dim.
      mscale, mscale_all_dim: yarn as in DeepSeek; 0 is absent.
      low_freq_factor, high_freq_factor: llama3: wavelengths over original_context / these bound the ramp.
    """

    kind: RopeKind = "linear"
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        known = get_args(RopeKind)
        require(self.kind in known, "model.rope_scaling.kind", self.kind, f"one of {', '.join(known)}")
        require(self.factor >= 1.0, "model.rope_scaling.factor", self.factor, "at least 1")
        require(
            self.kind == "linear" or self.original_context >= 1,
            "model.rope_scaling.original_context",
            self.original_context,
            f"the context before the stretch, for {self.kind}",
        )


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2 2405.04434, section 2.1): keys and values come from one low-rank vector
    per token, beside one rotated key that all heads share.

    Attributes:
      q_rank: rank of the queries' latent vector; 0 projects queries directly.
      kv_rank: rank of the latent vector of keys and values, which is what a cache holds.
      nope_dim, rope_dim: parts of a query or key head without and with rotation; head_dim is their sum.
      value_dim: width of a value head.
    """

    q_rank: int = 0
    kv_rank: int = 64
    nope_dim: int = 32
    rope_dim: int = 16
    value_dim: int = 32

    def __post_init__(self) -> None:
        require(self.q_rank >= 0, "model.latent.q_rank", self.q_rank, "0 (none) or a positive rank")
        for name in ("kv_rank", "nope_dim", "value_dim"):
            require(getattr(self, name) >= 1, f"model.latent.{name}", getattr(self, name), "at least 1")
        even = self.rope_dim >= 2 and self.rope_dim % 2 == 0
        require(even, "model.latent.rope_dim", self.rope_dim, "an even number (RoPE rotates pairs)")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU, dense or MoE per layer.

    Attributes:
      vocab_size: V, rows of the embedding.
      hidden: d, residual width.
      num_layers, num_heads, num_kv_heads, head_dim: L, H, G, D; H must be a multiple of G; D even (RoPE).
      ffn_dim: width of the SwiGLU of dense layers.
      moe: the MoE layers' shape, or None for a dense model.
      first_dense: this many leading layers stay dense (DeepSeek-V3 has 3).
      moe_every: after those, every `moe_every`-th layer is MoE, the others dense.
      dense_layers: further layers that stay dense (Qwen's mlp_only_layers).
      qk_norm: RMSNorm over each query and key head (Qwen3), or over the whole width of all heads (OLMoE).
      attention_bias: biases of the query, key and value projections (Qwen2), or of the output's too (gpt-oss).
      ffn_bias: biases of dense layers' feed-forward (Llama's mlp_bias).
      clip_qkv: queries, keys and values are clipped to +-clip_qkv (OLMoE); 0 clips nothing.
      windows: for each layer how many positions a query sees, its own included; 0 sees all. Empty: all layers see all.
      sinks: a learned logit per head joins the softmax and takes its share from the keys (gpt-oss).
      latent: multi-head latent attention instead of grouped-query attention (DeepSeek); num_kv_heads, head_dim follow.
      tie_embeddings: the output head is the embedding's transpose.
      rope_theta, rope_scaling, norm_eps: RoPE base, its stretch to long contexts; RMSNorm epsilon.
      context: most positions the model is made for; 0 is unknown.
      init_std: standard deviation of the embedding and of weights before 1/sqrt(2L) residual scaling.
      remat: `none` keeps activations, `dots` keeps products without batch dimensions, `full` keeps only layer inputs.
      compute_dtype: parameters stay float32; router, softmax, norm statistics and loss always run in float32.
      unroll: layers unrolled per step of the scan over layers; 0 unrolls all of them.
    """

    vocab_size: int = 256
    hidden: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    ffn_dim: int = 512
    moe: MoEConfig | None = MoEConfig()
    first_dense: int = 0
    moe_every: int = 1
    dense_layers: tuple[int, ...] = ()
    qk_norm: QKNorm = "none"
    attention_bias: AttentionBias = "none"
    ffn_bias: bool = False
    clip_qkv: float = 0.0
    windows: tuple[int, ...] = ()
    sinks: bool = False
    latent: LatentConfig | None = None
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    context: int = 0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    remat: Remat = "none"
    compute_dtype: ComputeDtype = "float32"
    unroll: int = 1

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_dim",
            "moe_every",
        ):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "an even number (RoPE rotates pairs)")
        require(
            0 <= self.first_dense <= self.num_layers,
            "model.first_dense",
            self.first_dense,
            f"0 to num_layers = {self.num_layers}",
        )
        for name, kinds in (("qk_norm", QKNorm), ("attention_bias", AttentionBias)):
            value = getattr(self, name)
            require(value in get_args(kinds), f"model.{name}", value, f"one of {', '.join(get_args(kinds))}")
        inside = all(0 <= i < self.num_layers for i in self.dense_layers)
        require(inside, "model.dense_layers", self.dense_layers, f"layers 0 to {self.num_layers - 1}")
        require(self.clip_qkv >= 0, "model.clip_qkv", self.clip_qkv, "0 (none) or a positive bound")
        require(self.context >= 0, "model.context", self.context, "0 (unknown) or a number of positions")
        fits = len(self.windows) in (0, self.num_layers) and all(window >= 0 for window in self.windows)
        require(fits, "model.windows", self.windows, f"none, or one (0 or more) for each of {self.num_layers} layers")
        if self.latent is not None:
            heads, dim = self.num_heads, self.latent.nope_dim + self.latent.rope_dim
            require(self.num_kv_heads == heads, "model.num_kv_heads", self.num_kv_heads, f"{heads}, all heads (latent)")
            require(self.head_dim == dim, "model.head_dim", self.head_dim, f"nope_dim + rope_dim = {dim} (latent)")
            plain = self.qk_norm == "none" and self.attention_bias != "qkv" and not self.clip_qkv and not self.sinks
            require(plain, "model.latent", self.latent, "no qk_norm, qkv bias, clip_qkv or sinks beside it")
        require(self.unroll >= 0, "model.unroll", self.unroll, "0 (all) or a positive layer count")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """`dense` or `moe` for each layer, bottom to top."""
        if self.moe is None:
            return ("dense",) * self.num_layers
        kinds: list[LayerKind] = ["dense"] * self.num_layers
        for i in range(self.first_dense + self.moe_every - 1, self.num_layers, self.moe_every):
            kinds[i] = "dense" if i in self.dense_layers else "moe"
        return tuple(kinds)

    @property
    def num_moe_layers(self) -> int:
        return self.layer_kinds.count("moe")
