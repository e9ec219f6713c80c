"""Damaged, foreign and unfinished run folders: a report of what is there, which says what is not and why."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reports import ReportError, build_report
from reports.charts_more import figures
from reports.data import missing_lines, read_run
from reports.export import circuit_graphs, save_figures
from reports.page import unfinished
from reports.schema import CIRCUIT_ENDS, KEYS
from suffix_analysis import cli
from tests.fake_run import make_fake_run


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_run(tmp_path_factory.mktemp("bad") / "fake", n_prompts=6)


@pytest.fixture
def run(fake: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fake, tmp_path / "run"))


def change(path: Path, new: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change every row of a parquet table in place; rows for which ``new`` gives None go."""
    rows = [changed for row in pq.read_table(path).to_pylist() if (changed := new(row)) is not None]
    pq.write_table(pa.Table.from_pylist(rows), path)


def only_line(run: Path) -> str:
    """The one line that the report has of what it could not use."""
    (line,) = missing_lines(read_run(run))
    return line


@pytest.mark.parametrize("name", ["summary.json", "prompts.jsonl"])
def test_truncated_files_that_are_needed_are_refused(run: Path, name: str) -> None:
    path = next(run.rglob(name))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ReportError, match=re.escape(name)) as error:
        read_run(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["patterns.json", "refusal.parquet", "suffixes.jsonl", "checks.json", "env.json", "status.json"]
)
def test_other_truncated_files_are_listed_with_the_reason(run: Path, name: str) -> None:
    path = next(run.rglob(name))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    line = only_line(run)
    assert name in line and "not used: " in line and str(run) not in line
    if name == "refusal.parquet":
        page = build_report(run).read_text("utf-8")
        assert "repeat the" in page.split('id="missing"')[1].split("</section>")[0]


def test_tables_that_only_some_runs_have_are_listed_where_they_are_damaged(run: Path) -> None:
    (run / "findings" / "mitigations.parquet").write_bytes(b"PAR1")
    assert only_line(run).startswith("findings/mitigations.parquet – not used: is not a readable parquet file")


def test_the_command_draws_what_is_there_names_what_is_damaged_and_says_so_by_its_exit_code(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report() -> int:
        monkeypatch.setattr("sys.argv", ["suffix-analysis", "report", str(run), "--out", str(run / "page.html")])
        try:
            cli.main()
        except SystemExit as done:
            return int(done.code or 0)
        return 0

    assert report() == 0 and capsys.readouterr().err == ""
    whole = (run / "page.html").read_bytes()
    (run / "findings" / "factors.parquet").write_bytes(b"PAR1 cut")
    (run / "page.html").unlink()
    assert report() == 3
    told = capsys.readouterr()
    assert "factors.parquet" in told.err and "Traceback" not in told.err and "page.html" in told.out
    assert 0 < (run / "page.html").stat().st_size != len(whole)


def test_foreign_tables_and_columns_of_another_type_are_not_used(run: Path) -> None:
    pq.write_table(pa.table({"other": [1]}), run / "findings" / "heads.parquet")
    assert "lacks the column 'arm'" in only_line(run)
    change(run / "findings" / "profile.parquet", lambda row: {**row, "mean": "high"})
    change(run / "findings" / "shift.parquet", lambda row: {**row, "layer": row["layer"] + 0.5})
    lines = " ".join(missing_lines(read_run(run)))
    assert "column 'mean' holds 'high' where a number was expected" in lines
    assert "where a whole number was expected" in lines
    build_report(run)


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_is_empty_takes_its_table_only(run: Path, name: str) -> None:
    path = run / "findings" / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"the invented run has no {name}")
    whole = pq.read_table(path).to_pylist()
    for key in KEYS[name]:
        pq.write_table(pa.Table.from_pylist([{**whole[0], key: None}, *whole[1:]]), path)
        data = read_run(run)
        assert key in data.unusable[name], key
        assert name not in data.tables


@pytest.mark.parametrize("kind", CIRCUIT_ENDS)
def test_an_edge_without_an_end_takes_the_circuit_only(run: Path, kind: str) -> None:
    for key in CIRCUIT_ENDS[kind]:
        path = run / "findings" / "circuit.parquet"
        whole = path.read_bytes()
        change(path, lambda row, key=key: {**row, key: None} if row["kind"] == kind else row)  # type: ignore[misc]
        assert f"column {key!r} is empty" in only_line(run)
        path.write_bytes(whole)


