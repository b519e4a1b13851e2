"""The shared expert may overlap the all-to-alls: in the compiled program neither waits for the other.

The optimised HLO is read as a graph, called computations expanded at every call, so a fusion or a loop cannot hide a
path. The shared expert's products are known by a width nothing else has.
"""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe.config import MoEConfig
from moe.layer import DenseFFN, MoELayer
from moe.routing import make_router
from parallel.mesh import BATCH, make_mesh

B, S, D, SHARED = 8, 6, 8, 22
CONFIG = MoEConfig(num_experts=8, top_k=2, expert_dim=12, shared_dim=SHARED)
MESHES = {"1x1x8": (1, 1, 8), "2x1x4": (2, 1, 4)}


@dataclass(frozen=True)
class Op:
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    attributes: str


def parse(text):
    """HLO text -> {computation: instructions in order}, {computation: its root's name}, the entry's name."""
    computations, roots, entry = {}, {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif op := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)$", line):
            operands = (op[5],) if op[4] == "parameter" else tuple(names(op[5]))
            computations[name].append(Op(op[2], op[4], op[3], operands, op[6]))
            roots |= {name: op[2]} if op[1] else {}
    return computations, roots, entry


def names(text):
    return re.findall(r"%([\w.\-]+)", text)


CALLED = r"(?:calls|to_apply|body|condition|true_computation|false_computation)=(%[\w.\-]+)"
LISTED = r"branch_computations=\{([^}]*)\}"


class Graph:
    """Every instruction, once for each way it is called, and what it waits for."""

    def __init__(self, text):
        self.computations, self.roots, entry = parse(text)
        self.ops, self.parents = {}, {}
        self.root = (entry, self.roots[entry])
        self.expand(entry, (entry,), lambda number: [])

    def expand(self, computation, path, argument):
        """`argument(number)`: what a parameter waits for."""
        shapes = {op.name: op.shape for op in self.computations[computation]}
        for op in self.computations[computation]:
            node = (*path, op.name)
            if op.opcode == "parameter":
                self.ops[node], self.parents[node] = (op, ()), argument(int(op.operands[0]))
                continue
            operands = [(*path, name) for name in op.operands]
            called = [
                name for found in re.findall(f"{CALLED}|{LISTED}", op.attributes) for name in names(" ".join(found))
            ]
            results = [(*node, name, self.roots[name]) for name in called]
            if op.opcode in ("fusion", "call"):
                inner = lambda number, operands=operands: [operands[number]]  # noqa: E731
            else:  # a loop's state, a sort's keys, a branch's argument: any operand
                every = operands + results if op.opcode == "while" else operands
                inner = lambda number, every=every: every  # noqa: E731
            for name in called:
                self.expand(name, (*node, name), inner)
            before = re.search(r"control-predecessors=\{([^}]*)\}", op.attributes)
            waits = [(*path, name) for name in names(before[1] if before else "")]
            self.ops[node] = op, tuple(shapes[name] for name in op.operands)
            self.parents[node] = operands + results + waits

    def before(self, *nodes):
        """All that has to be done before `nodes`."""
        found, todo = set(), list(nodes)
        while todo:
            fresh = [p for p in self.parents[todo.pop()] if p not in found]
            found.update(fresh)
            todo.extend(fresh)
        return found

    def exchanges(self):
        return {n for n, (op, _) in self.ops.items() if re.fullmatch(r"(ragged-)?all-to-all(-start)?", op.opcode)}

    def shared(self):
        """Products with the shared expert's width, and with its gate of width 1."""
        found = set()
        for node, (op, operands) in self.ops.items():
            sizes = [tuple(map(int, re.findall(r"\d+", re.search(r"\[([\d,]*)\]", s)[1]))) for s in operands]
            if op.opcode == "dot" and any({SHARED, 2 * SHARED} & set(s) or s == (D, 1) for s in sizes):
                found.add(node)
        return found


def compiled(mesh_name, output, *modules):
    """The graph of `output(x, *applied)`, with one `params -> layer` function for each module."""
    mesh = make_mesh(*MESHES[mesh_name])
    x, ids = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32), jnp.zeros((B, S), jnp.int32)
    state = make_router(CONFIG).init_state()
    rest = [(ids >= 0, ids, state, None) if isinstance(m, MoELayer) else () for m in modules]
    shapes = [jax.eval_shape(m.init, jax.random.key(0), x, *r) for m, r in zip(modules, rest)]
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), shapes)  # nothing is run

    def forward(params, x):
        calls = [
            lambda x, m=m, p=p, r=r: m.apply(p, x, *r)[0] if r else m.apply(p, x)
            for m, p, r in zip(modules, params, rest)
        ]
        return output(x, *calls)

    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, BATCH))
        return Graph(jax.jit(forward).lower(params, x).compile().as_text())


def waiting(graph):
    """(shared products that wait for an all-to-all, all-to-alls that wait for a shared product)."""
    shared, exchanges = graph.shared(), graph.exchanges()
    late = {n for n in shared if graph.before(n) & exchanges}
    return late, {n for n in exchanges if graph.before(n) & shared}


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_shared_expert_and_all_to_alls_do_not_wait_for_each_other(mesh, gate):
    graph = compiled(mesh, lambda x, layer: layer(x), MoELayer(replace(CONFIG, shared_gate=gate), 0.5, 0.5))
    assert len(graph.exchanges()) == 2
    assert len(graph.shared()) == 2 + gate
    assert waiting(graph) == (set(), set())
    assert graph.before(graph.root) >= graph.exchanges() | graph.shared(), "the sum joins both"
    first, second = sorted(graph.exchanges(), key=lambda n: len(graph.before(n)))
    assert first in graph.before(second), "a path through the experts' loops is seen"


@pytest.mark.parametrize("mesh", MESHES)
def test_a_shared_expert_on_the_routed_output_is_found_to_wait(mesh):
    routed, shared = MoELayer(replace(CONFIG, shared_dim=0), 0.5, 0.5), DenseFFN(SHARED, 0.5, 0.5)
    graph = compiled(mesh, lambda x, moe, ffn: (lambda y: y + ffn(y)[0])(moe(x)), routed, shared)
    assert waiting(graph) == (graph.shared(), set())
    assert len(graph.shared()) == 2


@pytest.mark.parametrize("mesh", MESHES)
def test_all_to_alls_of_the_shared_output_are_found_to_wait(mesh):
    routed, shared = MoELayer(replace(CONFIG, shared_dim=0), 0.5, 0.5), DenseFFN(SHARED, 0.5, 0.5)
    graph = compiled(mesh, lambda x, moe, ffn: moe(x + ffn(x)[0]), routed, shared)
    assert waiting(graph) == (set(), graph.exchanges())
    assert len(graph.exchanges()) == 2
