"""The shape of the timed train step and the arithmetic it cannot avoid.

Legend: T = batch * seq tokens, E experts, k of them active.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from json import dumps, loads

from experiments.config import BalanceConfig, DataConfig, RunConfig
from moe.config import ModelConfig, MoEConfig, require


@dataclass(frozen=True)
class StepShape:
    """A decoder whose every layer is MoE, in float32; the defaults are the shape all published figures use."""

    hidden: int = 256
    layers: int = 4
    heads: int = 4
    head_dim: int = 64
    experts: int = 16
    top_k: int = 2
    expert_dim: int = 256
    vocab: int = 1024
    batch: int = 16
    seq: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            require(isinstance(value, int) and value >= 1, f"shape.{name}", value, "an integer of at least 1")
        require(self.top_k <= self.experts, "shape.top_k", self.top_k, f"at most experts = {self.experts}")

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def active_parameters(self) -> int:
        """Weights that multiply every token: attention, router, top-k experts, head; not the embedding lookup."""
        attention = 4 * self.hidden * self.heads * self.head_dim
        experts = self.top_k * 3 * self.hidden * self.expert_dim
        return self.layers * (attention + self.hidden * self.experts + experts) + self.hidden * self.vocab

    @property
    def flops(self) -> int:
        """6 x active parameters x tokens: one forward and backward pass without attention products."""
        return 6 * self.active_parameters * self.tokens

    def part_flops(self) -> dict[str, int]:
        """Multiply-adds of each part, forward and backward (twice the forward), times two.

        The attention products count only the S(S+1)/2 pairs a causal mask keeps, and no recomputation.
        """
        per_weight = 6 * self.tokens
        width = self.heads * self.head_dim
        pairs = self.batch * self.heads * self.seq * (self.seq + 1) // 2
        return {
            "embedding + norms": 0,
            "attention projections": per_weight * self.layers * 4 * self.hidden * width,
            "attention products": 6 * self.layers * 2 * pairs * self.head_dim,
            "router + dispatch": per_weight * self.layers * self.hidden * self.experts,
            "experts": per_weight * self.layers * self.top_k * 3 * self.hidden * self.expert_dim,
            "head + cross-entropy": per_weight * self.hidden * self.vocab,
            "optimiser update": 0,
        }

    def matmul_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(rows, inner, columns) of the step's own forward products; an expert meets T k / E rows when balanced."""
        rows = max(1, self.tokens * self.top_k // self.experts)
        return {
            "projection": (self.tokens, self.hidden, self.heads * self.head_dim),
            "head": (self.tokens, self.hidden, self.vocab),
            "expert up": (rows, self.hidden, 2 * self.expert_dim),
            "expert down": (rows, self.expert_dim, self.hidden),
        }

    def run_config(self) -> RunConfig:
        """The run whose train step is timed: OLMoE's features (QK-norm, weights not renormalised, untied head).

        Its layers are unrolled, as the peer's are: rolled, slices of the stacked residuals cost some 7 % on CPU.
        """
        moe = MoEConfig(self.experts, self.top_k, self.expert_dim, router="softmax_topk(renormalize=False)")
        model = ModelConfig(
            vocab_size=self.vocab, hidden=self.hidden, num_layers=self.layers, num_heads=self.heads,
            num_kv_heads=self.heads, head_dim=self.head_dim, moe=moe, qk_norm="head", unroll=0,
        )  # fmt: skip
        return RunConfig(
            model=model, data=DataConfig(corpus="synthetic", seq_len=self.seq), batch_size=self.batch,
            balance=BalanceConfig(scope="global_exact"), steps=1_000,
        )  # fmt: skip

    def to_json(self) -> str:
        return dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StepShape:
        return cls(**loads(text))
