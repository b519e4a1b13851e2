"""Loss-free balancing as a primal-dual method: the theory on given scores, without a network.

Paper:     Han, Zhong, A Theoretical Framework for Auxiliary-Loss-Free Load Balancing; arXiv 2512.03915. The rule it
           studies is Wang et al., arXiv 2408.15664, and DeepSeek-V3, arXiv 2412.19437.
Claim:     nudging a selection bias by loads is a dual step of an assignment problem: the Lagrangian falls under a
           condition, tokens only move to better liked experts, loads end within E - 1 of their target, and steps of
           size c/n have logarithmic regret where a constant step's regret grows linearly.
Command:   python -m experiments.alf_lb.theory (one seed, printed; the shared runner calls `study`)
Time:      see REPRODUCTIONS.md.
Result:    see REPRODUCTIONS.md.

NumPy, float64. T tokens, E experts, k active; scores gamma [T, E], bias p [E], selection x [T, E] bool,
loads A_e = sum_t x_te [E], target L = kT/E. Provenance: [paper] is stated by the papers above; [reconstructed] was
derived for this project from summaries of them and proved or checked here: not to be cited as the paper's theorem.

Protocol, fixed beforehand: all rules of one seed see the same scores and batches and start at p = 0; constants are the
same for all seeds. `DECAY` = 1 is close to 1/mu of the expected dual function per token (T5), which is measured and
reported as `curvature`; also tried on two seeds: 0.25, 0.5, 2 and 4 for c/n, 0.25, 0.5 and 2 for c/sqrt(n), and 0.5 for
`proportional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, kron, vstack

from moe.config import require

Float = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int = NDArray[np.int64]

# The selection and its dual problem.


def check_scores(scores: Float, k: int) -> None:
    """ValueError unless `scores` is a finite [..., E] (NaN would hide in a top-k) and 1 <= k <= E."""
    require(scores.ndim >= 2, "scores.shape", scores.shape, "[T, E]")
    require(isinstance(k, int | np.integer) and 1 <= k <= scores.shape[-1], "k", k, f"1 <= k <= E = {scores.shape[-1]}")
    bad = scores.size - int(np.isfinite(scores).sum())
    require(bad == 0, "scores", f"{bad} of {scores.size} NaN or infinite", "finite scores")


def check_bias(bias: Float, num_experts: int) -> None:
    require(bias.shape == (num_experts,), "bias.shape", bias.shape, f"({num_experts},), one per expert")
    require(bool(np.isfinite(bias).all()), "bias", bias.tolist(), "finite biases")


def check_counts(counts: NDArray[Any], tokens: int, k: int) -> None:
    """ValueError unless the counts are whole and sum to kT: else tokens were lost or counted twice."""
    require(bool(np.all(counts == np.round(counts)) and np.all(counts >= 0)), "counts", counts.tolist(), "whole, >= 0")
    require(counts.sum() == k * tokens, "sum(counts)", counts.sum().item(), f"k * tokens = {k * tokens}")


def choose(biased: Float, k: int) -> tuple[Bool, Float]:
    """Top k of each row, ties to the lowest index: [..., E] -> (chosen [..., E], sum of the chosen [...])."""
    rest, chosen, total = biased.copy(), np.zeros(biased.shape, bool), np.zeros(biased.shape[:-1])
    for _ in range(k):
        best = rest.argmax(-1)[..., None]
        total += np.take_along_axis(biased, best, -1)[..., 0]
        np.put_along_axis(chosen, best, True, -1)
        np.put_along_axis(rest, best, -np.inf, -1)
    return chosen, total


def select(scores: Float, bias: Float, k: int) -> Bool:
    """x_te = 1 iff gamma_te + p_e is among the k largest of row t [paper]: -> [T, E], ties to the lowest index."""
    check_scores(scores, k)
    check_bias(bias, scores.shape[-1])
    return choose(scores + bias, k)[0]


def loads(x: Bool) -> Int:
    """A_e = sum_t x_te: [T, E] -> [E]."""
    return x.sum(axis=-2)


def target(tokens: int, num_experts: int, k: int) -> float:
    """L = kT/E, the load of an expert when all have the same."""
    return k * tokens / num_experts


def target_of(scores: Float, k: int) -> float:
    tokens, num_experts = scores.shape
    return target(tokens, num_experts, k)


def lagrangian(scores: Float, x: Bool, bias: Float, k: int) -> float:
    """Lag(x, p) = sum_te (gamma_te + p_e) x_te - L sum_e p_e for any x with k experts per token [paper]."""
    check_scores(scores, k)
    check_bias(bias, scores.shape[-1])
    return float(scores[x].sum() + bias @ (loads(x) - target_of(scores, k)))


def dual_value(scores: Float, bias: Float, k: int) -> float:
    """g(p) = sum_t topksum(gamma_t + p) - L sum_e p_e = max_x Lag(x, p) [reconstructed].

    Convex, piecewise linear, unchanged by p + constant; A(p) - L is a subgradient.
    """
    check_scores(scores, k)
    check_bias(bias, scores.shape[-1])
    return float(choose(scores + bias, k)[1].sum() - target_of(scores, k) * bias.sum())


def lp_optimum(scores: Float, k: int) -> tuple[float, Float]:
    """max sum gamma x over 0 <= x <= 1, sum_e x = k, sum_t x = L [paper], by HiGHS: -> (value, prices p [E]).

    The prices minimise `dual_value`, whose minimum is the value (T4). With L whole a solution is 0/1 [reconstructed].
    """
    check_scores(scores, k)
    tokens, experts = scores.shape
    per_token = kron(eye_array(tokens), np.ones((1, experts)))
    per_expert = kron(np.ones((1, tokens)), eye_array(experts))
    wanted = np.concatenate([np.full(tokens, float(k)), np.full(experts, target(tokens, experts, k))])
    found = linprog(
        -scores.ravel(), A_eq=csr_array(vstack([per_token, per_expert])), b_eq=wanted, bounds=(0, 1), method="highs"
    )
    require(found.status == 0, "linprog status", found.message, "an optimal solution")
    return -float(found.fun), np.asarray(found.eqlin.marginals[tokens:])


# The step rules. A rule maps (loads [E], L, n) to the change of p [E], n = 1, 2, ... being the number of the step.

Rule = Callable[[NDArray[Any], float, int], Float]


def share_error(counts: NDArray[Any], wanted: float) -> Float:
    """(L - A) / (kT) = 1/E - share of the assignments [E]; with k = 1 minus the subgradient of g per token.

    Rules that use it take scores' units per share: a step means the same for any number of tokens.
    """
    return (wanted - counts) / (wanted * len(counts))


def positive(name: str, value: float) -> None:
    require(bool(np.isfinite(value) and value > 0), name, value, "a finite number > 0")


def sign(u: float) -> Rule:
    """p_e += u * sign(L - A_e) with sign(0) = 0 [paper]: the dual step eps_e = u / |L - A_e|; u in units of scores."""
    positive("u", u)
    return lambda counts, wanted, n: u * np.sign(wanted - counts)


def proportional(u: float) -> Rule:
    """p += u * (L - A) / (kT), a gradient step of constant size [paper: a variant; its unit is reconstructed]."""
    positive("u", u)
    return lambda counts, wanted, n: u * share_error(counts, wanted)


def decreasing(c: float) -> Rule:
    """p += c/n * (L - A) / (kT): logarithmic regret where c is about 1/mu [paper: certain steps; reconstructed]."""
    positive("c", c)
    return lambda counts, wanted, n: c / n * share_error(counts, wanted)


def inverse_sqrt(c: float) -> Rule:
    """p += c/sqrt(n) * (L - A) / (kT): the step of online gradient descent without strong convexity [reconstructed]."""
    positive("c", c)
    return lambda counts, wanted, n: c / np.sqrt(n) * share_error(counts, wanted)


DECAY = 1.0
RULES: dict[str, Rule] = {
    "sign_1e-2": sign(1e-2),
    "sign_1e-3": sign(1e-3),
    "sign_1e-4": sign(1e-4),
    "proportional_0.1": proportional(0.1),
    "c_over_n": decreasing(DECAY),
    "c_over_sqrt_n": inverse_sqrt(DECAY),
}


def update(bias: Float, counts: NDArray[Any], rule: Rule, n: int, tokens: int, k: int) -> Float:
    """The bias after step n, from loads that are already past: [E] -> [E]."""
    check_counts(counts, tokens, k)
    return bias + rule(counts, target(tokens, len(bias), k), n)


# What a step does: T1 and T2.


def identity_terms(scores: Float, x: Bool, bias: Float, new_x: Bool, new_bias: Float, k: int) -> tuple[float, float]:
    """T1 [reconstructed]: Lag(x', p') - Lag(x, p) is the sum of these two, for any x, x' and p' = p + eps (L - A).

    First -sum_e eps_e (A_e - L)^2 = sum_e dp_e (A_e - L), for the sign rule -u sum |A - L|; then the switching term
    B = sum (gamma + p') (x' - x), with 0 <= B <= sum_e dp_e (A'_e - A_e) when x and x' are the top k at p and p'.
    The Lagrangian falls iff B is smaller than the first term is negative [paper: monotone under a condition].
    """
    gradient = loads(x) - target_of(scores, k)
    switched = new_x.astype(float) - x
    return float((new_bias - bias) @ gradient), float(np.sum((scores + new_bias) * switched))


def moved_tokens(x: Bool, new_x: Bool) -> tuple[Int, Int, Int]:
    """Tokens whose only expert changed (k = 1): (token, old expert, new expert), each [moved]."""
    require(bool((x.sum(-1) == 1).all() and (new_x.sum(-1) == 1).all()), "experts per token", "not all 1", "k = 1")
    old, new = x.argmax(-1), new_x.argmax(-1)
    token = np.flatnonzero(old != new)
    return token, old[token], new[token]


def preference_violations(
    scores: Float, x: Bool, bias: Float, new_x: Bool, new_bias: Float, rounding: float = 1e-12
) -> int:
    """T2, k = 1 [paper: preference; margin reconstructed]: moved tokens that break it, 0 if it holds.

    A token that moves from a to b has dp_b > dp_a, and its old margin (gamma_a + p_a) - (gamma_b + p_b) is at most
    dp_b - dp_a. Ties up to `rounding` of the scores are set aside.
    """
    token, old, new = moved_tokens(x, new_x)
    change = new_bias - bias
    gain = change[new] - change[old]
    margin = scores[token, old] + bias[old] - scores[token, new] - bias[new]
    return int(np.sum((margin > gain + rounding) | ((gain <= 0) & (margin > rounding))))


def crowding(scores: Float, bias: Float, width: float) -> int:
    """T3's premise, k = 1: the most tokens of one ordered pair (first, second choice) with a margin below `width`.

    With at most 1 in a window of 2u the sign rule moves no load by more than E - 1 in a step [reconstructed].
    """
    biased = scores + bias
    order = np.argsort(-biased, axis=1, kind="stable")[:, :2]
    first, second = order[:, 0], order[:, 1]
    rows = np.arange(len(scores))
    near = biased[rows, first] - biased[rows, second] < width
    return int(np.bincount(first[near] * scores.shape[1] + second[near], minlength=1).max())


# One batch, many steps: T3 and T4.


@dataclass(frozen=True)
class Trajectory:
    """Before each of N steps and after the last: bias [N+1, E], counts [N+1, E], dual g(p_n) [N+1]."""

    bias: Float
    counts: Int
    dual: Float
    target: float

    def max_deviation(self) -> Float:
        """max_e |A_e - L| [N+1]."""
        return np.abs(self.counts - self.target).max(axis=1)

    def max_violation(self) -> Float:
        """MaxVio = max_e A_e / L - 1 [N+1]; 0 is balanced [paper]."""
        return self.counts.max(axis=1) / self.target - 1

    def monotone_share(self) -> float:
        """Share of the steps on which the Lagrangian did not rise, up to rounding."""
        return float(np.mean(np.diff(self.dual) <= 1e-12 * np.abs(self.dual[0])))


def descend(scores: Float, rule: Rule, steps: int, k: int, bias: Float | None = None) -> Trajectory:
    """`steps` updates on the same scores [T, E], from `bias` or zero."""
    check_scores(scores, k)
    tokens, experts = scores.shape
    wanted = target(tokens, experts, k)
    p = np.zeros(experts) if bias is None else bias.astype(float)
    check_bias(p, experts)
    biases, counts, dual = np.zeros((steps + 1, experts)), np.zeros((steps + 1, experts), np.int64), np.zeros(steps + 1)
    for n in range(steps + 1):
        x, best = choose(scores + p, k)
        biases[n], counts[n], dual[n] = p, loads(x), best.sum() - wanted * p.sum()
        p = update(p, counts[n], rule, n + 1, tokens, k)
    return Trajectory(biases, counts, dual, wanted)


def audit(scores: Float, path: Trajectory, k: int, every: int = 1) -> tuple[float, int]:
    """Every so many steps of a trajectory: (largest error of T1, number of tokens that break T2; 0 for k > 1)."""
    worst, violations = 0.0, 0
    for n in range(0, len(path.bias) - 1, every):
        p, new_p = path.bias[n], path.bias[n + 1]
        x, new_x = choose(scores + p, k)[0], choose(scores + new_p, k)[0]
        change = lagrangian(scores, new_x, new_p, k) - lagrangian(scores, x, p, k)
        worst = max(worst, abs(change - sum(identity_terms(scores, x, p, new_x, new_p, k))))
        violations += preference_violations(scores, x, p, new_x, new_p) if k == 1 else 0
    return worst, violations


# A stream of batches: T5 and T6.


def logistic_scores(rng: np.random.Generator, *shape: int, skew: float = 1.0) -> Float:
    """sigmoid(normal + skew * offset_e) [*shape], E last: i.i.d. tokens, one normal offset per expert."""
    scores = rng.standard_normal(shape)
    scores += skew * rng.standard_normal(shape[-1])
    np.negative(scores, out=scores)
    np.exp(scores, out=scores)
    scores += 1
    return np.reciprocal(scores, out=scores)


def curvature(scores: Float, bias: Float, k: int, width: float = 0.01) -> Float:
    """Hessian of the expected g per token at `bias` [E, E]: a Laplacian weighted by how dense ties are [reconstructed].

    The weight of a pair is the density at 0 of its signed margin where the two are the k-th and the next choice, from
    those within `width`: too low by a few per cent where a third expert often comes between (0.01 on these streams).
    T5: mu is its second smallest eigenvalue.
    """
    check_scores(scores, k)
    experts = scores.shape[-1]
    require(k < experts, "k", k, f"below E = {experts}: no ties matter when all are chosen")
    biased = scores.reshape(-1, experts) + bias
    pair = np.argpartition(-biased, (k - 1, k), axis=1)[:, k - 1 : k + 1]
    near = np.diff(np.take_along_axis(biased, pair, 1), axis=1)[:, 0] > -width
    weight = np.zeros((experts, experts))
    np.add.at(weight, (pair[near, 0], pair[near, 1]), 1 / (2 * width * len(biased)))
    weight += weight.T
    return np.diag(weight.sum(axis=1)) - weight


def stream_loads(batches: Float, bias: Float, k: int) -> Int:
    """Loads of each batch at one bias: [N, T, E] -> [N, E]; in pieces, for memory."""
    return np.concatenate(
        [loads(choose(part + bias, k)[0]) for part in np.array_split(batches, len(batches) // 64 + 1)]
    )


def best_fixed_bias(batches: Float, k: int, start: Float, steps: int = 4) -> Float:
    """The bias that minimises sum_n g_n(p) over the whole stream [N, T, E], in hindsight: [E], mean 0.

    Newton steps from a `start` near it, with the curvature of every 16th batch.
    """
    tokens, bias = batches.shape[0] * batches.shape[1], start
    hessian = np.linalg.pinv(curvature(batches[::16], start, k), hermitian=True)
    for _ in range(steps):
        gradient = stream_loads(batches, bias, k).sum(axis=0) / tokens - k / batches.shape[-1]
        bias = bias - hessian @ gradient
    return bias - bias.mean()


@dataclass(frozen=True)
class Stream:
    """One rule on a stream: g_n(p_n) per token [N], MaxVio of batch n at p_n [N], and the biases p_n [N, E]."""

    dual: Float
    max_violation: Float
    bias: Float


def follow(rule: Rule, batches: Float, k: int) -> Stream:
    """Batch n [T, E] is routed with p_n, then p_n moves by that batch's loads: past loads only."""
    check_scores(batches, k)
    count, tokens, experts = batches.shape
    wanted, p = target(tokens, experts, k), np.zeros(experts)
    dual, violation, biases = np.zeros(count), np.zeros(count), np.zeros((count, experts))
    for n, scores in enumerate(batches):
        x, best = choose(scores + p, k)
        counts = loads(x)
        dual[n], violation[n], biases[n] = best.mean() - wanted / tokens * p.sum(), counts.max() / wanted - 1, p
        p = update(p, counts, rule, n + 1, tokens, k)
    return Stream(dual, violation, biases)


def stream_regret(
    rules: Mapping[str, Rule], batches: Float, k: int, progress: Callable[[str], None] = lambda name: None
) -> tuple[dict[str, Float], dict[str, Stream], Float]:
    """T5: cumulative regret sum_{m <= n} g_m(p_m) - g_m(p*) per token [N] by rule, the streams, and p* [E].

    p* is the best fixed bias of this very stream, sought from the late average of the c/sqrt(n) rule's biases.
    """
    guide = follow(inverse_sqrt(DECAY), batches, k).bias
    best = best_fixed_bias(batches, k, guide[len(guide) // 2 :].mean(axis=0))
    fixed = np.array([choose(scores + best, k)[1].mean() for scores in batches])  # the mean of `best` is 0
    streams, regrets = {}, {}
    for name, rule in rules.items():
        progress(name)
        streams[name] = follow(rule, batches, k)
        regrets[name] = np.cumsum(streams[name].dual - fixed)
    return regrets, streams, best


# The study: everything for one seed.


@dataclass(frozen=True)
class Sizes:
    """What `study` runs: `dual_*` for T4 (k = 2), `load_*` for T3 (k = 1), `stream_*` for T5 and T6 (k = 1)."""

    dual_tokens: int = 128
    dual_experts: int = 8
    dual_k: int = 2
    load_tokens: int = 2048
    load_experts: int = 16
    steps: int = 8000
    batches: int = 4000
    batch_tokens: int = 512
    stream_experts: int = 8
    checkpoints: tuple[int, int, int] = (250, 1000, 4000)


STAGES = 3 * len(RULES)
POINTS = 100


def thin(count: int) -> Int:
    """At most 100 indices of 0 .. count - 1, evenly spaced in the logarithm of index + 1, first and last among them."""
    return np.unique(np.round(np.geomspace(1, count, POINTS)).astype(np.int64)) - 1


def study(
    seed: int, progress: Callable[[int, str], None] | None = None, sizes: Sizes = Sizes()
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """All statements for one seed: (metrics by rule, series by rule for `theory_figure`). Half a minute on one core.

    Metrics, lower is better unless said otherwise; "late" is the last tenth of the steps or batches:
      dual_gap, best_gap: (g - LP optimum) / optimum, late mean and minimum over all steps (T4).
      max_deviation, final_deviation: late maximum and last value of max_e |A_e - L|; deviation_bound: E - 1 (T3).
      crowding: T3's premise at the end, in a window of twice the largest late move of a bias (holds if at most 1).
      monotone_share: share of the steps of T3's instance on which the Lagrangian did not rise; higher is better.
      identity_error, preference_violations: T1 and T2, over every tenth step.
      regret_250, regret_1000, regret_4000: cumulative, per token, after so many batches (T5); regret_growth: the last
        over the one before; late_regret: their difference, which the cost of the start does not hide.
      late_violation: late mean MaxVio; floor: the same at the best fixed bias, from sampling alone (T6).
      curvature: mu of the expected dual function per token there (T5).
    `progress(done, name)` is told of each of the `STAGES` pieces.
    """
    finished = iter(range(1, STAGES + 1))
    tell = lambda name: progress(next(finished), name) if progress else None  # noqa: E731
    rng = np.random.default_rng(seed)
    metrics: dict[str, dict[str, float]] = {name: {} for name in RULES}
    series: dict[str, dict[str, list[float]]] = {name: {} for name in RULES}
    late, shown = sizes.steps * 9 // 10, thin(sizes.steps + 1)

    scores = logistic_scores(rng, sizes.dual_tokens, sizes.dual_experts)
    optimum, _ = lp_optimum(scores, sizes.dual_k)
    for name, rule in RULES.items():
        path = descend(scores, rule, sizes.steps, sizes.dual_k)
        gap = np.maximum(path.dual - optimum, 0) / optimum
        error, _ = audit(scores, path, sizes.dual_k, every=10)
        metrics[name] |= {"dual_gap": gap[late:].mean(), "best_gap": gap.min(), "identity_error": error}
        series[name] |= {"steps": (shown + 1.0).tolist(), "dual_gap": gap[shown].tolist()}
        tell(name)

    scores = logistic_scores(rng, sizes.load_tokens, sizes.load_experts)
    for name, rule in RULES.items():
        path = descend(scores, rule, sizes.steps, 1)
        deviation = path.max_deviation()
        error, violations = audit(scores, path, 1, every=10)
        width = 2 * float(np.abs(np.diff(path.bias[late:], axis=0)).max())
        metrics[name] |= {
            "max_deviation": deviation[late:].max(),
            "final_deviation": deviation[-1],
            "deviation_bound": sizes.load_experts - 1.0,
            "crowding": crowding(scores, path.bias[-1], width),
            "monotone_share": path.monotone_share(),
            "identity_error": max(metrics[name]["identity_error"], error),
            "preference_violations": violations,
        }
        series[name] |= {"max_deviation": deviation[shown].tolist(), "deviation_bound": [sizes.load_experts - 1.0]}
        tell(name)

    batches = logistic_scores(rng, sizes.batches, sizes.batch_tokens, sizes.stream_experts)
    regrets, streams, best = stream_regret(RULES, batches, 1, tell)
    counts = stream_loads(batches, best, 1)
    floor = float(np.mean(counts.max(axis=1) / target(sizes.batch_tokens, sizes.stream_experts, 1) - 1))
    mu = float(np.linalg.eigvalsh(curvature(batches[::16], best, 1))[1])
    late, shown = sizes.batches * 9 // 10, thin(sizes.batches)
    for name, regret in regrets.items():
        middle, last = (regret[n - 1] for n in sizes.checkpoints[-2:])
        metrics[name] |= {f"regret_{n}": regret[n - 1] for n in sizes.checkpoints}
        metrics[name] |= {"regret_growth": last / middle, "late_regret": last - middle}
        metrics[name] |= {"late_violation": streams[name].max_violation[late:].mean(), "floor": floor, "curvature": mu}
        series[name] |= {"batches": (shown + 1.0).tolist(), "regret": regret[shown].tolist()}
    return {name: {key: float(value) for key, value in found.items()} for name, found in metrics.items()}, series


def main() -> None:
    metrics, _ = study(0)
    for key in metrics["c_over_n"]:
        print(f"{key:22}", *(f"{name} {found[key]:.4g}" for name, found in metrics.items()), sep="  ")


if __name__ == "__main__":
    main()
