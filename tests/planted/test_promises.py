"""Intervals cover and family-wise rates hold on data drawn anew many times, where what is true is known."""

from __future__ import annotations

import numpy as np
import pytest

from suffix_analysis.max_t import crossed_max_t, sign_flip_max_t
from suffix_analysis.stats import MIN_SUFFIXES, contrast, interval


def crossed(rng: np.random.Generator, n_prompts: int, n_suffixes: int, spread: float) -> np.ndarray:
    """Prompt effect + suffix effect + noise; the true mean is 0."""
    prompt = rng.normal(0, 1, (n_prompts, 1))
    suffix = rng.normal(0, spread, (1, n_suffixes))
    return prompt + suffix + rng.normal(0, 1, (n_prompts, n_suffixes))


def coverage(spread: float, n_suffixes: int = MIN_SUFFIXES, flatten: bool = False, draws: int = 300) -> float:
    """How often the interval holds the true mean."""
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(draws):
        cells = crossed(rng, 40, n_suffixes, spread)
        found = interval(cells.reshape(-1, 1) if flatten else cells, seed)
        hits += found.lo <= 0 <= found.hi
    return hits / draws


@pytest.mark.long
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_two_way_bootstrap_covers_with_the_fewest_suffixes_that_allow_a_claim(spread: float) -> None:
    assert coverage(spread) >= 0.93


@pytest.mark.long
def test_contrasts_of_two_arms_cover() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        base = rng.normal(0, 1, (40, 1))
        first, second = (base + crossed(rng, 40, MIN_SUFFIXES, 1.0) for _ in range(2))
        found = contrast(first, second, seed, against_suffixes=True)
        hits += found.lo <= 0 <= found.hi
    assert hits / 300 >= 0.93


def test_few_prompts_are_covered_too() -> None:
    rng = np.random.default_rng(2)
    found = [interval(rng.normal(0, 1, (6, 1)), seed) for seed in range(300)]
    assert sum(one.lo <= 0 <= one.hi for one in found) / 300 >= 0.92


def test_treating_cells_as_independent_does_not() -> None:
    # the control for the test above: the naive interval is far too narrow on the same data
    assert coverage(1.0, n_suffixes=12, flatten=True, draws=40) <= 0.6


def test_max_t_keeps_the_family_wise_rate_on_correlated_maps() -> None:
    """400 maps of 40 correlated places without an effect: at 5 % at most 31 are reported (about the 1 % point)."""
    rng = np.random.default_rng(2)
    rejected = 0
    for draw in range(400):
        shared = rng.normal(size=(25, 1))
        rejected += bool((sign_flip_max_t(shared + rng.normal(size=(25, 40)), seed=draw, draws=400).p <= 0.05).any())
    assert 5 <= rejected <= 31, rejected


def maps(rng: np.random.Generator, n_suffixes: int, spread: float, n_places: int = 40) -> np.ndarray:
    """Crossed cells [prompt suffix place] without an effect: prompts, suffixes and cells differ, places are alike."""
    shape = (25, n_suffixes)
    common = rng.normal(size=(25, 1, 1)) + spread * rng.normal(size=(1, n_suffixes, 1))
    own = rng.normal(size=(25, 1, n_places)) + spread * rng.normal(size=(1, n_suffixes, n_places))
    return common + own + rng.normal(size=(*shape, n_places))


def prompts_apart(rng: np.random.Generator, n_prompts: int) -> np.ndarray:
    """The same, where suffixes move all places together and prompts each place on its own."""
    together = 0.3 * rng.normal(size=(1, MIN_SUFFIXES, 1))
    return together + rng.normal(size=(n_prompts, 1, 40)) + 0.01 * rng.normal(size=(n_prompts, MIN_SUFFIXES, 40))


@pytest.mark.parametrize("n_prompts", [3, 25])
def test_crossed_max_t_keeps_the_rate_where_it_is_prompts_that_differ(n_prompts: int) -> None:
    rng = np.random.default_rng(5)
    none = np.zeros((n_prompts, 1, 40))
    rejected = sum(
        bool((crossed_max_t(prompts_apart(rng, n_prompts), none, draw, draws=200).p <= 0.05).any())
        for draw in range(400)
    )
    assert rejected <= 31, rejected


@pytest.mark.parametrize(("spread", "controls"), [(0.0, 1), (1.0, 1), (0.3, MIN_SUFFIXES), (3.0, MIN_SUFFIXES)])
def test_crossed_max_t_keeps_the_rate_however_much_suffixes_differ(spread: float, controls: int) -> None:
    """400 pairs of arms; without suffixes in the other arm its cells are 0, with them they are drawn alike."""
    rng = np.random.default_rng(3)
    rejected = by_prompt = 0
    for draw in range(400):
        arm = maps(rng, MIN_SUFFIXES, spread)
        against = np.zeros((25, 1, 40)) if controls == 1 else maps(rng, controls, spread)
        rejected += bool((crossed_max_t(arm, against, draw, draws=200).p <= 0.05).any())
        difference = arm.mean(axis=1) - against.mean(axis=1)
        by_prompt += bool((sign_flip_max_t(difference, draw, draws=200).p <= 0.05).any())
    assert rejected <= 31, rejected
    if spread >= 1:
        assert by_prompt > 100, "signs flipped by prompt alone take what these suffixes share for an effect"


@pytest.mark.parametrize("controls", [1, MIN_SUFFIXES])
def test_crossed_max_t_finds_what_all_suffixes_do(controls: int) -> None:
    rng = np.random.default_rng(4)
    arm = maps(rng, 16, 0.3)
    arm[:, :, 7] += 6
    against = np.zeros((25, 1, 40)) if controls == 1 else maps(rng, 16, 0.3)
    found = crossed_max_t(arm, against)
    assert found.p[7] < 0.05 and int(found.t.argmax()) == 7
    assert (np.delete(found.p, 7) > 0.05).all()


def test_crossed_max_t_needs_several_suffixes_and_the_same_prompts() -> None:
    for arm, against in (
        (np.zeros((3, 1, 2)), np.zeros((3, 1, 2))),
        (np.zeros((3, 2, 2)), np.zeros((4, 1, 2))),
        (np.zeros((1, 2, 2)), np.zeros((1, 1, 2))),
    ):
        with pytest.raises(ValueError, match="at least two suffixes"):
            crossed_max_t(arm, against)
    with pytest.raises(ValueError, match="finite"):
        crossed_max_t(np.full((3, 2, 2), np.nan), np.zeros((3, 1, 2)))
