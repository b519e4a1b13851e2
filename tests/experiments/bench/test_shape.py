import pytest

from experiments.bench.shape import StepShape


def test_active_parameters_and_flops_of_the_published_shape() -> None:
    shape = StepShape()
    attention, router, experts, head = 4 * 256 * 256, 256 * 16, 2 * 3 * 256 * 256, 256 * 1024
    assert shape.active_parameters == 4 * (attention + router + experts) + head == 2_899_968
    assert shape.tokens == 4096
    assert shape.flops == 6 * 2_899_968 * 4096


def test_parts_add_up_to_the_step_and_its_attention_products() -> None:
    shape = StepShape(hidden=8, layers=3, heads=2, head_dim=6, experts=4, expert_dim=5, vocab=11, batch=2, seq=7)
    parts = shape.part_flops()
    assert sum(parts.values()) - parts["attention products"] == shape.flops
    # Two products forward and four backward of 2 D FLOPs for every pair a causal mask keeps.
    pairs = sum(range(1, 8)) * 2 * 2
    assert parts["attention products"] == 3 * pairs * 6 * 2 * 6


def test_the_timed_run_has_the_shape() -> None:
    shape = StepShape(batch=3, seq=5)
    config = shape.run_config()
    assert config.model.moe is not None
    assert (config.model.hidden, config.model.num_layers, config.model.vocab_size) == (256, 4, 1024)
    assert (config.model.moe.num_experts, config.model.moe.top_k, config.model.moe.expert_dim) == (16, 2, 256)
    assert (config.batch_size, config.data.seq_len, config.accumulation) == (3, 5, 1)
    assert set(config.model.layer_kinds) == {"moe"}


def test_json_round_trip() -> None:
    shape = StepShape(hidden=8, seq=3)
    assert StepShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize(("field", "value"), [("hidden", 0), ("seq", 2.5), ("top_k", 17)])
def test_bad_shapes_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"shape\.{field} = {value}"):
        StepShape(**{field: value})  # type: ignore[arg-type]
