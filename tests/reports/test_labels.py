"""Words beside numbers come from the settings and from what was run."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from reports.charts_heads import grid_bounds, head_grid
from reports.charts_more import candidates
from reports.compare import render
from reports.data import RunData, read_run
from reports.page import BUDGETS, facts, repeat_command, replies
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
