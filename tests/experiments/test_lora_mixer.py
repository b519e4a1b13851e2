"""The lora-mixer experiment: what each stage trains, both signs of the loss, bounds, little data, folders, resuming."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.config import MeshConfig
from experiments.data.shards import SPLITS
from experiments.experiment import Study, studies
from experiments.finetune import Base, finetune, routers_only
from experiments.lora_mixer import study as module
from experiments.lora_mixer.experiment import EXPERIMENT, losses
from experiments.lora_mixer.probing import Probe, mi_by_layer, routing_metrics
from experiments.lora_mixer.study import (
    Place,
    RouterLoss,
    Trial,
    anchored,
    experts_only,
    joint,
    mean,
    routed,
    router_only,
    router_parameters,
    run,
    soft,
    stacked,
    study,
    uniform,
)
from experiments.lora_mixer.worlds import Alphabets
from experiments.mixlora.experiment import tuning
from experiments.mixlora.worlds import Packaged, Symbolic
from experiments.run import run as run_preset
from experiments.tasks import symbolic
from moe.config import MoEConfig
from moe.lora import presets
from moe.lora.adapters import init_adapters, parameter_count
from moe.lora.config import AdapterConfig
from moe.lora.losses import routing_specialization_loss
from moe.lora.peft import write_peft
from moe.losses import routing_stats
from moe.routing import make_router
from moe.transformer import init_params

PRESETS = EXPERIMENT.presets
TASKS = ("copy", "reverse", "sort")
WORLD = Symbolic(TASKS, digits=4, pretraining_steps=2, pretraining_batch=8, test_rows=16)
WORLD = replace(WORLD, model=replace(WORLD.model, hidden=16, num_layers=2, num_heads=2, num_kv_heads=2, ffn_dim=24,
                                     head_dim=8))  # fmt: skip
ATTENTION = ("q", "k", "v", "o")
TRIAL = Trial(expert=AdapterConfig(2, 4.0, targets=ATTENTION), world=WORLD, alone=tuning(1e-2, 2, 8),
              routing=tuning(1e-2, 2, 8), samples=16, margin=-1.0)  # fmt: skip
QUIET = lambda step, note: None  # noqa: E731


@pytest.fixture(scope="module")
def base():
    return Base(WORLD.model, init_params(WORLD.model, jax.random.key(0)), {})


def moved(tree, key, size=0.3):
    """Every leaf away from where it is, so that no expert is zero."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([leaf + size * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])


@pytest.fixture(scope="module")
def place(base, tmp_path_factory):
    """A place whose three experts are drawn, and those experts."""
    folder = tmp_path_factory.mktemp("place")
    at = Place(TRIAL, base, folder, 0, QUIET)
    made = {}
    for i, task in enumerate(TASKS):
        tree = moved(init_adapters(base.config, TRIAL.expert, base.params, jax.random.key(i)), jax.random.key(10 + i))
        made[task] = TRIAL.expert, tree, at.folder(task)
    return at, made


def named_leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same(a, b):
    """By leaf, whether both trees are equal to the bit."""
    ours, theirs = named_leaves(a), named_leaves(b)
    assert ours.keys() == theirs.keys()
    return {name: ours[name].tobytes() == theirs[name].tobytes() for name in ours}


@pytest.mark.slow
def test_rows_by_label_leave_the_other_experts_as_they_were_to_the_bit(place, tmp_path):
    """Steps on rows of tasks 0 and 2 alone: expert 1 and every router keep their bits, and the others move."""
    at, _ = place
    adapters = soft(TRIAL.expert, 3)
    start = moved(init_adapters(WORLD.model, adapters, at.base.params, jax.random.key(1)), jax.random.key(2))

    def batches(step):
        made = symbolic.batch("train", 0, ["copy", "sort"], 8 * step, 8, WORLD.digits)
        return made._replace(task=2 * made.task)

    config = replace(tuning(1e-2, 2, 8), hard=True)
    after = finetune(at.base, adapters, batches, config, jax.random.key(0), tmp_path, start=start,
                     trainable=experts_only)  # fmt: skip
    before, found = named_leaves(start), named_leaves(after)
    for name, leaf in found.items():
        if "router_" in name:
            assert leaf.tobytes() == before[name].tobytes()
            continue
        unchanged = [leaf[:, e].tobytes() == before[name][:, e].tobytes() for e in range(3)]
        assert unchanged == [False, True, False], name


