"""Search for layer paths that answer a question: where the labels of depth routers come from.

Three searches over edited paths (`moe.depth.paths.edits`), none of which knows a model. Each is a generator that yields
paths and is sent their rewards, so that many questions are searched in step and evaluated as one batch; `search` and
`search_all` run them. A reward in [0, 1] compares an answer with the gold answer: search at training time, never at
test time, and hold questions out before it.

    score = Q / v + c sqrt(ln V / v) - lambda |path| / L          (Dr.LLM, 2510.12773, Algorithm 1)

with a child's rewards Q and visits v, its parent's visits V. Q gets no length term.

Legend: L layers.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from moe.config import require
from moe.depth.paths import Path, edits, full_path, neighbourhood

Evaluate = Callable[[Sequence[Path]], Sequence[float]]
EvaluateAll = Callable[[Sequence[tuple[int, Path]]], Sequence[float]]


@dataclass(eq=False)
class Node:
    """A path in a search tree. `own` counts its evaluations: visits = own + the sum of its children's visits."""

    path: Path
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    rewards: float = 0.0
    own: int = 0
    untried: list[Path] | None = None  # None until it is looked at
    exhausted: bool = False  # nothing below is left to try

    def backpropagate(self, reward: float) -> None:
        self.own += 1
        node: Node | None = self
        while node is not None:
            node.visits += 1
            node.rewards += reward
            node = node.parent


@dataclass(frozen=True)
class SearchResult:
    """What a search of one question found.

    Attributes:
      rewards: of every path that was evaluated, in that order; the full path is the first.
      best: the shortest correct path, the first of them, or None.
      root: of the tree, where there was one.
    """

    rewards: dict[Path, float]
    best: Path | None
    root: Node | None = None

    @property
    def default_correct(self) -> bool:
        return correct(next(iter(self.rewards.values())))


Search = Generator[list[Path], list[float], SearchResult]


def correct(reward: float) -> bool:
    """The released code's test of a reward."""
    return reward > 0.5


def result(rewards: dict[Path, float], root: Node | None = None) -> SearchResult:
    right = [path for path, reward in rewards.items() if correct(reward)]
    return SearchResult(rewards, min(right, key=len, default=None), root)


# --- the searches ---


def exhaustive(num_layers: int, max_edits: int) -> Search:
    """Every path at most `max_edits` actions away, in one batch. The reference."""
    paths = list(neighbourhood(num_layers, max_edits))
    rewards = yield paths
    return result(dict(zip(paths, rewards, strict=True)))


def uct(
    num_layers: int,
    *,
    budget: int = 50,
    seed: int = 0,
    exploration: float = 1.8,
    length_weight: float = 3.0,
    random_child: float = 0.1,
    widening: float = 0.5,
    max_edits: int | None = None,
    stop_at_first: bool = True,
) -> Search:
    """The paper's tree search, with scores that matter: nodes get several children.

    The paper does not say when a node gets another child. The textbook's rule (every action first) would spend all of
    its budget below the root, which has 3L - 1 actions; here a node of v visits has up to v^widening children
    (progressive widening, Coulom 2007), rounded up. A path is in the tree once, under whom made it first, so every
    simulation evaluates a new one, and a budget as large as the space sees all of it.

    Args:
      budget: N_s, paths evaluated beside the full one.
      seed: of the draws: untried actions, and random children.
      exploration, length_weight: c and lambda of the score; ties go to the elder child.
      random_child: probability of a random child in place of the best one.
      max_edits: paths further than this from the full one are not tried; None tries any.
      stop_at_first: end at the first correct path where the full one is wrong, as the paper does. Where the full one is
        correct, all of the budget looks for shorter ones.
    """
    require(budget >= 0, "budget", budget, "0 or more paths")
    require(0.0 < widening <= 1.0, "widening", widening, "above 0, at most 1")
    require(0.0 <= random_child <= 1.0, "random_child", random_child, "a probability")
    rng = random.Random(seed)
    space = None if max_edits is None else _space(num_layers, max_edits)
    root = Node(full_path(num_layers))
    rewards: dict[Path, float] = {}
    node = root
    while True:
        (reward,) = yield [node.path]
        rewards[node.path] = reward
        node.backpropagate(reward)
        if stop_at_first and node is not root and correct(reward) and not correct(rewards[root.path]):
            break
        if len(rewards) > budget:
            break
        grown = None
        while grown is None and not root.exhausted:
            leaf = _descend(root, rng, exploration, length_weight / num_layers, random_child, widening)
            grown = _expand(leaf, rng, rewards, space)
        if grown is None:
            break
        node = grown
    return result(rewards, root)


@functools.lru_cache(maxsize=4)
def _space(num_layers: int, max_edits: int) -> frozenset[Path]:
    """What all questions of a search may try; 98,145 paths for 30 layers and 3 edits."""
    return frozenset(neighbourhood(num_layers, max_edits))


