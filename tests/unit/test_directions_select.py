"""The selection rule against what the paper's authors selected from their own candidate tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suffix_analysis.directions import DirectionConfig, select
from suffix_analysis.errors import UserError

# The rows that decide (the best by bypass, some that a filter removes, all with NaN) of the tables published with
# arXiv 2406.11717; the whole tables are at github.com/andyrdt/refusal_direction, pipeline/runs/*/select_direction.
PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_candidates.json").read_text())


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_returns_what_the_authors_selected(model: str) -> None:
    table = PUBLISHED[model]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    assert select(rows, n_layers=table["n_layers"]) == tuple(table["selected"])


def row(position: int, layer: int, bypass: float, induce: float = 1.0, kl: float = 0.05) -> dict[str, float]:
    return {
        "position": position, "layer": layer, "refusal_score": bypass, "steering_score": induce, "kl_div_score": kl
    }  # fmt: skip


def test_each_filter_removes_its_candidate() -> None:
    good = row(-1, 3, -1.0)
    worse = [row(-1, 8, -9.0), row(-1, 4, -9.0, kl=0.11), row(-1, 4, -9.0, induce=-0.1), row(-2, 4, math.nan)]
    assert select([*worse, good], n_layers=10) == (-1, 3)


def test_thresholds_themselves_pass() -> None:
    assert select([row(-1, 7, -2.0, induce=0.0, kl=0.1)], n_layers=10) == (-1, 7)


@pytest.mark.parametrize(("n_layers", "cutoff"), [(18, 14), (24, 19), (26, 20), (32, 25), (30, 24), (35, 28), (80, 64)])
def test_layer_cutoff_is_the_papers(n_layers: int, cutoff: int) -> None:
    rows = [row(-1, cutoff, -9.0), row(-1, cutoff - 1, -1.0)]
    assert select(rows, n_layers=n_layers) == (-1, cutoff - 1)


def test_no_candidate_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"position -2, layer 2: KL too high .*KL 0\.120"):
        select([row(-1, 2, -9.0, kl=5.0), row(-2, 2, -3.0, kl=0.12)], n_layers=10)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([row(-1, 2, -9.0, kl=0.5, induce=-1.0)], r"layer 2: KL too high and does not induce \(bypass"),
        ([row(-1, 9, -9.0)], r"layer 9: too late \(from layer 8 on\) \(bypass"),
        ([row(-1, 9, -9.0), row(-1, 3, -9.0, kl=0.3)], "layer 3: KL too high"),
        # an induce score is a matter of ten units here, a KL one of tenths
        ([row(-1, 2, -9.0, induce=-10.0), row(-1, 3, -9.0, kl=0.15, induce=-0.2)], "layer 3: KL too high and"),
        ([row(-1, 3, math.nan, kl=math.nan, induce=math.nan)], r"\(layers 3 to 3\) has finite scores"),
        ([], "candidate table is empty"),
        ([row(-1, 0, math.nan) | {"status": "zero"}], r"All of 1 candidate directions \(layers 0 to 0\) are zero: "),
        (
            [row(-1, 0, 0.0) | {"status": "zero"}, row(-1, 9, math.nan, kl=math.nan, induce=math.nan)],
            r"\(layers 0 to 9\) are zero or too late to be chosen \(from layer 8 on\)",
        ),
        # a row whose KL was never taken, because it does not induce, may miss by more than it seems
        ([row(-1, 2, math.nan, kl=math.nan, induce=-0.1), row(-1, 3, -9.0, kl=0.3)], "layer 3: KL too high"),
    ],
)
def test_no_candidate_names_all_that_the_nearest_missed(rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        select(rows, n_layers=10)


@given(st.permutations(range(6)))
def test_order_of_rows_does_not_matter(order: list[int]) -> None:
    rows = [row(-1 - i, i, -float(i)) for i in range(6)]
    assert select([rows[i] for i in order], n_layers=100) == (-6, 5)


def test_ties_go_to_the_authors_first_whatever_the_order() -> None:
    """They go through positions, then layers, and sort by the score alone."""
    rows = [row(-1, 3, -5.0), row(-2, 5, -5.0), row(-2, 2, -5.0)]
    assert select(rows, n_layers=10) == select(rows[::-1], n_layers=10) == (-2, 2)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(UserError, match="no kl_div_score; it needs position, layer"):
        select([{k: v for k, v in row(-1, 3, -5.0).items() if k != "kl_div_score"}], n_layers=10)


@pytest.mark.parametrize("kl", [math.nan, math.inf, None])
def test_a_candidate_without_numbers_is_not_the_nearest(kl: float | None) -> None:
    rows = [
        {"position": -1, "layer": 2, "refusal_score": 0.0, "steering_score": 5.0, "kl_div_score": kl},
        {"position": -1, "layer": 3, "refusal_score": 0.0, "steering_score": 1.0, "kl_div_score": 0.11},
    ]
    with pytest.raises(UserError, match="The nearest is position -1, layer 3: KL too high"):
        select(rows, 10)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("kl_threshold", math.nan), ("induce_threshold", math.nan), ("layer_share", math.nan), ("layer_share", 0.0)],
)
def test_bounds_that_are_none_are_refused(setting: str, value: float) -> None:
    for call in (lambda **one: select([row(-1, 3, -5.0)], 10, **one), lambda **one: DirectionConfig(**one)):
        with pytest.raises(UserError, match=f"{setting} is {value}"):
            call(**{setting: value})
    with pytest.raises(UserError, match="layer_step is 0; it must be at least 1"):
        DirectionConfig(layer_step=0)


def test_scores_that_are_text_are_named() -> None:
    row = {"position": -1, "layer": 2, "refusal_score": "0.1", "steering_score": 5.0, "kl_div_score": 0.0}
    with pytest.raises(UserError, match=r"refusal_score of the candidate table is text \('0.1'\)"):
        select([row], 10)