def test_every_value_that_may_lack_may_lack(run: Path) -> None:
    for name, keys in KEYS.items():
        path = run / "findings" / f"{name}.parquet"
        ends = {end for ends in CIRCUIT_ENDS.values() for end in ends} if name == "circuit" else set()
        if path.exists():
            change(path, lambda row: {k: v if k in (*keys, *ends) else None for k, v in row.items()})  # noqa: B023
    assert missing_lines(read_run(run)) == []
    build_report(run)
    circuit_graphs(read_run(run))


def test_columns_of_older_runs_may_be_absent(run: Path) -> None:
    for name, lost in (("causal", ("refused_lo", "refused_hi")), ("interventions", ("complied_lo", "complied_hi"))):
        change(run / "findings" / f"{name}.parquet", lambda row: {k: v for k, v in row.items() if k not in lost})  # noqa: B023
    change(run / "findings" / "refusal.parquet", lambda row: {k: v for k, v in row.items() if k != "complied_hi"})
    assert "giving the projection back: 93" in build_report(run).read_text("utf-8")


def test_values_that_no_page_can_show_are_left_out(run: Path) -> None:
    change(run / "findings" / "profile.parquet", lambda row: {**row, "made": b"\xff", "parts": [1, 2]})
    figures(read_run(run))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_patterns_without_a_number_are_not_used(run: Path, value: float | None) -> None:
    path = run / "findings" / "patterns.json"
    records = json.loads(path.read_text())
    records[0]["attention"][0][3][1] = value
    path.write_text(json.dumps(records))
    assert "record 0: attention.0.3.1 is wrong" in only_line(run)
    records[0]["attention"][0][3][1] = 0.1
    path.write_text(json.dumps(records).replace("0.1,", "1e999,", 1))
    assert "not used" in only_line(run)


def test_patterns_must_fit_their_tokens(run: Path) -> None:
    path = run / "findings" / "patterns.json"
    records = json.loads(path.read_text())
    records[0]["regions"].pop()
    path.write_text(json.dumps(records))
    assert "does not have 8 heads" in only_line(run)


def test_a_step_that_is_half_written_costs_itself_only(run: Path) -> None:
    path = run / "steps.jsonl"
    path.write_text(path.read_text().rstrip()[:-30])
    data = read_run(run)
    assert len(data.steps) == 249
    assert only_line(run).endswith("its last line is half written; the lines before it are shown.")
    path.write_text("{" + path.read_text())
    assert read_run(run).steps == () and "line 1 is not complete JSON" in only_line(run)


@pytest.mark.parametrize(
    ("state", "phrase"), [("running", "still going"), ("partly done", "stopped before"), ("failed", "failed before")]
)
def test_a_run_that_is_not_done_says_so_at_the_top(run: Path, state: str, phrase: str) -> None:
    assert unfinished(read_run(run)) == ""
    path = run / "status.json"
    status = json.loads(path.read_text())
    stages = {**status["stages"], "analyze": {"state": "interrupted", "seconds": 3}}
    path.write_text(json.dumps({**status, "state": state, "stages": stages}))
    note = unfinished(read_run(run))
    assert phrase in note and "attack, direction, replies." in note
    if state == "running":
        page = build_report(run).read_text("utf-8")
        assert note in page and page.index('id="unfinished"') < page.index('id="figures"')


def test_a_damaged_table_does_not_stop_the_figures(run: Path) -> None:
    for path in (run / "findings").glob("*.parquet"):
        if path.stem not in ("refusal", "circuit"):
            path.unlink()
    (run / "steps.jsonl").unlink()
    (run / "findings" / "extra.parquet").write_bytes(b"PAR1 cut")
    nested = pa.table({"parts": [[1, 2], [3]]})
    pq.write_table(nested, run / "findings" / "nested.parquet")
    with pytest.raises(ReportError, match=r"without extra.parquet .*, nested.parquet .*repeat the stage") as error:
        save_figures(run, run / "out")
    assert "\n" not in str(error.value)
    names = {path.name for path in (run / "out").iterdir()}
    assert {"refusal.csv", "refusal.svg", "circuit-none.json"} <= names
    assert not {"extra.csv", "nested.csv"} & names
