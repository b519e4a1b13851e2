"""What adapters look like: which linear maps they stand beside, their rank, and the router where they are experts.

    y = x W + s x A B,   s = alpha / r            (LoRA, Hu et al. 2106.09685)
                         s = alpha / sqrt(r)      (rsLoRA, Kalajdzievski 2312.03732)
    y = m / |W + s A B| (x W + s x A B)           (DoRA, Liu et al. 2402.09353; norms of the columns, no gradient)

W [in, out], A [in, r], B [r, out], m [out]. Published mixtures are in `moe.lora.presets`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moe.config import MoEConfig, require

Routing = Literal["ffn", "linear", "input"]
Initialiser = Literal["kaiming", "normal"]
FEED_FORWARD = ("gate", "up", "down")
TARGETS = ("q", "k", "v", "o", *FEED_FORWARD)


@dataclass(frozen=True)
class ExpertsConfig:
    """Adapters as experts.

    Attributes:
      num_experts, top_k: E, k; k = E mixes all of them (soft).
      router, policy, allow_noncausal: as in `MoEConfig`; a router that keeps no state. A slot that the policy drops
        goes through the frozen map alone.
      targets: the maps that hold experts; other targets of the adapters hold a plain one.
      routing: who decides. `ffn`: one router before the feed-forward, whose experts stay apart through its
        nonlinearity (MixLoRA); `linear`: a router before every map (MoLA, LoRAMoE); `input`: one for maps of one input,
        so that q, k and v share theirs (LoRA-Mixer).
      shared_a: one A for all experts, a B for each (HydraLoRA); not with `ffn`.
      router_std: standard deviation of the routers' first weights.
    """

    num_experts: int = 8
    top_k: int = 2
    router: str = "softmax_topk"
    policy: str = "dropless"
    allow_noncausal: bool = False
    targets: tuple[str, ...] = FEED_FORWARD
    routing: Routing = "ffn"
    shared_a: bool = False
    router_std: float = 0.02

    def __post_init__(self) -> None:
        require(self.num_experts >= 1, "experts.num_experts", self.num_experts, "at least 1")
        limits = f"1 <= top_k <= num_experts = {self.num_experts}"
        require(1 <= self.top_k <= self.num_experts, "experts.top_k", self.top_k, limits)
        known = get_args(Routing)
        require(self.routing in known, "experts.routing", self.routing, f"one of {', '.join(known)}")
        require(bool(self.targets), "experts.targets", self.targets, "one or more targets")
        outside = [name for name in self.targets if self.routing == "ffn" and name not in FEED_FORWARD]
        require(not outside, "experts.targets", outside, f"some of {', '.join(FEED_FORWARD)}, for routing = 'ffn'")
        require(not (self.shared_a and self.routing == "ffn"), "experts.shared_a", True, "routing 'linear' or 'input'")
        require(self.router_std >= 0, "experts.router_std", self.router_std, "0 or more")

    @property
    def as_moe(self) -> MoEConfig:
        """The fields that routers and token policies are made from."""
        return MoEConfig(
            num_experts=self.num_experts, top_k=self.top_k, router=self.router, policy=self.policy,
            allow_noncausal=self.allow_noncausal,
        )  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """Adapters of a model.

    Attributes:
      rank, alpha, rslora: r and the scale s, see the module.
      dropout: share of an adapter's inputs that are zeroed in training.
      dora: weights are split into magnitude and direction.
      targets: names of the maps with adapters: q, k, v, o, gate, up, down, or a latent attention's q_down, q_up,
        kv_down.
      experts: None for one adapter at each target.
      init: of A: uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5), PEFT's default), or normal with variance 1/r. B is
        zero, so that the adapted model starts as the frozen one.
    """

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0
    dora: bool = False
    targets: tuple[str, ...] = TARGETS
    experts: ExpertsConfig | None = None
    init: Initialiser = "kaiming"

    def __post_init__(self) -> None:
        require(self.rank >= 1, "adapters.rank", self.rank, "at least 1")
        require(self.alpha > 0, "adapters.alpha", self.alpha, "a positive number")
        require(0.0 <= self.dropout < 1.0, "adapters.dropout", self.dropout, "at least 0 and below 1")
        require(bool(self.targets), "adapters.targets", self.targets, "one or more targets")
        twice = sorted({name for name in self.targets if self.targets.count(name) > 1})
        require(not twice, "adapters.targets", twice, "each target once")
        known = get_args(Initialiser)
        require(self.init in known, "adapters.init", self.init, f"one of {', '.join(known)}")
        if self.experts is not None:
            outside = [name for name in self.experts.targets if name not in self.targets]
            require(not outside, "experts.targets", outside, f"some of adapters.targets = {self.targets}")
            require(not (self.dora and self.experts.shared_a), "adapters.dora", True, "no shared_a beside it")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank**0.5 if self.rslora else self.alpha / self.rank

    def holds_experts(self, target: str) -> bool:
        return self.experts is not None and target in self.experts.targets
