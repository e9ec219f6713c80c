"""What the mechanism stage measured, gathered over groups of prompts, as rows of its tables with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import spearmanr
from torch import Tensor

from suffix_analysis.causal import Head, Outcome
from suffix_analysis.causal_tests import ELSEWHERE, RESTORED, Test
from suffix_analysis.factors import FACTORS
from suffix_analysis.max_t import sign_flip_max_t
from suffix_analysis.prompts import Prompt
from suffix_analysis.stats import (
    EQUIVALENT,
    contrast,
    contrast_row,
    interval,
    interval_table,
    rate_change,
    rate_interval,
    ratio_interval,
    resampled_means,
)

TERMS = ("top heads", "other heads", "MLPs", "embedding")
RANKED = 8  # heads that attribution patching ranks first, held against the exact sweep


class Cells:
    """Arrays [prompt …] of every quantity and suffix, gathered group by group."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int, list[Tensor]]] = {}

    def add(self, name: str, values: Tensor, suffix: int = 0) -> None:
        """One group's values."""
        self._found.setdefault(name, {}).setdefault(suffix, []).append(values.double().cpu())

    def add_outcome(self, name: str, found: Outcome, suffix: int = 0) -> None:
        """One group's scores and projections."""
        self.add(f"{name} score", found.score, suffix)
        self.add(f"{name} projection", found.projection, suffix)

    def get(self, name: str) -> Float[ndarray, "prompt suffix *rest"] | None:
        """All prompts and suffixes, or None."""
        if name not in self._found:
            return None
        return torch.stack([torch.cat(parts) for parts in self._found[name].values()], dim=1).numpy()

    def complete(self, name: str, prompts: Sequence[Prompt], n_suffixes: int) -> bool:
        """Whether the quantity is there for every prompt and suffix (a control may not fit some of them)."""
        parts = self._found.get(name, {})
        return len(parts) == n_suffixes and all(sum(map(len, found)) == len(prompts) for found in parts.values())

    def need(self, name: str) -> Float[ndarray, "prompt suffix *rest"]:
        """All prompts and suffixes of what is known to be there."""
        found = self.get(name)
        assert found is not None, name
        return found


def carried_rows(cells: Cells, arm: str) -> list[dict[str, Any]]:
    """How much of the fall in projection from no suffix to an arm each kind of term carries."""
    fall = _fall(cells, arm)
    whole = fall.sum(axis=0)
    return [
        {"arm": arm, "term": name, **_with_share(own, whole), **_whole(whole)}
        for name, own in zip(TERMS, fall, strict=True)
    ]


def _whole(whole: ndarray) -> dict[str, Any]:
    return {"n_prompts": whole.shape[0], "n_suffixes": whole.shape[1]}


def _with_share(part: ndarray, whole: ndarray) -> dict[str, float | None]:
    """A part's mean with its interval, and its share of the whole with its interval."""
    mean = interval(part)
    share, lo, hi = ratio_interval(part, whole)
    return {
        "value": mean.estimate, "lo": mean.lo, "hi": mean.hi, "share": share, "share_lo": lo, "share_hi": hi,
    }  # fmt: skip


def factor_rows(cells: Cells, top: Sequence[Head], arm: str) -> list[dict[str, Any]]:
    """The parts of the change of the instruction's contribution, by top head and (layer and head −1) for their sum."""
    parts = cells.need(f"factors {arm}")  # [prompt suffix factor top]
    change = parts.sum(axis=2)
    rows = []
    for j, (layer, head) in enumerate([*top, (-1, -1)]):
        own = parts.sum(axis=3) if layer < 0 else parts[..., j]
        whole = change.sum(axis=2) if layer < 0 else change[..., j]
        rows += [
            {
                "arm": arm,
                "layer": layer,
                "head": head,
                "factor": name,
                **_with_share(own[:, :, i], whole),
                **_whole(whole),
            }
            for i, name in enumerate(FACTORS)
        ]
    return rows


def contrast_rows(cells: Cells, controls: Sequence[str], plan: Mapping[int, Test]) -> list[dict[str, Any]]:
    """The mechanism tables' claims beside their controls (METHODS §5), with what each difference allows to say.

    Kinds ``carried`` and ``factors`` (summed over the top heads) hold the adversarial arm against each of ``controls``;
    ``causal score`` and ``causal projection`` hold a test of the top heads against the mean of its random sets, and the
    restored projection against a random direction; these ``n_sets`` sets are taken as they are, and ``n_beyond`` of
    them have a smaller effect than the test. Differences up to a tenth of the adversarial arm's whole change (of
    a test: of the way to the other run) count as none. ``plan`` holds the tests that were made on all prompts.
    """
    return [row for arm in controls for row in _against_arm(cells, arm)] + _against_tests(cells, plan)


