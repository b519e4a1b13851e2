"""Pooling and routing against loops over tokens; padding has no say; files keep what was trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.depth.router import (
    DepthConfig,
    LayerRouter,
    init_routers,
    load_routers,
    route,
    save_routers,
    stacked_logits,
    window_pool,
)

D, L = 6, 3
CONFIG = DepthConfig(hidden=5, num_windows=4)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def windows_of(prompt, num_windows):
    """The means [W, d] of one prompt [T, d], by the definition."""
    count = min(num_windows, len(prompt))
    size = len(prompt) // count
    return np.stack([prompt[i * size : (i + 1) * size].astype(np.float64).mean(0) for i in range(count)])


def random_routers(seed=0):
    """Biases too."""
    shapes = jax.eval_shape(lambda key: init_routers(CONFIG, D, L, key), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)


def one_router(routers, layer):
    return jax.tree.map(lambda leaf: leaf[layer], routers)


def logits_by_hand(router, prompt):
    router = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), router)
    windows = windows_of(prompt, CONFIG.num_windows)
    x = windows @ router["inner"]["kernel"] + router["inner"]["bias"]
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return (x @ router["outer"]["kernel"] + router["outer"]["bias"]).mean(0)


@pytest.mark.parametrize("left", [False, True])
def test_pooling_of_every_length(left):
    """Fewer tokens than windows, a multiple of the windows, and lengths with a remainder to drop; either padding."""
    lengths = np.array([1, 3, 4, 7, 8, 11])
    h = draw(len(lengths), 11, D)
    offsets = np.arange(11)[None]
    mask = offsets >= 11 - lengths[:, None] if left else offsets < lengths[:, None]
    pooled, valid = window_pool(jnp.asarray(h), jnp.asarray(mask), 4)
    assert pooled.shape == (6, 4, D)
    for row, length in enumerate(lengths):
        want = windows_of(h[row][mask[row]], 4)
        assert valid[row].sum() == len(want) == min(4, length)
        np.testing.assert_allclose(pooled[row, : len(want)], want, atol=1e-6)
        np.testing.assert_array_equal(pooled[row, len(want) :], 0.0)


def test_logits_are_the_mean_of_the_windows_logits():
    routers, lengths = random_routers(), np.array([2, 9, 5])
    h = draw(3, 9, D)
    mask = jnp.asarray(np.arange(9)[None] < lengths[:, None])
    for layer in range(L):
        router = one_router(routers, layer)
        got = route(CONFIG, router, jnp.asarray(h), mask)
        want = [logits_by_hand(router, h[row, :length]) for row, length in enumerate(lengths)]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_all_layers_at_once_are_each_layer_alone():
    routers, mask = random_routers(), jnp.ones((2, 7), bool)
    entering = draw(L, 2, 7, D)
    pools = [window_pool(jnp.asarray(h), mask, CONFIG.num_windows) for h in entering]
    got = stacked_logits(CONFIG, routers, jnp.stack([pooled for pooled, _ in pools], axis=1), pools[0][1])
    want = [route(CONFIG, one_router(routers, i), jnp.asarray(entering[i]), mask) for i in range(L)]
    np.testing.assert_allclose(got, np.stack(want, axis=1), atol=1e-5)


def test_padding_content_cannot_change_a_decision():
    routers, h = random_routers(), draw(2, 8, D)
    mask = np.arange(8)[None] < np.array([[5], [3]])
    other = np.where(mask[:, :, None], h, np.where(np.arange(D) % 2, np.nan, 1e30)[None, None]).astype(np.float32)
    read = jax.jit(lambda h: route(CONFIG, one_router(routers, 0), h, jnp.asarray(mask)))
    np.testing.assert_array_equal(read(h), read(other))


def test_initial_parameters():
    routers = init_routers(DepthConfig(), 300, 4, jax.random.key(1))
    count = sum(leaf.size for leaf in jax.tree.leaves(routers))
    assert count == 4 * (128 * 300 + 128 + 128 * 3 + 3)  # L (128 d + 515)
    bound = np.sqrt(6 / (300 + 128))
    inner = np.asarray(routers["inner"]["kernel"])
    assert 0.99 * bound < np.abs(inner).max() <= bound
    np.testing.assert_allclose(inner.std(), bound / np.sqrt(3), rtol=0.02)  # uniform
    assert not np.array_equal(inner[0], inner[1])
    for name in ("inner", "outer"):
        assert not np.asarray(routers[name]["bias"]).any()


def test_files_keep_parameters_and_config(tmp_path):
    config, routers = DepthConfig(5, 4, "embedding"), random_routers()
    save_routers(tmp_path / "routers", config, routers)
    read_config, read = load_routers(tmp_path / "routers", hidden=D, num_layers=L, num_windows=4)
    assert read_config == config
    jax.tree.map(np.testing.assert_array_equal, read, routers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_windows": 8}, "num_windows = 8: expected 4, as the routers were trained"),
        ({"hidden": D + 1}, "routers = "),
        ({"num_layers": L + 1}, "routers = "),
    ],
)
def test_routers_of_another_kind_are_refused(tmp_path, options, message):
    save_routers(tmp_path, CONFIG, random_routers())
    with pytest.raises(ValueError, match=message):
        load_routers(tmp_path, **({"hidden": D, "num_layers": L} | options))


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"depth_config\.json"):
        load_routers(tmp_path, hidden=D, num_layers=L)
    save_routers(tmp_path, CONFIG, random_routers())
    (tmp_path / "depth_config.json").write_text(json.dumps({"hidden": 5}))
    with pytest.raises(ValueError, match="an object with hidden, num_windows, reads"):
        load_routers(tmp_path, hidden=D, num_layers=L)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_windows": 0}, "num_windows = 0"), ({"hidden": 0}, "hidden = 0"), ({"reads": "logits"}, "reads = 'logits'")],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        DepthConfig(**options)


def test_no_windows_are_refused():
    with pytest.raises(ValueError, match="num_windows = 0"):
        window_pool(jnp.zeros((1, 2, D)), jnp.ones((1, 2), bool), 0)


def test_module_applies_to_any_leading_shape():
    router, x = one_router(random_routers(), 1), jnp.asarray(draw(2, 3, D))
    apply = lambda x: LayerRouter(CONFIG).apply({"params": router}, x)  # noqa: E731
    np.testing.assert_allclose(apply(x)[1, 2], apply(x[1, 2]), atol=1e-5)
