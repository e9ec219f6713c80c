"""Intervals: paired, crossed, honest about what they cover."""

from __future__ import annotations

import numpy as np
import pytest

from suffix_analysis.max_t import sign_flip_max_t
from suffix_analysis.stats import (
    Interval,
    contrast,
    in_words,
    interval,
    interval_table,
    rate_change,
    rate_interval,
    ratio_interval,
)


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


def test_ratio_of_means_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    whole = rng.normal(4, 1, (60, 1))
    share, lo, hi = ratio_interval(0.25 * whole, whole)
    # both are resampled together, so a constant share has no spread
    assert share == pytest.approx(0.25) and lo == pytest.approx(0.25) and hi == pytest.approx(0.25)
    share, lo, hi = ratio_interval(0.25 * whole + rng.normal(0, 1, (60, 1)), whole)
    assert share is not None and lo is not None and hi is not None
    assert lo < 0.25 < hi and lo < share < hi


def test_a_share_of_nothing_is_no_number() -> None:
    rng = np.random.default_rng(0)
    assert ratio_interval(np.ones((40, 1)), rng.normal(0, 1, (40, 1))) == (None, None, None)


def test_max_t_is_scipys_t_and_finds_what_is_there() -> None:
    from scipy.stats import ttest_1samp

    rng = np.random.default_rng(3)
    maps = rng.normal(size=(30, 2, 5))
    maps[:, 1, 3] -= 1.2
    found = sign_flip_max_t(maps)
    np.testing.assert_allclose(found.t, ttest_1samp(maps, 0).statistic, rtol=1e-9)
    assert found.p.shape == (2, 5) and found.p[1, 3] < 0.01 and found.t[1, 3] < 0


def test_max_t_of_places_that_never_move_is_no_effect() -> None:
    maps = np.zeros((10, 3))
    maps[:, 1] = np.random.default_rng(0).normal(size=10)
    found = sign_flip_max_t(maps)
    assert found.t[0] == 0 and found.p[0] == 1.0
    with pytest.raises(ValueError, match="at least two prompts"):
        sign_flip_max_t(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="finite"):
        sign_flip_max_t(np.full((3, 3), np.nan))


def test_what_an_interval_allows_to_say() -> None:
    def about(lo: float, hi: float, descriptive: bool = False) -> Interval:
        return Interval((lo + hi) / 2, lo, hi, 20, 8, "prompts", descriptive)

    assert in_words(about(0.1, 0.3), 0.2) == "differs from 0"
    assert in_words(about(-0.1, 0.15), 0.2) == "within the bound"
    assert in_words(about(-0.1, 0.5), 0.2) == "not powered"
    assert in_words(about(0.1, 0.3, descriptive=True), 0.2) == "descriptive"


def test_a_claim_needs_enough_suffixes_in_both_arms() -> None:
    rng = np.random.default_rng(0)
    many, few, none = rng.random((20, 10)), rng.random((20, 2)), rng.random((20, 1))
    assert contrast(many, few, against_suffixes=True).descriptive
    assert contrast(many, none, against_suffixes=True).descriptive
    assert not contrast(many, none).descriptive
    assert contrast(few, many, against_suffixes=True).descriptive


def test_suffixes_of_two_arms_are_drawn_apart() -> None:
    # equal over prompts, and each arm's suffixes differ as much as the other's: the difference is uncertain
    cells = np.tile(np.arange(8) / 7, (12, 1))
    found = contrast(cells, cells, against_suffixes=True)
    assert found.estimate == 0 and found.hi - found.lo > 0.4
    turned = contrast(cells, cells[:, ::-1], against_suffixes=True)
    assert found.hi - found.lo == pytest.approx(turned.hi - turned.lo, rel=0.15), "their order in the file is no matter"


def test_a_rate_of_all_or_nothing_has_width_whatever_the_number_of_suffixes() -> None:
    everything, nothing = np.ones((12, 8)), np.zeros((12, 8))
    # eight suffixes, however many prompts each has met: 0.025 ** (1 / 8)
    assert interval(everything, rate=True).lo == pytest.approx(0.631, abs=0.001)
    assert interval(everything[:, :7], rate=True).lo == pytest.approx(0.735, abs=0.001), (
        "of these suffixes, over prompts"
    )
    assert interval(nothing, rate=True).hi == pytest.approx(0.369, abs=0.001)
    assert interval(nothing).hi == 0, "a measure that is no rate is left as it is"
    found = contrast(everything, np.ones((12, 1)), rate=True)
    assert found.lo < -0.2 and found.hi > 0.2 and in_words(found) == "not powered"
    assert in_words(contrast(nothing, nothing[:, :1])) == "not powered", "no width is no evidence"


def test_one_prompt_is_descriptive() -> None:
    assert interval(np.zeros((1, 9))).descriptive and contrast(np.zeros((1, 9)), np.zeros((1, 1))).descriptive


def test_an_effect_that_is_the_same_everywhere_is_found() -> None:
    maps = np.zeros((12, 3))
    maps[:, 1] = -0.5
    maps[:, 2] = 0.5 + 1e-12 * np.arange(12)
    found = sign_flip_max_t(maps)
    assert found.p[0] == 1 and found.t[0] == 0
    assert found.p[1] < 0.01 and found.p[2] < 0.01 and found.t[1] < 0 < found.t[2]


def test_a_change_of_rates_is_paired_and_has_width_where_all_change_alike() -> None:
    before = np.array([[0.0], [0.0], [0.0], [0.0], [1.0], [0.0], [0.0], [0.0]])
    after = np.ones((8, 1))
    change, lo, hi = rate_change(after, before)
    assert change == pytest.approx(7 / 8) and 0 < lo < change < hi <= 1
    assert rate_change(after, after) == (0.0, pytest.approx(-0.369, abs=1e-3), pytest.approx(0.369, abs=1e-3))
    assert rate_change(after, np.zeros((8, 1)))[:2] == (1.0, pytest.approx(0.631, abs=1e-3))