@pytest.mark.slow
def test_the_joint_arm_goes_by_label_first_and_then_trains_everything(place, monkeypatch):
    at, experts = place
    calls = []
    real = module.finetune

    def watched(base, adapters, batches, config, key, folder, **more):
        tree = real(base, adapters, batches, config, key, folder, **more)
        calls.append((config, more, tree))
        return tree

    monkeypatch.setattr(module, "finetune", watched)
    trial = replace(TRIAL, method="joint", loss=RouterLoss(proximal_weight=0.01))
    made = joint(replace(at, trial=trial), experts)
    (first, options, labelled), (second, later, tree) = calls
    assert (first.hard, first.steps, second.hard, second.steps) == (True, 6, False, 2)
    assert options["trainable"] is experts_only
    assert later["start"] is labelled
    assert not any(same(labelled, tree).values())
    assert made.trained == sum(leaf.size for leaf in jax.tree.leaves(made.tree))
    assert made.seen == 8 * (6 + 2)


def test_router_training_changes_routers_only(place):
    at, experts = place
    adapters, start = stacked(at, experts)
    made = router_only(at, experts)
    assert made.adapters == adapters
    unchanged = same(start, made.tree)
    assert {name for name, equal in unchanged.items() if not equal} == {name for name in unchanged if "router_" in name}
    assert made.trained == router_parameters(WORLD.model, adapters) == 2 * 2 * 16 * 3  # layers, sites, d, E
    assert made.seen == 16
    for i, (_, tree, _) in enumerate(experts.values()):  # the scale alpha / r is folded into B
        for name, leaf in named_leaves(tree).items():
            factor = np.float32(2.0 if name.endswith("['b']") else 1.0)
            assert np.array_equal(named_leaves(made.tree)[name][:, i], leaf[:, 0] * factor)


def test_equal_weights_are_equal_and_tell_nothing(place):
    at, experts = place
    probes = at.probed(uniform(at, experts), list(experts))
    found = routing_metrics(probes)
    assert found["router_entropy"] == pytest.approx(math.log(3), rel=1e-6)
    assert abs(found["domain_expert_mi"]) < 1e-6
    tokens = module.PROBES * 8 * (2 * 4 + 2)
    assert probes["copy"].tokens == tokens
    for probe in probes.values():
        assert set(probe.probs) == {"attention_in", "attention_out"}
        assert all(np.allclose(p.sum(axis=-1), probe.tokens) for p in [*probe.probs.values(), *probe.first.values()])


def test_what_routers_know_of_the_task():
    """One-hot by task in layer 0, blind in layer 1: log E and 0, and their mean."""
    first = 10.0 * np.stack([np.eye(3), np.array([[0.0, 1.0, 0.0]] * 3)])  # [L, tasks, E]
    blind = 10.0 * np.stack([np.eye(3), np.full((3, 3), 1 / 3)])
    entropy = np.array([0.0, 10.0 * math.log(3)])
    probes = {task: Probe({"s": blind[:, t]}, {"s": first[:, t]}, {"s": entropy}, 10.0) for t, task in enumerate(TASKS)}
    assert mi_by_layer(probes) == pytest.approx([math.log(3), 0.0], abs=1e-5)
    found = routing_metrics(probes)
    half = math.log(3) / 2
    for key, value in (("domain_expert_mi", half), ("top1_mi", half), ("router_entropy", half), ("max_violation", 1.0)):
        assert found[key] == pytest.approx(value, abs=1e-5), key