def _descend(root: Node, rng: random.Random, c: float, per_layer: float, random_child: float, widening: float) -> Node:
    """The node that gets the next child: the first on the way down that has room, or that has nobody to go on to."""
    node = root
    while True:
        open_children = [child for child in node.children if not child.exhausted]
        room = node.untried != [] and len(node.children) < math.ceil(node.visits**widening)
        if room or not open_children:
            return node
        if rng.random() < random_child:
            node = rng.choice(open_children)
        else:
            node = max(open_children, key=lambda child: score(child, c, per_layer))


def score(child: Node, exploration: float, per_layer: float) -> float:
    """UCB of a child with `per_layer` = lambda / L."""
    assert child.parent is not None
    bonus = exploration * math.sqrt(math.log(child.parent.visits) / child.visits)
    return child.rewards / child.visits + bonus - per_layer * len(child.path)


def _expand(node: Node, rng: random.Random, seen: dict[Path, float], space: frozenset[Path] | None) -> Node | None:
    """A new child by an action not tried yet; None, and the node noted as exhausted where it is, without one."""
    if node.untried is None:
        node.untried = [path for path in edits(node.path) if space is None or path in space]
        rng.shuffle(node.untried)
    while node.untried:
        path = node.untried.pop()
        if path not in seen:
            node.children.append(Node(path, node))
            return node.children[-1]
    above: Node | None = node
    while above is not None and above.untried == [] and all(child.exhausted for child in above.children):
        above.exhausted = True
        above = above.parent
    return None


def released_chain(num_layers: int, *, budget: int = 200, seed: int = 0) -> Search:
    """What the released code of Dr.LLM runs in place of a tree search.

    It descends to a leaf and expands leaves alone, so every node gets one child, no score is ever compared, and the
    search is a random walk of edits, each drawn from all of the path: one or two neighbours left out, a block repeated
    once more (any number of times in all), or repeated no time, which changes nothing. It ends at the budget, at a
    correct path where the full one is wrong, or at a correct path at least two blocks shorter.

    Args:
      budget: simulations; those on paths that were seen cost no evaluation.
    """
    require(budget >= 1, "budget", budget, "at least 1")
    rng = random.Random(seed)
    root = node = Node(full_path(num_layers))
    rewards: dict[Path, float] = {}
    for _ in range(budget):
        if node.visits:
            choices = _released_actions(node.path, num_layers)
            if choices:  # an empty path is evaluated over and over
                node.children.append(Node(rng.choice(choices), node))
                node = node.children[0]
        if node.path not in rewards:
            (rewards[node.path],) = yield [node.path]
        reward = rewards[node.path]
        node.backpropagate(reward)
        shorter = correct(reward) and len(node.path) + 2 <= num_layers
        if reward > rewards[root.path] or shorter:
            break
    return result(rewards, root)


def _released_actions(path: Path, num_layers: int) -> list[Path]:
    """The paths of all actions, an action a place: repeats by 0 are the path itself."""
    skips = [path[:i] + path[i + size :] for size in (1, 2) for i in range(len(path) - size + 1)]
    repeats = [path[: i + 1] + path[i:] for i in range(len(path)) if len(path) < 2 * num_layers]
    return skips + [path] * len(path) + repeats


# --- running them ---


def search(steps: Search, evaluate: Evaluate) -> SearchResult:
    """Runs one search; `evaluate` is asked for each path once.

    Raises:
      ValueError: no evaluation, or rewards that are none.
    """
    require(callable(evaluate), "evaluate", evaluate, "a function that compares answers with gold answers")
    return search_all([steps], lambda asked: evaluate([path for _, path in asked]))[0]


def search_all(searches: Sequence[Search], evaluate: EvaluateAll) -> list[SearchResult]:
    """Runs the searches of many questions in step, each round's paths as one batch.

    Args:
      searches: one for each question.
      evaluate: rewards of (question, path) pairs, 1 for the gold answer and 0 for another.

    Raises:
      ValueError: no evaluation; another number of rewards than of paths; a reward outside of [0, 1], as of a question
        without a gold answer.
    """
    require(callable(evaluate), "evaluate", evaluate, "a function that compares answers with gold answers")
    results: dict[int, SearchResult] = {}
    asked = {i: next(steps) for i, steps in enumerate(searches)}
    while asked:
        pairs = [(i, path) for i, paths in asked.items() for path in paths]
        rewards = list(evaluate(pairs))
        require(len(rewards) == len(pairs), "rewards", len(rewards), f"one for each of {len(pairs)} paths")
        for (i, path), reward in zip(pairs, rewards):
            known = reward is not None and 0.0 <= reward <= 1.0
            require(known, f"reward of question {i}, path {path}", reward, "0 to 1; search needs gold answers")
        given = iter(map(float, rewards))
        following = {}
        for i, paths in asked.items():
            try:
                following[i] = searches[i].send([next(given) for _ in paths])
            except StopIteration as stop:
                results[i] = stop.value
        asked = following
    return [results[i] for i in range(len(searches))]
