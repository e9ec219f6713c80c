"""What comes out beside the page: redacted and compared pages, figures, tables, graphs, notebook display."""

from __future__ import annotations

import base64
import csv
import gzip
import html
import json
import shutil
import tomllib
import types
from pathlib import Path
from xml.etree import ElementTree

import altair as alt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from hypothesis import example, given, settings
from hypothesis import strategies as st

import reports
from reports import ReportError, build_report
from reports.charts_more import figures
from reports.compare import build_comparison
from reports.data import RunData, read_run
from reports.export import circuit_graphs, save_figures
from reports.notebook import findings_html
from reports.redact import redact, stand_in
from reports.schema import Summary
from suffix_analysis import records
from tests.fake_run import HOSTILE, make_fake_run


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_run(tmp_path_factory.mktemp("outputs") / "fake", n_prompts=12)


def whole_text(page: Path) -> str:
    """Everything the file holds, the packed payload included."""
    text = page.read_text("utf-8")
    packed = text.split('id="payload">')[1].split("</script>")[0]
    return text + gzip.decompress(base64.b64decode(packed)).decode("ascii")


@pytest.mark.long
def test_a_redacted_report_holds_no_suffix_target_or_reply(fake: Path) -> None:
    page = build_report(fake, redact=True)
    assert page.name == "report-redacted.html"
    text = whole_text(page)
    data = read_run(fake)
    target = data.summary.target
    assert target is not None and target not in text
    for suffix in data.suffixes:
        assert suffix.text.strip()[:12] not in text, suffix.text
        assert " ".join(map(str, suffix.ids[:4])) not in text
    for row in data.table("replies"):
        assert row["reply"] not in text and json.dumps(row["reply"])[1:-1] not in text
    assert stand_in(data.suffixes[0].text)[:20] in text, "its length and hash are there"
    assert "96" in text, "and the numbers are"
    # the same file unredacted holds them, so the test can fail
    assert data.suffixes[1].text.strip()[:12] in whole_text(build_report(fake))


def test_redaction_keeps_what_was_equal_equal(fake: Path) -> None:
    before, after = read_run(fake), redact(read_run(fake))
    texts = [row["reply"] for row in before.table("replies")]
    hidden = [row["reply"] for row in after.table("replies")]
    assert len(set(texts)) == len(set(hidden))
    assert redact(read_run(fake)).summary.target == stand_in(before.summary.target or "")
    suffix_tokens = [t for p in after.patterns for t, r in zip(p.tokens, p.regions, strict=True) if r == "suffix"]
    assert suffix_tokens and all(t.startswith("[") and t.endswith("]") for t in suffix_tokens)


@pytest.mark.long
def test_two_runs_stand_side_by_side(fake: Path, tmp_path: Path) -> None:
    other = make_fake_run(tmp_path / "other", n_prompts=12, seed=1)
    page = build_comparison(fake, other, tmp_path / "both.html")
    text = page.read_text("utf-8")
    assert "fake" in text and "other" in text
    for side in "ab":
        for name in ("refusal", "profile", "causal", "heads", "circuit"):
            assert f'data-figure="{name}-{side}"' in text
    assert "share of the fall, top heads" in text
    assert page.read_bytes() == build_comparison(fake, other, tmp_path / "again.html").read_bytes()
    hidden = whole_text(build_comparison(fake, other, tmp_path / "hidden.html", redact=True))
    assert read_run(fake).suffixes[0].text.strip() not in hidden


@pytest.mark.long
def test_every_figure_comes_as_svg_and_png_and_every_table_as_csv(fake: Path, tmp_path: Path) -> None:
    written = save_figures(fake, tmp_path / "out")
    names = {path.name for path in written}
    assert {
        "refusal.svg",
        "refusal.png",
        "circuit-adversarial-minus-none-with-the-suffix.svg",
        "profile-normalised.png",
    } <= names
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        if path.suffix == ".svg":
            assert path.read_text("utf-8").startswith("<svg")
    header = (tmp_path / "out" / "refusal.csv").read_text("utf-8").splitlines()[0]
    assert '"arm"' in header
    assert (tmp_path / "out" / "causal.csv").exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        save_figures(fake, blocked)


def test_the_circuit_is_a_graph_that_holds_together(fake: Path) -> None:
    graphs = circuit_graphs(read_run(fake))
    assert set(graphs) == {"none", "adversarial", "random"}
    graph = graphs["none"]
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(ids) == len(set(ids))
    assert all(link["source"] in ids and link["target"] in ids for link in graph["links"])
    assert [node["clerp"] for node in graph["nodes"] if node["is_target_logit"]] == ["refusal direction"]
    size = len(graph["metadata"]["prompt_tokens"])
    assert all(0 <= node["ctx_idx"] < size for node in graph["nodes"])
    json.dumps(graph)


class Findings:
    """What the notebook is given: the fields of suffix_analysis.records.Findings."""

    def __init__(self, run: Path) -> None:
        data = read_run(run)
        self.tables = data.tables
        self.summary = json.loads((run / "findings" / "summary.json").read_text("utf-8"))
        self.checks = [check.model_dump() for check in data.checks]
        self.patterns = [pattern.model_dump() for pattern in data.patterns]