def sites_of(logits, top_k):
    """What a soft router at one site of one layer tells of logits [B * S, E], B = 2."""
    number = logits.shape[-1]
    router = make_router(MoEConfig(num_experts=number, top_k=top_k))
    routing, told = router(jnp.zeros((len(logits), 4)), logits, jnp.zeros(len(logits), jnp.int32), {}, None)
    stats = routing_stats(routing, jnp.ones((2, len(logits) // 2), bool), told, kept=routing.valid)
    return {"s": jax.tree.map(lambda leaf: leaf[None], stats)}


@pytest.mark.parametrize(("sign", "factor"), [("as_claimed", 1.0), ("as_printed", -1.0)])
def test_the_loss_in_both_signs(sign, factor, key):
    logits = 2.0 * jax.random.normal(key, (24, 4))
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    share = np.bincount(p.argmax(axis=-1), minlength=4) / 24
    wanted = 0.25 * 4 * (share * p.mean(axis=0)).sum() - factor * 0.1 * (p * np.log(p)).sum(axis=-1).mean()
    loss = RouterLoss(0.25, 0.1, sign)
    assert float(routed(loss, 4)({}, sites_of(logits, 4))) == pytest.approx(wanted, rel=1e-5)


def test_the_share_of_slots_would_balance_nothing_in_a_soft_mixture(key):
    """Why the likeliest expert is counted: with all experts in the slots the other count has no gradient."""
    logits = 2.0 * jax.random.normal(key, (24, 4))
    slots = {"top_k": 4, "count": "slots"}
    of_slots = jax.grad(lambda z: routing_specialization_loss(sites_of(z, 4), 1.0, 0.0, **slots))(logits)
    ours = jax.grad(lambda z: routed(RouterLoss(1.0, 0.0), 4)({}, sites_of(z, 4)))(logits)
    assert float(jnp.max(jnp.abs(of_slots))) < 1e-7 < 1e-4 < float(jnp.max(jnp.abs(ours)))


def test_experts_are_held_where_they_were_and_routers_are_not(place):
    at, experts = place
    _, start = stacked(at, experts)
    sites = sites_of(jnp.zeros((8, 3)), 3)
    penalty = anchored(RouterLoss(0.0, 0.0, proximal_weight=0.5), 3, start)
    assert float(penalty(start, sites)) == 0.0
    shifted = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + (0.1 if experts_only(jax.tree_util.keystr(path)) else 7.0), start
    )
    size = sum(leaf.size for name, leaf in named_leaves(start).items() if not routers_only(name))
    assert float(penalty(shifted, sites)) == pytest.approx(0.5 * 0.01 * size, rel=1e-4)


def test_experts_from_folders_are_the_experts_that_were_written(place, tmp_path):
    """Also of another rank, as downloaded ones are."""
    at, experts = place
    wide = AdapterConfig(3, 12.0, targets=ATTENTION)
    tree = moved(init_adapters(WORLD.model, wide, at.base.params, jax.random.key(7)), jax.random.key(8))
    experts = experts | {"sort": (wide, tree, at.folder("sort"))}
    for task, (adapters, tree, _) in experts.items():
        write_peft(tmp_path / task, WORLD.model, adapters, tree)
    trial = replace(TRIAL, folders=tuple(str(tmp_path / task) for task in TASKS))
    study(trial).check()
    assert study(trial).steps == TRIAL.routing.steps
    there = replace(at, trial=trial)
    read = {task: there.expert(task) for task in TASKS}
    (config, ours), (other, theirs) = stacked(at, experts), stacked(there, read)
    assert config.rank == other.rank == 3
    assert config.scale == other.scale == 1.0
    assert set(config.targets) == set(other.targets)
    assert all(same(ours, theirs).values())
    assert at.folder("copy") != there.folder("copy")
    made = study(replace(trial, method="rival", rival=presets.mola(2, 4.0, num_experts=3))).override
    assert made is not None
    settings = made(["samples=32"]).settings
    assert (settings["expert.rank"], settings["expert.alpha"]) == (3, 6.0)
    size = parameter_count(WORLD.model, presets.mola(settings["rival.rank"], num_experts=3))
    assert size == pytest.approx(parameter_count(WORLD.model, soft(wide, 3)), rel=0.2)


def test_adapters_and_bases_that_are_others_at_the_same_place_are_not_taken_for_them(place, tmp_path):
    at, experts = place
    folders = tuple(str(tmp_path / task) for task in TASKS)
    for task, (adapters, tree, _) in experts.items():
        write_peft(tmp_path / task, WORLD.model, adapters, tree)
    there = lambda base: replace(at, base=base, trial=replace(TRIAL, folders=folders)).folder("copy")  # noqa: E731
    first = there(at.base)
    assert first == there(at.base)
    assert first != there(at.base._replace(params=moved(at.base.params, jax.random.key(1), 0.01)))
    shutil.rmtree(tmp_path / "sort")
    write_peft(tmp_path / "sort", WORLD.model, *experts["copy"][:2])
    assert first != there(at.base)


@pytest.mark.parametrize(("dora", "size", "named"), [
    (True, 0.3, "plain LoRA or rsLoRA"), (False, 0.0, "B is zero everywhere")])  # fmt: skip
def test_folders_that_cannot_be_mixed_are_refused_first(dora, size, named, place, tmp_path):
    adapters = replace(TRIAL.expert, dora=dora)
    tree = init_adapters(WORLD.model, adapters, place[0].base.params, jax.random.key(7))
    for task in TASKS:
        write_peft(tmp_path / task, WORLD.model, adapters, moved(tree, jax.random.key(8), size) if size else tree)
    with pytest.raises(ValueError, match=named):
        study(replace(TRIAL, folders=tuple(str(tmp_path / task) for task in TASKS))).check()


def test_routers_are_looked_at_with_questions_that_nothing_is_trained_on(place, monkeypatch):
    at, experts = place
    seen = []
    monkeypatch.setattr(module, "probe", lambda base, adapters, tree, batch: seen.append(batch) or Probe({}, {}, {}, 1))
    at.probed(uniform(at, experts), ["copy"])
    tokens = np.concatenate([batch.tokens for batch in seen])
    digits = tokens[:, 1 : 1 + WORLD.digits].astype(np.int64) - symbolic.ZERO
    codes = symbolic.split_codes((digits @ 10 ** np.arange(WORLD.digits)[::-1]).astype(np.uint64))
    assert set(codes.tolist()) == {SPLITS.index("validation")}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["router_only", "joint"])
def test_what_two_devices_train_is_scored(method, tmp_path):
    metrics, _ = run(replace(TRIAL, method=method, mesh=MeshConfig(data=2)), 0, tmp_path / "arm", QUIET)
    assert 0.0 <= metrics["mean_accuracy"] <= 1.0


def test_every_digit_says_which_alphabet_it_is_of_and_rows_are_the_same_otherwise():
    world, plain = Alphabets(digits=4, test_rows=8), Symbolic(digits=4, test_rows=8)
    names = ["sort", "copy"]
    ours, theirs = (one.batches(names, 0, 8)(3) for one in (world, plain))
    own = np.where(theirs.task == 0, list(symbolic.TASKS).index("sort"), list(symbolic.TASKS).index("copy"))
    for mine, other in ((ours.tokens, theirs.tokens), (ours.targets, theirs.targets)):
        digit = other >= symbolic.ZERO
        assert np.array_equal(mine[~digit], other[~digit])
        assert np.array_equal((mine - symbolic.ZERO) // 10 * digit, own[:, None] * digit)
        assert np.array_equal((mine - other) % 10, np.zeros_like(other))
        assert digit.any()
        assert mine.max() < world.model.vocab_size


def test_the_model_has_seen_all_maps_in_all_alphabets_and_no_task():
    world = Alphabets(digits=4, pretraining_batch=24)
    tokens = np.asarray(world.text(0, 5)["tokens"][0])
    digits = tokens >= symbolic.ZERO
    seen = set()
    for row, mask in zip(tokens, digits):
        alphabets = set(((row[mask] - symbolic.ZERO) // 10).tolist())
        assert len(alphabets) == 1
        seen.add((int(row[0]), alphabets.pop()))
    assert seen == {(symbolic.TOKEN[name], a) for name in symbolic.PRETRAINING for a in range(4)}


TABLE = {"uniform": 0.2, "own": 0.8, "other": 0.4, "top3": 0.65, "top1": 0.5}


def from_table(self, adapters, tree, folder, task, split):
    """Accuracy by what is scored, instead of a model's."""
    if "uniform" in folder.name:
        return TABLE["uniform"]
    if adapters.experts is not None:
        return TABLE[f"top{adapters.experts.top_k}"]
    return TABLE["own" if folder.name.endswith(task) else "other"]


@pytest.mark.parametrize(("method", "accuracy", "share"), [
    ("router_only", 0.65, 0.75), ("oracle", 0.8, 1.0), ("uniform", 0.2, 0.0),
    ("best_single", 1.6 / 3, 5 / 9)])  # fmt: skip
@pytest.mark.slow
def test_shares_of_what_labels_bring(method, accuracy, share, base, tmp_path, monkeypatch):
    monkeypatch.setattr(Place, "accuracy", from_table)
    metrics, series = run(replace(TRIAL, method=method), 0, tmp_path / "arm", QUIET)
    assert metrics["mean_accuracy"] == pytest.approx(accuracy)
    assert metrics["share_of_oracle"] == pytest.approx(share)
    assert (series["oracle"], series["uniform"]) == ([0.8] * 3, [0.2] * 3)
    if method == "router_only":
        assert metrics["soft_minus_topk"] == 0.0  # k = 3 of 3
        assert metrics["soft_minus_top1"] == pytest.approx(0.15)
        assert metrics["trainable_parameters"] == 2 * 2 * 16 * 3


def test_a_task_that_is_not_learnt_is_left_out_and_named(tmp_path, monkeypatch):
    def accuracy(self, adapters, tree, folder, task, split):
        return 0.0 if task == "reverse" else from_table(self, adapters, tree, folder, task, split)

    monkeypatch.setattr(Place, "accuracy", accuracy)
    monkeypatch.setattr(Symbolic, "majority", lambda *_: 0.0)
    metrics, series = run(replace(TRIAL, method="oracle", margin=0.05), 0, tmp_path / "arm", QUIET)
    assert (metrics["tasks_used"], series["dropped"], series["by_task"]) == (2.0, ["reverse"], [0.8, None, 0.8])
    with pytest.raises(ValueError, match=r"^world.tasks = .*two that are learnt"):
        run(replace(TRIAL, method="oracle", margin=0.9), 0, tmp_path / "arm", QUIET)


def test_few_samples_are_the_same_few_again_and_the_first_of_the_many(place):
    at, _ = place
    few, many = (replace(at, trial=replace(TRIAL, samples=n)).rows(TASKS) for n in (16, 64))
    seen = [few(step).tokens for step in range(6)]
    assert len(np.unique(np.concatenate(seen), axis=0)) == 16
    assert np.array_equal(seen[5], seen[1])
    assert np.array_equal(seen[1], many(1).tokens)
    assert not np.array_equal(many(2).tokens, few(2).tokens)
    trained = WORLD.batches(["copy"], 0, 8)(0).tokens
    assert not {tuple(row) for row in trained.tolist()} & {tuple(row) for row in np.concatenate(seen).tolist()}


@pytest.mark.slow
def test_pieces_are_shared_kept_and_the_same_after_ctrl_c(tmp_path):
    whole = run(TRIAL, 0, tmp_path / "a" / "as_claimed", QUIET)
    shared = tmp_path / "a" / "shared-seed0"
    stamps = {path: path.stat().st_mtime_ns for path in shared.rglob("*.json")}
    assert len(list(shared.rglob("_CHECKPOINT_METADATA"))) == 1 + 3 + 1  # the base, the experts, the routers
    told = []
    printed = replace(TRIAL, loss=replace(TRIAL.loss, sign="as_printed"))
    run(printed, 0, tmp_path / "a" / "as_printed", lambda step, note: told.append((step, note)))
    assert len(list(shared.rglob("_CHECKPOINT_METADATA"))) == 6  # the routers alone were missing
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert [step for step, note in told if "routers" in note] == [7, 8]
    assert study(printed).steps == 8

    def stop(step, note):
        if "routers" in note and step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(TRIAL, 0, tmp_path / "b" / "as_claimed", stop)
    assert run(TRIAL, 0, tmp_path / "b" / "as_claimed", QUIET) == whole


@pytest.mark.parametrize(("changes", "named"), [
    ({"world": replace(WORLD, tasks=("paste", "copy"))}, "world.tasks = 'paste'"),
    ({"world": replace(WORLD, tasks=("copy",))}, "world.tasks = ('copy',)"),
    ({"world": Packaged(source="")}, "world.source = ''"),
    ({"loss": RouterLoss(entropy_weight=-0.1)}, "loss.entropy_weight = -0.1"),
    ({"folders": ("one",)}, "folders = ('one',)"),
    ({"method": "rival"}, "rival = None"),
    ({"expert": AdapterConfig(99, 4.0, targets=ATTENTION)}, "adapters.rank = 99")])  # fmt: skip
def test_bad_input_is_refused_first(changes, named):
    with pytest.raises(ValueError) as error:
        study(replace(TRIAL, **changes)).check()
    assert named in str(error.value)


@pytest.mark.parametrize(("changes", "named"), [
    ({"samples": 20}, "samples = 20"), ({"served": 0}, "served = 0"),
    ({"method": "guess"}, "method = 'guess'")])  # fmt: skip
def test_a_trial_that_makes_no_sense_is_not_made(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(TRIAL, **changes)


def test_settings_are_set():
    override = study(TRIAL).override
    assert override is not None
    changed = override(["routing.steps=5", "loss.sign=as_printed", "samples=32"])
    assert changed.steps == 3 * 2 + 5
    assert changed.settings["loss.sign"] == "as_printed"


LATER = ("cpu-long", "gpu", "paper")  # long to lower


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LATER else n for n in PRESETS])
@pytest.mark.slow_after(1)
def test_every_preset_lowers_and_the_rival_is_as_large(name):
    """A shape once, whatever its loss and samples."""
    made = PRESETS[name]()
    for claim in made.claims:
        assert set(claim.arms) <= made.arms.keys()
    distinct: dict[str, tuple[str, Study]] = {}
    for arm, one in studies(made).items():
        assert json.loads(json.dumps(one.settings)) == dict(one.settings)
        shapes = {k: v for k, v in one.settings.items() if k.startswith(("expert", "rival", "world", "method"))}
        distinct.setdefault(json.dumps(shapes), (arm, one))
    sizes = {}
    for arm, one in distinct.values():
        assert one.count is not None
        counts = one.count()
        assert counts["trainable_parameters"] < counts["frozen_parameters"]
        assert counts["moment_bytes"] >= 8 * counts["trainable_parameters"]
        sizes[arm] = counts["trainable_parameters"]
    if "mola" in sizes:
        assert sizes["as_claimed"] < sizes["joint"]
        assert 0.75 < sizes["mola"] / sizes["joint"] < 1.35
        assert sizes["oracle"] == sizes["uniform"] == sizes["best_single"] == 0


def test_arms_are_those_that_are_named():
    made = losses(0.2)
    assert made["as_claimed"] == RouterLoss(0.2, 0.1, "as_claimed")
    assert made["as_printed"] == RouterLoss(0.2, 0.1, "as_printed")
    assert made["balance_only"] == RouterLoss(0.2, 0.0)
    assert (made["no_loss"].balance_weight, made["no_loss"].entropy_weight) == (0.0, 0.0)
    arms = studies(PRESETS["cpu"]())
    few, many = (arms[name].settings for name in ("as_claimed_256", "as_claimed"))
    few = {key: value for key, value in few.items() if value != many[key]}
    assert few == {"samples": 256}
    assert arms["joint"].settings["loss.proximal_weight"] == 0.01
    assert mean({"a": 0.5, "b": 1.0}) == 0.75


@pytest.mark.slow
def test_smoke_ends_in_a_table_and_a_figure(tmp_path):
    content = run_preset("lora-mixer", "smoke", tmp_path / "out", console=Console(quiet=True))
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000
    wanted = {"as_claimed", "as_printed", "balance_only", "no_loss", "as_claimed_256", "no_loss_256", "joint", "mola"}
    assert set(content["arms"]) == wanted | {"oracle", "uniform", "best_single"}
    assert all(claim["verdict"] for claim in content["claim"])
    for name in wanted - {"mola"}:
        arm = content["arms"][name]
        gap = arm["soft_accuracy"]["mean"] - arm["mean_accuracy"]["mean"]
        assert arm["soft_minus_topk"]["mean"] == pytest.approx(gap)
        assert 0 < arm["router_entropy"]["mean"] <= math.log(3) + 1e-6
