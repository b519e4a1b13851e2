"""Softmax cross-entropy of a linear head without the T x V logits.

Legend: T tokens, d hidden width, V vocabulary, C tokens of one chunk.

    loss = sum_t weights[t] (log sum_v exp(h_t . e_v) - h_t . e_{targets[t]})

The gradient of a chunk needs its logits alone, so a differentiated call computes d hidden and d head in the forward,
while the chunk's logits are in cache, and the backward only multiplies by the cotangent: three products per token
in all, as many as the naive loss, and C x V live logits. (Chunked, fused loss: Cut Cross-Entropy, arXiv 2411.09009,
and Liger, arXiv 2410.10989, where the gradient is likewise made in the forward.)

Weights that depend on the losses themselves are not known then: `token_nll` gives the losses [T], and its backward
makes each chunk's logits again, once the cotangent is there: four products per token, C x V live logits as well.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels.checks import require, require_integer, require_shape
from kernels.products import dot_lt, dot_rt, wide

_LIVE_LOGITS = 1 << 20
_MIN_CHUNK = 128


def automatic_chunk_size(num_tokens: int, vocab_size: int) -> int:
    """Tokens of one chunk: about 2**20 live logits, but never under 128 rows (each chunk reads the head once)."""
    return max(1, min(num_tokens, max(_MIN_CHUNK, _LIVE_LOGITS // vocab_size)))


def _chunks(array: Array, chunk_size: int) -> Array:
    """[T, ...] -> [ceil(T / C), C, ...], zero-padded."""
    num_chunks = -(-array.shape[0] // chunk_size)
    pad = num_chunks * chunk_size - array.shape[0]
    padded = jnp.pad(array, ((0, pad),) + ((0, 0),) * (array.ndim - 1))
    return padded.reshape(num_chunks, chunk_size, *array.shape[1:])


def _logits(hidden_Cd: Array, head_Vd: Array) -> Array:
    """[C, V], float32 or wider whatever the inputs."""
    return dot_rt(hidden_Cd, head_Vd, accumulate=True)


def _nll(logits_CV: Array, target_C: Array) -> tuple[Array, Array, Array]:
    """Negative log-likelihood [C], exp(logits - max) [C, V] and its row sums [C]."""
    shifted = logits_CV - jnp.max(logits_CV, axis=1, keepdims=True)
    exp = jnp.exp(shifted)
    total = jnp.sum(exp, axis=1)
    target = jnp.take_along_axis(shifted, target_C[:, None], axis=1)[:, 0]
    return jnp.log(total) - target, exp, total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(chunk_size: int, hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    nll = _all_nll(chunk_size, hidden, head, targets)
    return jnp.sum(nll * weights.astype(nll.dtype))


def _cross_entropy_fwd(chunk_size: int, hidden: Array, head: Array, targets: Array, weights: Array):
    cast_head = head.astype(hidden.dtype)
    accumulate = wide(hidden.dtype)

    def body(carry: tuple[Array, Array], chunk: tuple[Array, Array, Array]):
        loss, dhead = carry
        h, target, weight = chunk
        weight = weight.astype(accumulate)
        nll, exp, total = _nll(_logits(h, cast_head), target)
        # Minus the one-hot, as a comparison: it fuses, where a scatter would copy the chunk.
        hit = target[:, None] == jnp.arange(head.shape[0], dtype=target.dtype)[None, :]
        dlogits = exp * (weight / total)[:, None] - jnp.where(hit, weight[:, None], jnp.zeros((), accumulate))
        dlogits = dlogits.astype(h.dtype)
        dhidden = dlogits @ cast_head
        dhead = dhead + dot_lt(dlogits, h)
        return (loss + jnp.sum(nll * weight), dhead), dhidden

    chunks = jax.tree.map(lambda a: _chunks(a, chunk_size), (hidden, targets, weights))
    start = (jnp.zeros((), accumulate), jnp.zeros(head.shape, accumulate))
    (loss, dhead), dhidden = lax.scan(body, start, chunks)
    dhidden = dhidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    return loss, (dhidden, dhead.astype(head.dtype))


def _cross_entropy_bwd(chunk_size: int, residuals: tuple[Array, Array], g: Array):
    dhidden, dhead = residuals
    return (g * dhidden).astype(dhidden.dtype), (g * dhead).astype(dhead.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _all_nll(chunk_size: int, hidden: Array, head: Array, targets: Array) -> Array:
    cast_head = head.astype(hidden.dtype)

    def body(carry: None, chunk: tuple[Array, Array]):
        h, target = chunk
        return carry, _nll(_logits(h, cast_head), target)[0]

    _, nll = lax.scan(body, None, (_chunks(hidden, chunk_size), _chunks(targets, chunk_size)))
    return nll.reshape(-1)[: hidden.shape[0]]


_token_nll = jax.custom_vjp(_all_nll, nondiff_argnums=(0,))


def _token_nll_fwd(chunk_size: int, hidden: Array, head: Array, targets: Array):
    return _all_nll(chunk_size, hidden, head, targets), (hidden, head, targets)


def _token_nll_bwd(chunk_size: int, residuals: tuple[Array, Array, Array], g: Array):
    """The gradient of sum_t g[t] nll[t] is the one `cross_entropy` makes in its forward."""
    dhidden, dhead = _cross_entropy_fwd(chunk_size, *residuals, g)[1]
    return dhidden, dhead, None


_token_nll.defvjp(_token_nll_fwd, _token_nll_bwd)


def cross_entropy(
    hidden: Array, head: Array, targets: Array, weights: Array, *, chunk_size: int | None = None
) -> Array:
    """sum_t weights[t] nll[t]; differentiable in hidden and head, not in targets or weights.

    Under a mesh call it inside `jax.shard_map` with local tokens (and sum the result over the mesh): chunks cut T.

    Args:
      hidden: [T, d]; products run in its dtype, logits, softmax, loss and the head's gradient in float32.
      head: [V, d], rows of the output head (a tied embedding as it is).
      targets: [T] int, 0 <= target < V (data: not checked). weights: [T] float.
      chunk_size: C; None bounds the live logits to 2**20, with at least 128 tokens.

    Returns:
      float32 scalar.

    Raises:
      ValueError: shapes or dtypes that do not fit, chunk_size below 1.
    """
    _check(hidden, head, targets, chunk_size)
    require_shape("weights", weights, targets.shape, f"[T = {targets.shape[0]}]")
    size = chunk_size or automatic_chunk_size(hidden.shape[0], head.shape[0])
    return _cross_entropy(size, hidden, head, targets, lax.stop_gradient(weights))


def token_nll(hidden: Array, head: Array, targets: Array, *, chunk_size: int | None = None) -> Array:
    """[T] float32 negative log-likelihoods, differentiable in hidden and head: for evaluation, and for losses that are
    weighted by what they turn out to be. Arguments and errors as in `cross_entropy`."""
    _check(hidden, head, targets, chunk_size)
    size = chunk_size or automatic_chunk_size(hidden.shape[0], head.shape[0])
    return _token_nll(size, hidden, head, targets)


def _check(hidden: Array, head: Array, targets: Array, chunk_size: int | None) -> None:
    require_shape("hidden", hidden, (None, None), "[T, d]")
    require(hidden.shape[0] >= 1, "hidden.shape[0]", hidden.shape[0], "at least one token")
    require_shape("head", head, (None, hidden.shape[1]), f"[V, d = {hidden.shape[1]}]")
    require_shape("targets", targets, (hidden.shape[0],), f"[T = {hidden.shape[0]}]")
    require_integer("targets", targets)
    require(chunk_size is None or chunk_size >= 1, "chunk_size", chunk_size, "None (automatic) or at least 1")
