"""Intervals: paired, crossed, honest about what they cover."""

from __future__ import annotations

import numpy as np
import pytest

from suffix_analysis.stats import contrast, interval, interval_table, rate_interval


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
    assert coverage(spread=1.0, flatten=True) <= 0.6


def test_contrast_is_paired_by_prompt() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 5, (60, 1))
    shifted = base - 0.5 + rng.normal(0, 0.1, (60, 1))
    found = contrast(shifted, base)
    assert found.lo < -0.5 < found.hi
    assert found.hi - found.lo < 0.1  # unpaired it would be about 3.5 wide


def test_contrast_needs_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="3 and 4 prompts"):
        contrast(np.zeros((3, 1)), np.zeros((4, 1)))


def test_one_suffix_is_descriptive_and_resamples_prompts_only() -> None:
    found = interval(np.random.default_rng(0).random((20, 1)))
    assert (found.descriptive, found.resampled) == (True, "prompts")
    found = interval(np.random.default_rng(0).random((20, 8)))
    assert (found.descriptive, found.resampled) == (False, "prompts and suffixes")


def test_same_seed_same_interval() -> None:
    cells = np.random.default_rng(3).random((30, 9))
    assert interval(cells, 5) == interval(cells, 5)
    assert interval(cells, 5) != interval(cells, 6)


def test_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        interval_table(np.array([[[np.nan]]]))


def test_rate_of_all_has_width() -> None:
    rate, lo, hi = rate_interval(np.ones(130))
    # the exact lower bound of n of n is (0.025)^(1/n)
    assert (rate, hi) == (1.0, 1.0)
    assert lo == pytest.approx(0.025 ** (1 / 130))
