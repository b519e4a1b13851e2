"""Where parameters live: a list of (pattern, spec), first match wins, with the reasoning beside it.

Patterns match the end of a leaf's path, `/`-joined. Stacked layers have a leading [L] that is never sharded (the scan
slices it). Optimiser moments have the parameter's path inside theirs and so get the same spec.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RULES: tuple[tuple[str, P], ...] = (
    # Routed experts [E, d, 2f] and [E, f, d]: different experts on different devices of `expert`; within an expert the
    # contraction-free hidden axis over `fsdp`, gathered just before use.
    (r"experts/gate_up$", P("expert", "fsdp", None)),
    (r"experts/down$", P("expert", None, "fsdp")),
    (r"experts/(gate_up|down)_bias$", P("expert", None)),
    # The router [d, E] is small and every device needs all of it: replicated.
    (r"router$", P()),
    # Dense weights: one axis over `fsdp` *and* `expert` (the devices of an expert group hold equal dense layers, so
    # they share them too). The vocabulary axis of the embedding and head, the hidden axis of the others.
    (r"embedding$|head$", P(("fsdp", "expert"), None)),
    (r"w[qkv]$", P(("fsdp", "expert"), None, None)),
    (r"wo$", P(None, None, ("fsdp", "expert"))),
    # Latent attention: down [d, r] by the hidden axis, up [r, H, D] by heads.
    (r"w(q|kv)_down$", P(("fsdp", "expert"), None)),
    (r"w[qkv]_up$", P(None, ("fsdp", "expert"), None)),
    (r"ffn/gate_up$", P(("fsdp", "expert"), None)),
    (r"ffn/down$", P(None, ("fsdp", "expert"))),
    # Norm scales, counters, keys, everything else: replicated.
    (r".*", P()),
)


def path_name(path: tuple[Any, ...]) -> str:
    """`/`-joined names of a key path: dict keys, attributes and tuple positions."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Pads a spec for leading stacked axes; leaves out axes that do not divide their dimension."""
    axes = list(spec)
    if len(axes) > len(shape):  # factored or scalar optimiser state under a parameter's name
        return P()
    entries: list[Any] = [None] * (len(shape) - len(axes)) + axes
    for i, names in enumerate(entries):
        group = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        size = 1
        for name in group:
            size *= mesh.shape[name]
        if shape[i] % size:
            entries[i] = None
    return P(*entries)


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one leaf by its path name and shape."""
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return _fit(spec, shape, mesh)
    raise AssertionError("the last rule matches everything")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding for every leaf (arrays or ShapeDtypeStructs) of a pytree, by the rules above."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh)), tree
    )
