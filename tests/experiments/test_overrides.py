"""Fields by dotted name: parsed by their type, applied together, refused with the names there are."""

import json
from dataclasses import dataclass, field

import pytest

from experiments.config import MeshConfig, RunConfig
from experiments.overrides import flatten, with_overrides
from experiments.recipes import PRESETS, smoke
from moe.config import ModelConfig, require


@dataclass(frozen=True)
class Inner:
    low: int = 1
    high: int = 2

    def __post_init__(self) -> None:
        require(self.low < self.high, "inner.low", self.low, f"below high = {self.high}")


@dataclass(frozen=True)
class Outer:
    flag: bool = True
    sizes: tuple[int, ...] = (1, 2)
    maybe: float | None = None
    inner: Inner = field(default_factory=Inner)


def test_types():
    config = with_overrides(
        smoke(),
        [
            "steps=12",
            "optimizer.learning_rate=1e-4",
            "data.corpus=a=b",  # only the first = divides
            "balance.scope=sequence",
            "data.domains=one,two",
            "model.tie_embeddings=True",
            "model.moe.router=softmax_topk(renormalize=False)",
        ],
    )
    assert config.steps == 12
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.corpus == "a=b"
    assert config.balance.scope == "sequence"
    assert config.data.domains == ("one", "two")
    assert config.model.tie_embeddings is True
    assert config.model.moe.router == "softmax_topk(renormalize=False)"
    assert config.batch_size == smoke().batch_size


def test_tuples_and_optionals():
    assert with_overrides(Outer(), ["sizes=3,4,5"]).sizes == (3, 4, 5)
    assert with_overrides(Outer(), ["sizes="]).sizes == ()
    assert with_overrides(Outer(), ["maybe=0.5"]).maybe == 0.5
    assert with_overrides(Outer(maybe=1.0), ["maybe=none"]).maybe is None
    assert with_overrides(Outer(), ["flag=FALSE"]).flag is False


def test_settings_that_only_fit_together():
    assert with_overrides(Outer(), ["inner.low=7", "inner.high=9"]).inner == Inner(7, 9)
    for alone in ("inner.low=7", "inner.high=0"):
        with pytest.raises(ValueError, match=r"inner\.low"):
            with_overrides(Outer(), [alone])
    both = ["model.moe.num_experts=4", "model.moe.top_k=4", "mesh.expert=4", "batch_size=16", "accumulation=4"]
    config = with_overrides(smoke(), both)
    assert (config.model.moe.top_k, config.mesh, config.accumulation) == (4, MeshConfig(expert=4), 4)


def test_the_last_of_equal_names_counts_and_nothing_changes_nothing():
    assert with_overrides(smoke(), ["steps=3", "steps=4"]).steps == 4
    assert with_overrides(smoke(), []) == smoke()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.hiden=96", r"--set = 'model\.hiden': expected one of .*model\.hidden"),
        ("nothing=1", r"'nothing': expected one of .*balance\.weight"),
        ("steps.more=1", r"'steps\.more': expected one of "),
        ("model=1", r"--set = 'model': expected one of its fields: .*hidden"),
        ("steps", "--set = 'steps': expected name=value"),
        ("=3", "--set = '=3': expected name=value"),
        ("steps=many", "steps = 'many': expected int"),
        ("steps=1.5", "steps = '1.5': expected int"),
        ("balance.weight=x", r"balance\.weight = 'x': expected float"),
        ("balance.scope=galaxy", r"balance\.scope = 'galaxy': expected one of none, sequence"),
        ("model.tie_embeddings=1", r"model\.tie_embeddings = '1': expected true or false"),
        ("steps=0", "steps = 0: expected at least 1"),
        ("model.moe.top_k=99", r"moe\.top_k = 99"),
    ],
)
def test_bad_settings_say_what_was_expected(setting, words):
    with pytest.raises(ValueError, match=words):
        with_overrides(smoke(), [setting])


def test_a_part_that_is_none_has_no_fields_to_set():
    dense = RunConfig(model=ModelConfig(moe=None))
    for setting in ("model.moe.top_k=2", "model.moe=big"):
        with pytest.raises(ValueError, match=r"model\.moe"):
            with_overrides(dense, [setting])
    assert with_overrides(dense, ["model.moe=none"]) == dense


@pytest.mark.parametrize("name", PRESETS)
def test_flatten_is_json_and_its_names_can_be_set(name):
    """Every flat name set to its own value gives the same config."""
    config = PRESETS[name]()
    flat = flatten(config)
    assert json.loads(json.dumps(flat)) == flat
    text = {key: ",".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in flat.items()}
    assert with_overrides(config, [f"{key}={value}" for key, value in text.items()]) == config
    assert flat["model.moe.num_experts"] == config.model.moe.num_experts