def test_a_notebook_shows_findings_in_a_frame_of_their_own(fake: Path) -> None:
    shown = findings_html(Findings(fake))
    assert shown.startswith('<iframe sandbox="allow-scripts allow-downloads"') and shown.count("<") == 2
    assert "data-figure=&quot;heads&quot;" in shown


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(categories=None), max_size=60) | st.sampled_from(HOSTILE))
def test_hostile_findings_cannot_leave_the_notebooks_frame(text: str) -> None:
    summary = {"schema_version": 1, "model": text, "n_layers": 2, "n_heads": 2, "d_model": 8, "target": text}
    check = {"name": text, "value": text, "bound": text, "passed": None, "sentence": text}
    shown = findings_html(types.SimpleNamespace(tables={}, summary=summary, checks=[check], patterns=[]))
    # one frame and nothing beside it: every mark that could end the attribute or open an element is an entity
    assert shown.count("<") == 2 and shown.endswith("></iframe>")
    assert shown.split('srcdoc="')[1].count('"') == 3
    shown.encode("utf-8")


def test_findings_show_themselves_in_a_notebook() -> None:
    summary = {"schema_version": 1, "model": "m", "n_layers": 2, "n_heads": 2, "d_model": 8}
    page = records.Findings(tables={}, summary=summary)._repr_html_()
    assert page.startswith('<iframe sandbox="allow-scripts allow-downloads"') and "allow-same-origin" not in page


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=4, max_size=30).filter(lambda text: text.strip()))
@example('Sure, here is how:\n\nStep "1" \\ \x00')
def test_a_target_of_any_text_is_gone_from_the_redacted_settings(text: str) -> None:
    target = f"Sure,\n{text} end"
    summary = Summary(schema_version=1, model="m", n_layers=1, n_heads=1, d_model=1, target=target)
    data = RunData(name="r", config=tomli_w.dumps({"target": target, "steps": 3}), summary=summary, prompts=())
    shown = redact(data).config
    assert tomllib.loads(shown)["target"] == stand_in(target)


def test_no_cell_of_a_table_is_a_formula(fake: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(fake, tmp_path / "run"))
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a=1", ""]
    table = pa.table({"=cmd": texts, "text": pa.array(texts, pa.large_string()), "number": [-1.5] * 8})
    pq.write_table(table, run / "findings" / "zz.parquet")
    for path in (run / "findings").glob("*.parquet"):
        if path.stem != "zz":
            path.unlink()
    save_figures(run, tmp_path / "out")
    with (tmp_path / "out" / "zz.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["'=cmd", "text", "number"]
    assert [row[0] for row in rows] == [row[1] for row in rows] == [f"'{text}" for text in texts[:6]] + texts[6:]
    assert {row[2] for row in rows} == {"-1.5"}


def test_figures_of_hostile_names_are_valid_svg(fake: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(fake, tmp_path / "run"))
    for path in (run / "findings").glob("*.parquet"):
        if path.stem != "refusal":
            path.unlink()
    (run / "steps.jsonl").unlink()
    rows = pq.read_table(run / "findings" / "refusal.parquet").to_pylist()
    rows[0]["arm"] = "\x1b[31m<b>\x00\u202e"
    pq.write_table(pa.Table.from_pylist(rows), run / "findings" / "refusal.parquet")
    save_figures(run, tmp_path / "out")
    text = (tmp_path / "out" / "refusal.svg").read_text("utf-8")
    ElementTree.fromstring(text)
    assert "⟨ESC⟩" in text


def test_notebook_findings_may_hold_nan(fake: Path) -> None:
    found = Findings(fake)
    found.tables = {name: [dict(row) for row in rows] for name, rows in found.tables.items()}
    found.tables["refusal"][0]["refusal_rate"] = float("nan")
    found.tables["profile"][0]["mean"] = float("nan")
    page = html.unescape(findings_html(found))
    assert "nan" not in page.split('aria-label="Findings"')[1].split("</section>")[0]


@pytest.mark.long
def test_every_spec_is_valid_vega_lite(fake: Path) -> None:
    seen = set()
    for name, figure in figures(read_run(fake)).items():
        for view in figure.views:
            # most views of a figure differ in their rows only, which are plain numbers and words
            outline = {**view.spec, "datasets": {"main": view.spec["datasets"]["main"][:2]}}
            if (key := json.dumps({**outline, "datasets": None})) not in seen:
                assert alt.Chart.from_dict(outline, validate=True) is not None, (name, view.label)
            seen.add(key)
    assert len(seen) > 20
    with pytest.raises(Exception, match="wide"):
        alt.Chart.from_dict({**view.spec, "width": "wide"}, validate=True)


def test_the_pages_script_stays_small() -> None:
    script = Path(reports.__file__).parent / "static" / "report.js"
    assert len(script.read_text("utf-8").splitlines()) <= 350


def test_a_comparison_names_what_is_damaged(tmp_path: Path) -> None:
    first, second = (make_fake_run(tmp_path / name, n_prompts=6) for name in ("a", "b"))
    damaged = second / "findings" / "causal.parquet"
    damaged.write_bytes(damaged.read_bytes()[:200])
    told: list[str] = []
    build_comparison(first, second, on_unusable=told.append)
    assert len(told) == 1 and told[0].startswith("b, causal: ")
