"""Words beside numbers come from the settings and from what was run."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from reports.attention import arm_view
from reports.charts_heads import grid_bounds, head_grid
from reports.charts_more import candidates
from reports.compare import render
from reports.data import RunData, read_run
from reports.errors import AGAIN, again
from reports.numbers import digits_of
from reports.page import BUDGETS, facts, repeat_command, replies
from reports.pinned import pinned_heads
from reports.schema import Pattern
from tests.fake_run import make_fake_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(make_fake_run(tmp_path_factory.mktemp("labels") / "run", n_prompts=6))


def titles(data: RunData) -> str:
    figure = candidates(data)
    assert figure is not None
    return str([view.spec["layer"][0]["encoding"]["y"]["title"] for view in figure.views])


def test_bounds_of_candidates_are_the_settings(data: RunData) -> None:
    told = titles(replace(data, config="kl_threshold = 0.25\ninduce_threshold = -1.5\n"))
    assert "(must be ≥ -1.5)" in told and "(must be ≤ 0.25)" in told
    assert "must be" not in titles(replace(data, config="kl_threshold = [")), "unknown bounds are not made up"


def test_a_target_is_told_only_where_an_attack_ran(data: RunData) -> None:
    assert any("target" in fact for fact in facts(data, None))
    assert not any("target" in fact for fact in facts(replace(data, config='suffixes = "mine.jsonl"\n'), None))


@pytest.mark.parametrize(
    ("place", "folder", "again"),
    [
        ("runs/my run", "'runs/my run/config.toml'", "'runs/my run-again'"),
        ("/tmp/x", "/tmp/x/config.toml", "/tmp/x-again"),
        (".", "config.toml", "../x-again"),
        ("..", "../config.toml", "../../x-again"),
    ],
)
def test_the_command_works_where_the_folder_was_given(place: str, folder: str, again: str) -> None:
    assert repeat_command(place, "x") == f"suffix-analysis run --config {folder} --out {again}"
    subprocess.run(["sh", "-nc", repeat_command(place, "x")], check=True)


def test_the_folder_as_given_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fake_run(tmp_path / "runs" / "x", n_prompts=4)
    monkeypatch.chdir(tmp_path)
    assert read_run(Path("runs/x")).place == "runs/x"


def test_an_empty_reply_is_not_one_that_was_left_out(data: RunData) -> None:
    rows = [{**row, "reply": ""} for row in data.table("replies")]
    empty = replace(data, tables=data.tables | {"replies": rows})
    assert replies(empty, BUDGETS[0])["texts"] == [""]
    assert replies(data, replace(BUDGETS[0], reply_chars=0))["texts"] == [None]


def test_two_runs_share_their_colours_and_tell_what_they_lack(data: RunData) -> None:
    other = replace(
        data,
        name="other",
        tables=data.tables | {"heads": [{**r, "contribution": 3 * r["contribution"]} for r in data.table("heads")]},
        missing=("steps",),
        status=None if data.status is None else data.status.model_copy(update={"state": "partly done"}),
    )
    grids = [head_grid(run, grid_bounds(beside)) for run, beside in ((data, other), (other, data))]
    assert all(grid is not None for grid in grids)
    domains = [str(grid.views[0].spec["layer"][0]["encoding"]["color"]["scale"]["domain"]) for grid in grids if grid]
    assert domains[0] == domains[1]
    page = render(data, other).decode("utf-8")
    assert "Click a head to pin it" not in page
    assert "steps.jsonl – the loss curve of the attack" in page and "stopped before its end" in page
    assert page.count("Ablating a random direction of the same norm leaves refusals as they are.") == 2


def test_a_pattern_without_contributions_is_shown_all_the_same() -> None:
    pattern = Pattern(
        prompt_id="a", arm="none", tokens=["x", "y"], regions=["instruction", "chat"], heads=[(1, 0), (1, 2)],
        attention=[[[1.0, 0.0], [0.5, 0.5]]] * 2,
    )  # fmt: skip
    view = arm_view(pattern)
    assert view["by_head"] == [[0, 0], [0, 0]] and view["contribution"] == [0, 0]
    assert view["places"] == ["instruction −1", "chat −1"]


def test_what_to_do_about_a_damaged_file_keeps_what_no_stage_writes_again() -> None:
    assert "restore it" in again("runs/a/config.toml") and "restore it" in again("runs/a/steps.jsonl, line 3")
    assert again("runs/a/findings/heads.parquet") == AGAIN


def test_a_layers_record_sums_its_heads(data: RunData) -> None:
    records = pinned_heads(data)["heads"]
    heads = [records[f"L3.H{head}"]["arms"]["random"] for head in range(9)]
    layer = records["L3"]["arms"]["random"]

    def number(value: object) -> float:
        return value[0] if isinstance(value, list) else value  # type: ignore[return-value]

    assert layer[0] == pytest.approx(sum(number(row[0]) for row in heads)), "no row of the terms is known of this arm"
    assert layer[1] == pytest.approx(sum(number(row[1]) for row in heads) / 9)
    assert records["L3"]["about"].startswith("all 9") and records["L16.H4"]["label"] == "L16.H4 (top 1)"
    assert [*records][:8] == [name for name in records if "(top" in records[name]["label"]], "top heads come first"


def test_small_effects_keep_two_digits() -> None:
    assert [digits_of(value) for value in (3.2, 0.31, 0.0031, None, 0.0)] == [2, 2, 4, 2, 2]
