"""Everything one training run is a function of. A recipe is a function that returns a `RunConfig`;
a variant is `dataclasses.replace` on another recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from moe.config import BalanceScope, ModelConfig, require

PARENT = "parent:"


@dataclass(frozen=True)
class DataConfig:
    """What is read.

    Attributes:
      corpus: `packaged` (the multi-domain corpus of `data fetch`), `synthetic` (made in memory, for tests), a
        directory written by `data build`, or a call of `experiments.data.noise`, `noised(levels=(0.0, 0.5))`.
      seq_len: S, predicted tokens per sequence; a sample holds S + 1 tokens of one domain.
      domains: subset of the corpus' domains, empty for all.
      allow_unclear_rights: keep domains whose text rights are marked unclear.
      weights: proportions of the domains in training, in the corpus' order; 0 leaves one out. Empty: equal numbers.
    """

    corpus: str = "packaged"
    seq_len: int = 128
    domains: tuple[str, ...] = ()
    allow_unclear_rights: bool = True
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        valid = all(0.0 <= weight < math.inf for weight in self.weights)
        valid = valid and (not self.weights or 0.0 < sum(self.weights) < math.inf)
        require(valid, "data.weights", self.weights, "finite numbers, 0 or more and not all 0; or none")


@dataclass(frozen=True)
class OptimizerConfig:
    """`name` is a factory of `experiments.optimizers` or an import path `package.module:factory`, with options as in a
    call, `galore(rank=32)`; it is called as `factory(config=..., steps=...)` with this config and the number of steps,
    and returns an `optax.GradientTransformation`."""

    name: str = "adamw"
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    final_fraction: float = 0.1  # cosine decay ends at this share of the peak rate
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0


@dataclass(frozen=True)
class BalanceConfig:
    """Router losses. The scope is always named (DESIGN contract 3).

    Attributes:
      scope: the set of tokens over which the selection frequency f is taken.
      weight: coefficient of the balance loss (uniform routing gives a loss of exactly 1).
      micro_batch_size: sequences of one micro-batch, for `microbatch` and `shuffle_micro`.
      ema_decay: share of the earlier steps' counts that `ema` keeps at each step; 0 leaves the last step's alone.
      z_weight: coefficient of the router z-loss.
      importance_weight: of the squared variation of the experts' summed probabilities, per pass (Shazeer et al.).
      devices: equal groups of consecutive experts, for the next two (DeepSeek-V2).
      device_weight: of the balance loss between those groups, in `scope`.
      communication_weight: of the balance of tokens sent to them, in `scope`.
      device_limit: M, the most groups one token reaches, which normalises the latter.
    """

    scope: BalanceScope = "global_exact"
    weight: float = 0.01
    micro_batch_size: int = 2
    ema_decay: float = 0.9
    z_weight: float = 1e-3
    importance_weight: float = 0.0
    devices: int = 1
    device_weight: float = 0.0
    communication_weight: float = 0.0
    device_limit: int = 1

    def __post_init__(self) -> None:
        for name in ("weight", "z_weight", "importance_weight", "device_weight", "communication_weight"):
            value = getattr(self, name)
            require(0.0 <= value < math.inf, f"balance.{name}", value, "a finite number, 0 or more")
        require(self.micro_batch_size >= 1, "balance.micro_batch_size", self.micro_batch_size, "at least 1")
        require(0.0 <= self.ema_decay < 1.0, "balance.ema_decay", self.ema_decay, "at least 0 and below 1")
        require(self.devices >= 1, "balance.devices", self.devices, "at least 1")
        limits = f"1 <= device_limit <= devices = {self.devices}"
        require(1 <= self.device_limit <= self.devices, "balance.device_limit", self.device_limit, limits)


@dataclass(frozen=True)
class ReweightingConfig:
    """Weights from the losses themselves, `optim.reweighting`. Router losses are not weighted.

    Attributes:
      strategy: a score of `optim.reweighting.SCORES`, `lin_upper`, with options as in a call, `ohem(share=0.5)`; or an
        import path `package.module:function`. Empty: the mean over tokens, and nothing of the rest counts.
      r: the temperature, that is the strength of the pull to uniform weights; infinity is uniform.
      delta: half the width losses are spread over.
      warmup_steps: first steps, which have temperature `warm_r`.
      level: what is weighted, a sequence's mean loss or a token's loss.
      scope: the set of units that weights are of, to be named under accumulation: `micro`, those of one pass, whose
        weights sum to 1 / A; or `global`, those of the optimiser step, which costs one more forward pass over it.
      clip_quantile: scores see losses of at most this quantile of the scope; 1 is off.
    """

    strategy: str = ""
    r: float = 1.0
    delta: float = 1.0
    warmup_steps: int = 0
    warm_r: float = 100.0
    level: Literal["sample", "token"] = "sample"
    scope: Literal["", "micro", "global"] = ""
    clip_quantile: float = 1.0

    def __post_init__(self) -> None:
        for name in ("r", "warm_r"):
            require(getattr(self, name) > 0, f"reweighting.{name}", getattr(self, name), "a number above 0")
        require(0 < self.delta < math.inf, "reweighting.delta", self.delta, "a finite number above 0")
        require(self.warmup_steps >= 0, "reweighting.warmup_steps", self.warmup_steps, "0 or more")
        require(self.level in ("sample", "token"), "reweighting.level", self.level, "sample or token")
        require(self.scope in ("", "micro", "global"), "reweighting.scope", self.scope, "micro or global")
        quantile = self.clip_quantile
        require(0 < quantile <= 1, "reweighting.clip_quantile", quantile, "above 0, at most 1 (off)")
        if self.strategy:
            from experiments.weighted_loss import make_score  # it needs JAX

            make_score(self.strategy)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along the three axes; their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "expert"):
            require(getattr(self, name) >= 1, f"mesh.{name}", getattr(self, name), "at least 1")

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class InitConfig:
    """Where parameters come from; the optimiser starts fresh in any case.

    Attributes:
      source: empty for random ones; `parent:NAME`, a run that the preset trains beforehand; else a pretrained model,
        a name or a directory as `convert` takes it.
      upcycle: how a dense source becomes the mixture of experts that `model` is, a method of `moe.upcycle`:
        `copy`, `split(shards=2)`, `drop(ratio=0.5)`. Empty: the source is taken as it is.
    """

    source: str = ""
    upcycle: str = ""

    def __post_init__(self) -> None:
        require(bool(self.source or not self.upcycle), "init.upcycle", self.upcycle, "an init.source to start from")
        require(self.source != PARENT, "init.source", self.source, f"{PARENT}NAME")

    @property
    def parent(self) -> str:
        """NAME of `parent:NAME`, else empty."""
        return self.source.removeprefix(PARENT) if self.source.startswith(PARENT) else ""


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
      init: where its parameters come from.
      reweighting: weights from the losses themselves; by default none.
      batch_size: sequences per optimiser step, over all devices and accumulation steps.
      accumulation: A, forward-backward passes per optimiser step; divides batch_size.
      steps: optimiser steps of the whole schedule.
      checkpoint_every: steps between asynchronous checkpoints; 0 for only the last one.
      eval_tokens_per_domain: held-out tokens per domain and split at the end.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init: InitConfig = field(default_factory=InitConfig)
    reweighting: ReweightingConfig = field(default_factory=ReweightingConfig)
    batch_size: int = 32
    accumulation: int = 1
    steps: int = 400
    seed: int = 0
    checkpoint_every: int = 100
    eval_tokens_per_domain: int = 16_384

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.accumulation >= 1, "accumulation", self.accumulation, "at least 1")
        require(
            self.batch_size >= 1 and self.batch_size % self.accumulation == 0,
            "batch_size",
            self.batch_size,
            f"a positive multiple of accumulation = {self.accumulation}",
        )
        require(
            self.eval_tokens_per_domain >= self.data.seq_len,
            "eval_tokens_per_domain",
            self.eval_tokens_per_domain,
            f"at least data.seq_len = {self.data.seq_len}, one window",
        )
        devices = self.mesh.devices
        per_pass = self.batch_size // self.accumulation
        require(
            per_pass % devices == 0,
            "batch_size",
            self.batch_size,
            f"batch_size / accumulation = {per_pass} divisible by the mesh's {devices} devices "
            f"(data x fsdp x expert = {self.mesh.data} x {self.mesh.fsdp} x {self.mesh.expert})",
        )
        require(
            not self.reweighting.strategy or self.accumulation == 1 or self.reweighting.scope != "",
            "reweighting.scope",
            "",
            f"micro or global, by name: accumulation = {self.accumulation} passes make an optimiser step",
        )
        if self.balance.scope in ("microbatch", "shuffle_micro"):
            require(
                per_pass % self.balance.micro_batch_size == 0,
                "balance.micro_batch_size",
                self.balance.micro_batch_size,
                f"a divisor of batch_size / accumulation = {per_pass}",
            )
        if self.init.upcycle:
            from moe.upcycle import make_method

            require(self.model.moe is not None, "model.moe", None, f"MoE layers for init.upcycle = {self.init.upcycle}")
            make_method(self.init.upcycle)
        if self.model.moe is not None:
            require(
                self.model.moe.num_experts % self.mesh.expert == 0,
                "mesh.expert",
                self.mesh.expert,
                f"a divisor of moe.num_experts = {self.model.moe.num_experts}",
            )
            require(
                self.model.moe.num_experts % self.balance.devices == 0,
                "balance.devices",
                self.balance.devices,
                f"a divisor of moe.num_experts = {self.model.moe.num_experts}",
            )
            by_group = self.balance.device_weight or self.balance.communication_weight
            one_pass = self.balance.scope == "global_exact" and self.accumulation == 1
            require(
                not by_group or one_pass or self.balance.scope in ("sequence", "microbatch", "device"),
                "balance.scope",
                self.balance.scope,
                "sequence, microbatch, device, or global_exact with accumulation = 1, for losses of expert groups",
            )
            from moe.policies import make_policy  # they need JAX, looking around does not
            from moe.routing import make_router

            make_router(self.model.moe)
            make_policy(self.model.moe)