def _against_arm(cells: Cells, arm: str) -> Iterator[dict[str, Any]]:
    for kind, names, parts in (("carried", TERMS, _fall), ("factors", FACTORS, _by_factor)):
        ours, theirs = parts(cells, "adversarial"), parts(cells, arm)
        whole = ours.sum(axis=0)
        for name, own, other in (*zip(names, ours, theirs, strict=True), ("all", whole, theirs.sum(axis=0))):
            found = contrast(own, other, against_suffixes=True)
            row = contrast_row(name, "adversarial", arm, found, _tenth(whole))
            yield {"kind": kind, **row, "n_sets": None, "n_beyond": None}


def _against_tests(cells: Cells, plan: Mapping[int, Test]) -> list[dict[str, Any]]:
    rows = []
    for number, controls in _controlled(plan):
        test = plan[number]
        words = (test.heads, "random") if test.heads == "top" else (test.name, ELSEWHERE)
        for measure in ("score", "projection"):
            own, each = cells.need(f"test {number} {measure}"), [cells.need(f"test {i} {measure}") for i in controls]
            # the same prompts and suffixes in both
            found = interval(own - np.mean(each, axis=0), suffix_arm=not test.once)
            before = cells.need(f"{'attacked' if test.on == 'attacked' else 'none'} {measure}").mean()
            beyond = sum(abs(own.mean() - before) > abs(other.mean() - before) for other in each)
            way = cells.need(f"none {measure}") - cells.need(f"attacked {measure}")
            row = contrast_row(test.name, *words, found, _tenth(way))
            rows.append({"kind": f"causal {measure}", **row, "n_sets": len(each), "n_beyond": int(beyond)})
    return rows


def _tenth(whole: ndarray) -> float:
    return EQUIVALENT * abs(float(whole.mean()))


def _fall(cells: Cells, arm: str) -> Float[ndarray, "term prompt suffix"]:
    """What each kind of term loses from no suffix to an arm."""
    return np.moveaxis(cells.need("terms none") - cells.need(f"terms {arm}"), 2, 0)


def _by_factor(cells: Cells, arm: str) -> Float[ndarray, "factor prompt suffix"]:
    """The parts of the change of what the top heads together bring from the instruction."""
    return np.moveaxis(cells.need(f"factors {arm}").sum(axis=3), 2, 0)


def _controlled(plan: Mapping[int, Test]) -> list[tuple[int, list[int]]]:
    """Tests (their numbers) with those that are their controls; of sets of heads, the largest only."""
    most = max((test.n_heads for test in plan.values() if test.heads == "top"), default=0)
    found = []
    for number, test in plan.items():
        if test.heads == "top" and test.n_heads == most:
            same = (test.name, "random", most)
            found.append((number, [i for i, t in plan.items() if (t.name, t.heads, t.n_heads) == same]))
        elif test.name == RESTORED and test.dose == 1:
            found.append((number, [i for i, t in plan.items() if t.name == ELSEWHERE]))
    return [(number, controls) for number, controls in found if controls]


def causal_row(cells: Cells, number: int, test: Test, bases: Mapping[str, int]) -> dict[str, Any]:
    """One test: what became of the score and the projection, and how much of the way to the other run that is.

    ``bases`` are the numbers of the tests that change nothing, by the run they stand on.
    """
    row: dict[str, Any] = {
        "test": test.name,
        "heads": test.heads,
        "on": test.on,
        "dose": test.dose,
        "n_heads": test.n_heads,
    }
    for measure in ("score", "projection"):
        after = cells.need(f"test {number} {measure}")
        n_suffixes = 0 if test.once else after.shape[1]
        plain, attacked = cells.need(f"none {measure}"), cells.need(f"attacked {measure}")
        before, source = (attacked, plain) if test.on == "attacked" else (plain, attacked)
        before, source, after = np.broadcast_arrays(before, source, after)
        effect = interval(after - before)
        share, lo, hi = ratio_interval(after - before, source - before)
        row |= {
            f"{measure}_before": float(before.mean()), f"{measure}_after": float(after.mean()),
            f"{measure}_effect": effect.estimate, f"{measure}_lo": effect.lo, f"{measure}_hi": effect.hi,
            f"{measure}_recovered": share, f"{measure}_recovered_lo": lo, f"{measure}_recovered_hi": hi,
        }  # fmt: skip
    refused = cells.get(f"replies {number}")
    for name, found in (("refused", refused), ("complied", cells.get(f"complied {number}"))):
        row |= dict(zip((name, f"{name}_lo", f"{name}_hi"), _rate(found), strict=True))
    base = cells.get(f"replies {bases[test.on]}")
    change = (None, None, None) if refused is None or base is None else rate_change(refused, base)
    row |= dict(zip(("refused_change", "refused_change_lo", "refused_change_hi"), change, strict=True))
    return row | {"n_prompts": len(after), "n_suffixes": n_suffixes}


