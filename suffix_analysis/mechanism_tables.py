"""What the mechanism stage measured, gathered over groups of prompts, as rows of its tables with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import spearmanr
from torch import Tensor

from suffix_analysis.causal import Head, Outcome
from suffix_analysis.causal_tests import Test
from suffix_analysis.factors import FACTORS
from suffix_analysis.prompts import Prompt
from suffix_analysis.stats import interval, rate_change, rate_interval, ratio_interval, sign_flip_max_t

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
    fall = cells.need("terms none") - cells.need(f"terms {arm}")
    whole = fall.sum(axis=2)
    return [
        {"arm": arm, "term": name, **_with_share(fall[:, :, i], whole), **_whole(whole)} for i, name in enumerate(TERMS)
    ]  # fmt: skip


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
    """Mean-ablation of every single head, with p values adjusted for all heads.

    None with a suffix, because one suffix allows no p value (METHODS §5), and where there is one prompt.
    """
    projection, score = (cells.need(f"sweep {run} {name}")[:, 0] for name in ("projection", "score"))
    several = len(projection) > 1 and run == "none"
    tested = [sign_flip_max_t(values).p if several else None for values in (projection, score)]

    def p_value(found: ndarray | None, layer: int, head: int) -> float | None:
        return None if found is None else float(found[layer, head])

    _, n_layers, n_heads = projection.shape
    estimates = [cells.need(f"ranked {run} {name}")[:, 0].mean(axis=0) for name in ("projection", "score")]
    return [
        {
            "run": run, "layer": layer, "head": head, "n_prompts": len(projection),
            "projection_effect": float(projection[:, layer, head].mean()),
            "projection_p": p_value(tested[0], layer, head),
            "projection_estimate": float(estimates[0][layer, head]),
            "score_effect": float(score[:, layer, head].mean()),
            "score_p": p_value(tested[1], layer, head),
            "score_estimate": float(estimates[1][layer, head]),
        }
        for layer in range(n_layers)
        for head in range(n_heads)
    ]  # fmt: skip


def ranking_rows(cells: Cells, run: str, seed: int) -> list[dict[str, Any]]:
    """How well attribution patching ranks heads: its first-order estimates beside the sweep's exact effects.

    Over all heads the rank correlation of sizes; of the heads that it ranks first, and of as many random ones, the mean
    error as a share of the exact effects' mean size.
    """
    rows = []
    for measure in ("projection", "score"):
        exact, guess = (
            cells.need(f"{kind} {run} {measure}")[:, 0].mean(axis=0).ravel() for kind in ("sweep", "ranked")
        )
        k = min(RANKED, len(exact))
        chosen = {
            "ranked first": np.argsort(-np.abs(guess))[:k],
            "random": np.random.default_rng(seed).choice(len(exact), k, replace=False),
        }
        moves = bool(exact.any() and guess.any())
        rows.append(
            {
                "run": run, "measure": measure, "n_heads": len(exact), "k": k,
                "rank_correlation": float(spearmanr(np.abs(guess), np.abs(exact)).statistic) if moves else None,
                "found": len({*chosen["ranked first"].tolist()} & {*np.argsort(-np.abs(exact))[:k].tolist()}),
                **{
                    f"error_{name.replace(' ', '_')}": float(np.abs(guess - exact)[own].mean() / size) if size else None
                    for name, own in chosen.items()
                    for size in [np.abs(exact[own]).mean()]
                },
            }
        )  # fmt: skip
    return rows
