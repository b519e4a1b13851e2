"""The Pallas product, interpreted, against the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import grouped_matmul
from kernels.grouped_pallas import grouped_matmul_pallas

SIZES = {
    "ragged": [7, 0, 20, 1, 15], "one takes all": [0, 0, 50, 0, 0], "nothing": [0, 0, 0, 0, 0],
    "whole tiles": [16, 16, 0, 16, 0], "some rows in none": [3, 4, 5, 0, 6],
}  # fmt: skip


def problem(rows=50, inner=12, columns=32, groups=5):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((rows, inner), (groups, inner, columns)))


@pytest.mark.parametrize("load", SIZES)
@pytest.mark.parametrize("tile", [(16, 16), (8, 32)])
def test_equal_to_the_oracle(load, tile):
    x, w = problem()
    sizes = jnp.array(SIZES[load], jnp.int32)
    options = {"rows_of_tile": tile[0], "columns_of_tile": tile[1], "interpret": True}
    got = grouped_matmul_pallas(x, w, sizes, **options)
    np.testing.assert_allclose(got, grouped_matmul(x, w, sizes, implementation="reference"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    ({"group_sizes": jnp.ones(5)}, "group_sizes.dtype = 'float32': expected an integer type"),
    ({"group_sizes": jnp.ones(4, jnp.int32)}, r"group_sizes.shape = \(4,\): expected \[E = 5\]"),
    ({"columns_of_tile": 24}, r"w.shape\[2\] = 32: expected a multiple of columns_of_tile = 24"),
])  # fmt: skip
def test_bad_input_is_named(change, message):
    x, w = problem()
    options = {"group_sizes": jnp.zeros(5, jnp.int32), "columns_of_tile": 16} | change
    with pytest.raises(ValueError, match=message):
        grouped_matmul_pallas(x, w, options.pop("group_sizes"), **options)
