"""Intervals cover and family-wise rates hold on data drawn anew many times, where what is true is known."""

from __future__ import annotations

import numpy as np

from suffix_analysis.stats import (
    interval,
    sign_flip_max_t,
)


def crossed(rng: np.random.Generator, n_prompts: int, n_suffixes: int, spread: float) -> np.ndarray:
    """Prompt effect + suffix effect + noise; the true mean is 0."""
    prompt = rng.normal(0, 1, (n_prompts, 1))
    suffix = rng.normal(0, spread, (1, n_suffixes))
    return prompt + suffix + rng.normal(0, 1, (n_prompts, n_suffixes))


def coverage(spread: float, flatten: bool, draws: int = 150) -> float:
    """How often the interval holds the true mean."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(draws):
        cells = crossed(rng, 40, 12, spread)
        found = interval(cells.reshape(-1, 1) if flatten else cells, seed)
        hits += found.lo <= 0 <= found.hi
    return hits / draws


def test_two_way_bootstrap_covers_when_suffixes_differ() -> None:
    assert coverage(spread=1.0, flatten=False) >= 0.88


def test_treating_cells_as_independent_does_not() -> None:
    # the control for the test above: the naive interval is far too narrow on the same data
    assert coverage(spread=1.0, flatten=True, draws=40) <= 0.6


def test_max_t_keeps_the_family_wise_rate_on_correlated_maps() -> None:
    """400 maps of 40 correlated places without an effect: at 5 % at most 31 are reported (about the 1 % point)."""
    rng = np.random.default_rng(2)
    rejected = 0
    for draw in range(400):
        shared = rng.normal(size=(25, 1))
        rejected += bool((sign_flip_max_t(shared + rng.normal(size=(25, 40)), seed=draw, draws=400).p <= 0.05).any())
    assert 5 <= rejected <= 31, rejected
