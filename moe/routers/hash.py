"""Hash layers: a fixed table from token id to experts, the control every learned choice must beat.

    I_t = table[token_t],   w = sigmoid(z_I)  (k = 1),   softmax(z_I)  (k > 1),   1 / k  (gated=False)       z = x W_r

The paper (2106.04426) has k = 1 and no gate: `gated=False`. Its several hashes (MultiHash) pick segments of one layer's
weights; here a token's k entries are k distinct whole experts. Tables, by numpy from `seed`, the same in every layer:

    random    a uniform k-subset of the experts for each id, independently
    balanced  every expert has V k / E ids, to within 1. Ids are shuffled and cut into blocks of E; a block has its own
              order of the experts and k own distinct shifts of it. (The paper balances training frequencies instead.)

Padding (-1) gets id 0's experts, to be dropped; an id beyond the vocabulary those of the last. The choice ignores z, so
a balance loss can only move the gate: use scope `none`. Legend: T tokens, E experts, k active, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe.config import require
from moe.routing import RouterOutput, at_least_float32, token_choice

Table = Literal["random", "balanced"]


@lru_cache(maxsize=8)
def hash_table(vocab_size: int, num_experts: int, top_k: int, table: Table, seed: int) -> np.ndarray:
    """[V, k] int32, distinct within a row; see the module."""
    rng = np.random.default_rng(seed)
    experts = random_subsets(rng, vocab_size, num_experts, top_k)
    if table == "balanced":
        blocks, rest = -(-vocab_size // num_experts), vocab_size % num_experts
        row = np.arange(num_experts)[None, :, None]
        shifts = random_subsets(rng, blocks, num_experts, top_k)[:, None]
        places = (row + shifts) % num_experts
        if rest:  # of the last block only `rest` rows stay: round robin keeps them balanced too
            places[-1] = (row[0] * top_k + np.arange(top_k)) % num_experts
        orders = rng.permuted(np.tile(np.arange(num_experts), (blocks, 1)), axis=1)
        experts = np.take_along_axis(orders[:, :, None], places.reshape(blocks, -1, 1), axis=1)
        experts = experts.reshape(-1, top_k)[rng.permutation(vocab_size)]
    experts = experts.astype(np.int32)
    experts.setflags(write=False)
    return experts


def random_subsets(rng: np.random.Generator, rows: int, num_experts: int, k: int) -> np.ndarray:
    """[rows, k]: a uniform k-subset of the experts per row (Floyd's algorithm, all rows at once)."""
    chosen = np.empty((rows, k), np.int64)
    for j in range(k):
        last = num_experts - k + j
        draw = rng.integers(0, last + 1, rows)
        taken = np.any(chosen[:, :j] == draw[:, None], axis=1)
        chosen[:, j] = np.where(taken, last, draw)
    return chosen


@dataclass(frozen=True)
class Hash:
    """See the module."""

    num_experts: int
    top_k: int
    vocab_size: int
    table: Table
    seed: int
    gated: bool

    def init_state(self) -> dict:
        return {}

    def __call__(
        self, x: Array, logits: Array, token_ids: Array, router_state: dict, key: Array | None
    ) -> tuple[RouterOutput, dict[str, Array]]:
        del x, router_state, key
        logits = at_least_float32(logits)
        table = hash_table(self.vocab_size, self.num_experts, self.top_k, self.table, self.seed)
        indices = jnp.take(jnp.asarray(table), token_ids, axis=0, mode="clip")
        chosen = jnp.take_along_axis(logits, indices, axis=-1)
        if not self.gated:
            weights = jnp.full_like(chosen, 1 / self.top_k)
        else:
            weights = jax.nn.sigmoid(chosen) if self.top_k == 1 else jax.nn.softmax(chosen, axis=-1)
        return token_choice(jax.nn.softmax(logits, axis=-1), logits, indices, weights), {}


def make(
    num_experts: int, top_k: int, vocab_size: int = 0, table: Table = "balanced", seed: int = 0, gated: bool = True
) -> Hash:
    """Raises ValueError for sizes out of range (vocab_size has no default), a negative seed or an unknown table."""
    require(1 <= top_k <= num_experts, "moe.top_k", top_k, f"1 <= top_k <= num_experts = {num_experts}")
    require(vocab_size >= 1, "moe.router vocab_size", vocab_size, "the model's vocabulary size, at least 1")
    require(table in get_args(Table), "moe.router table", table, f"one of {', '.join(get_args(Table))}")
    require(seed >= 0, "moe.router seed", seed, "0 or a positive integer")
    return Hash(num_experts, top_k, vocab_size, table, seed, gated)