def _rate(found: ndarray | None) -> tuple[float | None, float | None, float | None]:
    """The mean of zeros and ones [prompt suffix] with its interval; of one suffix the exact one over prompts."""
    if found is None:
        return None, None, None
    if found.shape[1] == 1:
        return rate_interval(found[:, 0])
    both = interval(found, rate=True)
    return both.estimate, both.lo, both.hi


def sweep_rows(cells: Cells, run: str) -> list[dict[str, Any]]:
    """Mean-ablation of every single head: effects with intervals over prompts, and p values adjusted for all heads.

    None with a suffix, because one suffix allows no p value (METHODS §5), and where there is one prompt.
    """
    projection, score = (cells.need(f"sweep {run} {name}")[:, 0] for name in ("projection", "score"))
    several = len(projection) > 1 and run == "none"
    tested = [sign_flip_max_t(values).p if several else None for values in (projection, score)]
    ranges = [
        [bound.reshape(found.shape[1:]) for bound in interval_table(found.reshape(len(found), 1, -1))[1:]]
        for found in (projection, score)
    ]

    def p_value(found: ndarray | None, layer: int, head: int) -> float | None:
        return None if found is None else float(found[layer, head])

    _, n_layers, n_heads = projection.shape
    estimates = [cells.need(f"ranked {run} {name}")[:, 0].mean(axis=0) for name in ("projection", "score")]
    return [
        {
            "run": run, "split": "report", "layer": layer, "head": head, "n_prompts": len(projection),
            "projection_effect": float(projection[:, layer, head].mean()),
            "projection_lo": float(ranges[0][0][layer, head]), "projection_hi": float(ranges[0][1][layer, head]),
            "projection_p": p_value(tested[0], layer, head),
            "projection_estimate": float(estimates[0][layer, head]),
            "score_effect": float(score[:, layer, head].mean()),
            "score_lo": float(ranges[1][0][layer, head]), "score_hi": float(ranges[1][1][layer, head]),
            "score_p": p_value(tested[1], layer, head),
            "score_estimate": float(estimates[1][layer, head]),
        }
        for layer in range(n_layers)
        for head in range(n_heads)
    ]  # fmt: skip


def ranking_rows(cells: Cells, run: str, layer: int, seed: int) -> list[dict[str, Any]]:
    """How well attribution patching ranks heads: its first-order estimates beside the sweep's exact effects.

    The rank correlation of sizes over all heads that can have an effect (on the projection those below ``layer``, where
    it is read: ties of all others at 0 would pass for agreement), with its interval over prompts; of the heads that it
    ranks first, and of as many random ones, the mean error as a share of the exact effects' mean size.
    """
    rows = []
    for measure in ("projection", "score"):
        before = layer if measure == "projection" else None
        by_prompt = [cells.need(f"{kind} {run} {measure}")[:, 0, :before] for kind in ("sweep", "ranked")]
        if not by_prompt[0].size:  # the direction is read before any head has written
            continue
        exact, guess = (found.mean(axis=0).ravel() for found in by_prompt)
        k = min(RANKED, len(exact))
        chosen = {
            "ranked first": np.argsort(-np.abs(guess))[:k],
            "random": np.random.default_rng(seed).choice(len(exact), k, replace=False),
        }
        rho, lo, hi = _rank_correlation(*by_prompt) if exact.any() and guess.any() else (None, None, None)
        rows.append(
            {
                "run": run, "split": "report", "measure": measure, "n_heads": len(exact), "k": k,
                "rank_correlation": rho, "rank_correlation_lo": lo, "rank_correlation_hi": hi,
                "found": len({*chosen["ranked first"].tolist()} & {*np.argsort(-np.abs(exact))[:k].tolist()}),
                **{
                    f"error_{name.replace(' ', '_')}": float(np.abs(guess - exact)[own].mean() / size) if size else None
                    for name, own in chosen.items()
                    for size in [np.abs(exact[own]).mean()]
                },
            }
        )  # fmt: skip
    return rows


def _rank_correlation(
    exact: Float[ndarray, "prompt layer head"], guess: Float[ndarray, "prompt layer head"]
) -> tuple[float, float | None, float | None]:
    """Spearman's correlation of the mean effects' sizes over heads, with its 95 % bootstrap interval over prompts."""

    def of(means: Float[ndarray, "two place"]) -> float:
        return float(spearmanr(*np.abs(means)).statistic)

    both = np.stack([exact.reshape(len(exact), -1), guess.reshape(len(guess), -1)], axis=1)
    if len(both) < 2:
        return of(both.mean(axis=0)), None, None
    draws = resampled_means(both.reshape(len(both), 1, -1), draws=500)
    lo, hi = np.nanquantile([of(draw.reshape(2, -1)) for draw in draws], [0.025, 0.975])
    return of(both.mean(axis=0)), float(lo), float(hi)
