"""What the story may claim: effects only where intervals are clear, numbers of prompts and suffixes beside them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from reports import build
from reports.charts_more import figures
from reports.data import RunData, read_run
from reports.evidence import over_prompts
from reports.numbers import percent_ci
from reports.text import headline
from tests.fake_run import make_fake_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(make_fake_run(tmp_path_factory.mktemp("evidence") / "run", n_prompts=12))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(make_fake_run(tmp_path_factory.mktemp("evidence") / "pool", n_prompts=12, n_adversarial=8))


def said(data: RunData) -> str:
    return re.sub(r"[\u00a0\u202f]", " ", " ".join(headline(data)))


def changed(data: RunData, name: str, **columns: Any) -> RunData:
    rows = [{**row, **columns} for row in data.table(name)]
    return replace(data, tables=data.tables | {name: rows})


def test_causal_replies_name_their_prompts_and_the_interval_they_start_from(data: RunData) -> None:
    text = said(data)
    assert "In the causal tests, 32 report prompts, 41 % (CI 31–47 %) are refused with the suffix; " in text
    assert "giving the projection back brings that to 93 % (CI 83–" in text
    assert "these prompts" not in text


def test_an_effect_is_claimed_only_where_intervals_lie_apart(data: RunData) -> None:
    text = said(changed(data, "causal", refused_lo=0.1, refused_hi=0.99))
    assert "brings that to" not in text
    assert "giving the projection back: 93 % (CI 10–99 %), no clear change" in text
    bare = [{k: v for k, v in row.items() if k not in ("refused_lo", "refused_hi")} for row in data.table("causal")]
    assert "giving the projection back: 93 %, no clear change" in said(
        replace(data, tables=data.tables | {"causal": bare})
    )


def test_a_paired_change_decides_where_the_table_has_it(data: RunData) -> None:
    overlapping = changed(data, "causal", refused_lo=0.1, refused_hi=0.99, refused_change_lo=0.2, refused_change_hi=0.8)
    assert "giving the projection back brings that to" in said(overlapping)
    none = changed(data, "causal", refused_change_lo=-0.1, refused_change_hi=0.2)
    assert "brings that to" not in said(none)


def test_parts_that_a_control_has_too_are_not_the_suffixs_own(data: RunData) -> None:
    assert "as long, has no clearly smaller part" not in said(data), "the invented control has a quarter of everything"
    rows = [
        {**row, "value": -9.9} if (row["arm"], row["factor"]) == ("random", "query") else row
        for row in data.table("factors")
    ]
    # the paired contrast decides: here it says that the suffix does clearly more
    assert "smaller part" not in said(replace(data, tables=data.tables | {"factors": rows}))
    contrasts = [
        {**row, "lo": -9.0, "hi": 0.5} if row["kind"] == "factors" else row for row in data.table("mechanism_contrasts")
    ]
    text = said(replace(data, tables=data.tables | {"factors": rows, "mechanism_contrasts": contrasts}))
    assert "(random text, as long, has no clearly smaller part from a changed query)" in text
    text = said(replace(data, tables=data.tables | {"factors": rows, "mechanism_contrasts": []}))
    assert "(random text, as long, has no clearly smaller part from a changed query)" in text


def test_shares_of_a_fall_need_a_fall(data: RunData) -> None:
    assert "Of the fall in projection" in said(data)
    text = said(changed(data, "contrasts", lo=-0.2, hi=0.1))
    assert "Of the fall in projection" not in text
    assert "of what the top heads bring less from the instruction" in text, "that rests on its own table"


def test_shares_of_what_the_heads_lose_need_a_clear_total(data: RunData) -> None:
    wide = [{**row, "lo": row["value"] - 20, "hi": row["value"] + 20} for row in data.table("factors")]
    assert "bring less" not in said(replace(data, tables=data.tables | {"factors": wide}))
    assert "bring less" not in said(changed(data, "factors", hi=None))


def test_only_report_prompts_are_counted_as_such() -> None:
    rows = [{"split": "report", "n_prompts": 48}, {"split": "select", "n_prompts": 72}]
    assert over_prompts(rows) == over_prompts([{"n_prompts": 48}]) == "48\u00a0report prompts"


def test_a_dash_never_stands_before_a_minus() -> None:
    told = [re.sub(r"[\u00a0\u202f]", " ", percent_ci(*values)) for values in ((0.4, 0.3, 0.5), (-0.04, -0.07, -0.003))]
    assert told == ["40 % (CI 30–50 %)", "−4 % (CI −7 to −0.3 %)"]


@pytest.mark.long
def test_a_pool_is_told_as_a_pool(data: RunData, pool: RunData) -> None:
    text = said(pool)
    assert "on 12 unseen instructions, over 8 suffixes;" in text
    assert "(0 = harmless mean, 1 = harmful mean), over 8 suffixes" in text
    assert "without a suffix and " in text and "with the 8 suffixes" in text
    page = build.render(pool).decode("utf-8").replace("\u00a0", " ")
    assert "What 8 suffixes do to" in page and "this suffix" not in page
    assert "first of 8 suffixes: adversarial-0" in page and 'aria-label="the first suffix, as literal text"' in page
    captions = {name: figure.caption.replace("\u00a0", " ") for name, figure in figures(pool).items()}
    assert "With the first of 8 suffixes." in captions["lens"]
    several = [{**row, "n_suffixes": 8} for row in pool.table("circuit")]
    drawn = figures(replace(pool, tables=pool.tables | {"circuit": several}))["circuit"]
    assert drawn.caption.replace("\u00a0", " ").endswith("Means over 8 suffixes.")
    assert "Means over" not in captions["circuit"]
    assert "the first of 8 suffixes" in captions["heads"] and captions["loss"].endswith("The first of 8 attacks.")
    alone = " ".join(figure.caption for figure in figures(data).values())
    assert "first of" not in alone and "over" not in said(data).split(";")[0]


def labels(data: RunData, figure: str) -> list[str]:
    return [view.label for view in figures(data)[figure].views] if figure in figures(data) else []


@pytest.mark.long
def test_how_far_each_candidate_tells_prompts_apart_is_a_view_of_its_own(data: RunData) -> None:
    assert labels(data, "candidates") == ["bypass", "induce", "KL", "AUROC"]
    (apart,) = (view for view in figures(data)["candidates"].views if view.label == "AUROC")
    read = {(row["layer"], row["position"]): row["auroc"] for row in data.table("separation")}
    drawn = {(row["layer"], row["position"]): row["auroc"] for row in apart.spec["datasets"]["main"]}
    assert drawn == pytest.approx(read, abs=1e-4) and len(read) > 4
    assert "AUROC:" in figures(data)["candidates"].caption
    layers = {row["layer"] for row in data.table("candidates")}
    tables = {**data.tables, "candidates": [row for row in data.table("candidates") if row["layer"] % 5 == 0]}
    assert {row["layer"] for row in tables["candidates"]} < layers
    (apart,) = (v for v in figures(replace(data, tables=tables))["candidates"].views if v.label == "AUROC")
    chat = {row["position"] for row in data.table("candidates")}
    for row in apart.spec["datasets"]["main"]:
        assert (row["where"] == "instruction[−1]") == (row["position"] not in chat), "also of layers between"
    without = replace(data, tables={name: rows for name, rows in data.tables.items() if name != "separation"})
    assert labels(without, "candidates") == ["bypass", "induce", "KL"]
    assert "AUROC" not in figures(without)["candidates"].caption


@pytest.mark.long
def test_what_is_written_along_the_direction_is_drawn_without_a_lens(data: RunData) -> None:
    every = ["logit lens", "attention writes", "MLP writes", "attention along r̂", "MLP along r̂"]
    assert labels(data, "lens") == every
    tables = {name: rows for name, rows in data.tables.items() if name not in ("lens", "logits")}
    assert labels(replace(data, tables=tables), "lens") == every[3:]
    assert "ogit lens" not in figures(replace(data, tables=tables))["lens"].caption
    del tables["terms"]
    assert labels(replace(data, tables=tables), "lens") == []


def test_the_mechanism_stands_beside_its_controls_on_the_page(data: RunData) -> None:
    page = re.sub(r"\s+", " ", build.render(data).decode("utf-8").replace("\u202f", "\u00a0").replace("\u00a0", " "))
    assert "projection restored − random direction moved as far" in page
