"""Intervals for crossed designs: instructions × suffixes (METHODS §5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

DRAWS = 2000
MIN_SUFFIXES = 8  # fewer, and nothing is claimed beyond these suffixes


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval, and what was resampled to get it."""

    estimate: float
    lo: float
    hi: float
    n_prompts: int
    n_suffixes: int
    resampled: str
    descriptive: bool


def resampled_means(
    cells: Float[ndarray, "prompt suffix measure"], seed: int = 0, draws: int = DRAWS
) -> Float[ndarray, "draw measure"]:
    """Means over bootstrap draws of prompts and, where there are several, of suffixes.

    Both factors are drawn with replacement and independently (two-way bootstrap), because cells that share an
    instruction or a suffix are not independent. The same seed draws the same prompts, so differences between arms
    over the same prompts are paired.
    """
    rng = np.random.default_rng(seed)
    n_prompts, n_suffixes, n_measures = cells.shape
    prompt_weights = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=draws) / n_prompts
    if n_suffixes == 1:
        return prompt_weights @ cells[:, 0, :]
    suffix_rng = np.random.default_rng([seed, n_suffixes])
    suffix_weights = suffix_rng.multinomial(n_suffixes, np.full(n_suffixes, 1 / n_suffixes), size=draws) / n_suffixes
    out = np.empty((draws, n_measures))
    for start in range(0, draws, 250):  # in blocks: the intermediate is draws × suffixes × measures
        block = slice(start, start + 250)
        by_prompt = np.tensordot(prompt_weights[block], cells, axes=1)
        out[block] = np.einsum("ds,dsm->dm", suffix_weights[block], by_prompt)
    return out


def interval_table(
    cells: Float[ndarray, "prompt suffix measure"], seed: int = 0
) -> tuple[Float[ndarray, " measure"], Float[ndarray, " measure"], Float[ndarray, " measure"]]:
    """Mean, lower and upper bound of every measure.

    Raises:
        ValueError: a cell is not finite, or there is none.
    """
    if cells.size == 0:
        raise ValueError("interval_table needs at least one prompt and one suffix")
    if not np.isfinite(cells).all():
        raise ValueError("interval_table got a value that is not finite")
    means = resampled_means(cells, seed)
    lo, hi = np.quantile(means, [0.025, 0.975], axis=0)
    return cells.mean(axis=(0, 1)), lo, hi


def interval(cells: Float[ndarray, "prompt suffix"], seed: int = 0, *, suffix_arm: bool = True) -> Interval:
    """Interval for one measure; ``suffix_arm`` says whether the arm has suffixes at all (else only prompts vary)."""
    mean, lo, hi = interval_table(cells[:, :, None], seed)
    n_prompts, n_suffixes = cells.shape
    return Interval(
        estimate=float(mean[0]),
        lo=float(lo[0]),
        hi=float(hi[0]),
        n_prompts=n_prompts,
        n_suffixes=n_suffixes if suffix_arm else 0,
        resampled="prompts and suffixes" if n_suffixes > 1 else "prompts",
        descriptive=suffix_arm and n_suffixes < MIN_SUFFIXES,
    )


def contrast(
    arm: Float[ndarray, "prompt suffix"], against: Float[ndarray, "prompt_b suffix_b"], seed: int = 0
) -> Interval:
    """Difference of two arms' means over the same prompts (``arm`` − ``against``), paired by prompt.

    Each arm's own suffixes are resampled where it has several.
    """
    if arm.shape[0] != against.shape[0]:
        raise ValueError(f"the arms have {arm.shape[0]} and {against.shape[0]} prompts; a contrast pairs them")
    draws = resampled_means(arm[:, :, None], seed)[:, 0] - resampled_means(against[:, :, None], seed)[:, 0]
    lo, hi = np.quantile(draws, [0.025, 0.975])
    several = max(arm.shape[1], against.shape[1]) > 1
    return Interval(
        estimate=float(arm.mean() - against.mean()),
        lo=float(lo),
        hi=float(hi),
        n_prompts=arm.shape[0],
        n_suffixes=arm.shape[1],
        resampled="prompts and suffixes" if several else "prompts",
        descriptive=arm.shape[1] < MIN_SUFFIXES,
    )


def rate_interval(flags: Float[ndarray, " prompt"]) -> tuple[float, float, float]:
    """A proportion with its exact (Clopper–Pearson) 95 % interval, for rates over prompts alone.

    The bootstrap interval of a rate of exactly 0 or 1 has no width; this one has.
    """
    from scipy.stats import binomtest

    hits, n = int(flags.sum()), len(flags)
    bounds = binomtest(hits, n).proportion_ci(0.95, method="exact")
    return hits / n, float(bounds.low), float(bounds.high)


def auroc(positive: Float[ndarray, " a"], negative: Float[ndarray, " b"]) -> float:
    """Share of (positive, negative) pairs in the right order, ties counted half (Mann–Whitney U / ab)."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def auroc_interval(
    positive: Float[ndarray, " a"], negative: Float[ndarray, " b"], seed: int = 0, draws: int = 1000
) -> tuple[float, float, float]:
    """AUROC with its 95 % bootstrap interval; both classes are resampled."""
    rng = np.random.default_rng(seed)
    found = [auroc(rng.choice(positive, len(positive)), rng.choice(negative, len(negative))) for _ in range(draws)]
    lo, hi = np.quantile(found, [0.025, 0.975])
    return auroc(positive, negative), float(lo), float(hi)
