"""The report from a run folder: validation, headline, determinism, escaping, size."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reports import ReportError, build, build_report, charts
from reports.charts_more import figures
from reports.data import MISSING_MEANS, read_run
from reports.evidence import adversarial_count
from reports.numbers import percent, plain
from reports.text import checked, headline, not_checked
from tests.fake_run import make_fake_run


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_run(tmp_path_factory.mktemp("run") / "fake")


@pytest.fixture
def run(fake: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fake, tmp_path / "run"))


def plain_text(sentences: list[str]) -> str:
    return re.sub(r"[\u00a0\u202f]", " ", " ".join(sentences))


def rewrite(path: Path, change: Any) -> None:
    """Change every row of a parquet table in place; rows for which ``change`` gives None go."""
    rows = [new for row in pq.read_table(path).to_pylist() if (new := change(row)) is not None]
    pq.write_table(pa.Table.from_pylist(rows), path)


# Reading


def test_a_whole_run_is_read(fake: Path) -> None:
    data = read_run(fake)
    assert data.missing == ()
    assert data.summary.n_layers == 30
    assert len(data.table("heads")) == 2 * 5 * 30 * 9


@pytest.mark.parametrize("name", ["config.toml", "prompts.jsonl", "findings/summary.json"])
def test_required_files_must_be_there(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(ReportError, match=re.escape(Path(name).name)):
        read_run(run)


def test_no_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="No run folder at"):
        build_report(tmp_path / "nothing")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_schema_versions_are_refused(run: Path, version: object) -> None:
    path = run / "findings" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": version}))
    with pytest.raises(ReportError, match="schema_version"):
        read_run(run)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_run(tmp_path_factory.mktemp("run") / "small", n_prompts=6)


@pytest.mark.parametrize("name", MISSING_MEANS)
def test_missing_findings_are_listed_and_the_page_still_builds(small: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(small, tmp_path / "run"))
    path = next(p for p in run.rglob("*") if p.stem == name)
    path.unlink()
    assert read_run(run).missing == (name,)
    page = build_report(run).read_text(encoding="utf-8")
    assert "Missing from this run" in page
    assert path.name in page.split('id="missing"')[1].split("</section>")[0]


def test_a_run_without_any_findings_builds(run: Path) -> None:
    for path in [p for p in run.rglob("*") if p.stem in MISSING_MEANS]:
        path.unlink()
    page = build_report(run).read_text(encoding="utf-8")
    assert "The findings that the headline needs are not in this run folder." in page


# The story


def test_headline_tells_what_the_data_hold(fake: Path) -> None:
    text = plain_text(headline(read_run(fake)))
    assert (
        "The refusal phrase rate fell from 96 % (CI 92–100 %) to 41 % (CI 32–49 %) on 130 unseen instructions" in text
    )
    assert "its tokens shuffled, of the controls of the same length the nearest, " in text
    assert "At layer 17" in text and "0 = harmless mean, 1 = harmful mean" in text
    assert "The 8 heads" in text and "chosen on the select split, shown on the report split" in text
    assert "ablating the direction takes refusals of harmful instructions from 96 % (CI 92–100 %) to 0.8 %" in text
    assert "One suffix: intervals cover prompts only, descriptive about suffixes." in text
    assert "jailbreak" not in text


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("refusal", "The refusal phrase rate"),
        ("profile", "normalised projection"),
        ("shift", "of their attention"),
        ("interventions", "ablating the direction"),
        ("interventions", "weights without the direction comply with"),
    ],
)
def test_a_clause_goes_with_its_data(run: Path, name: str, phrase: str) -> None:
    assert phrase in plain_text(headline(read_run(run)))
    (run / "findings" / f"{name}.parquet").unlink()
    assert phrase not in plain_text(headline(read_run(run)))


def test_a_contrast_that_covers_zero_takes_the_fall_away(run: Path) -> None:
    rewrite(run / "findings" / "contrasts.parquet", lambda row: {**row, "lo": -0.2, "hi": 0.1})
    text = plain_text(headline(read_run(run)))
    assert "fell from" not in text
    assert "the interval does not tell a change" in text


def test_overlapping_intervals_take_the_fall_away_where_no_contrast_is_stored(run: Path) -> None:
    (run / "findings" / "contrasts.parquet").unlink()
    assert "fell from" in plain_text(headline(read_run(run)))
    rewrite(run / "findings" / "refusal.parquet", lambda row: {**row, "refusal_lo": 0.1, "refusal_hi": 0.99})
    assert "The refusal phrase rate fell" not in plain_text(headline(read_run(run)))


def test_the_control_that_does_as_well_is_named(run: Path) -> None:
    rewrite(
        run / "findings" / "contrasts.parquet",
        lambda row: {**row, "lo": -0.2, "hi": 0.1} if row["against"] != "none" else row,
    )
    assert "(not clearly different from the suffix)" in plain_text(headline(read_run(run)))


def test_unseen_needs_proof(run: Path) -> None:
    path = run / "suffixes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    report_id = next(p.id for p in read_run(run).prompts if p.split == "report")
    for row in rows:
        row["trained_on"] = [report_id]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert "unseen" not in plain_text(headline(read_run(run)))


def test_the_suffix_note_depends_on_their_number(tmp_path: Path) -> None:
    for number, phrase in ((1, "One suffix:"), (5, "5 suffixes: too few"), (8, "")):
        data = read_run(make_fake_run(tmp_path / str(number), n_adversarial=number, n_prompts=10))
        assert adversarial_count(data) == number
        text = plain_text(headline(data))
        assert phrase in text if phrase else "descriptive" not in text


def test_the_mean_and_the_sum_over_heads_read_the_same(run: Path) -> None:
    whole = plain_text(headline(read_run(run)))
    keys = ("attention", "attention_lo", "attention_hi")
    rewrite(
        run / "findings" / "shift.parquet",
        lambda row: {**row, **{key: row[key] / 8 for key in keys}} if row["layer"] == -1 else row,
    )
    assert plain_text(headline(read_run(run))) == whole


def test_checks_put_failures_first_and_silence_is_said(run: Path) -> None:
    lines = checked(read_run(run))
    assert [line.passed for line in lines] == [False, True, True, True]
    said = " ".join(not_checked(read_run(run)))
    for phrase in ("independent attacks", "failed", "Random directions"):
        assert phrase in said
    assert "Adaptive attacks on a detector alone" in said and "not tested" not in said and "Other models" in said
    (run / "findings" / "adaptive.parquet").unlink()
    assert "Adaptive attacks: not tested." in " ".join(not_checked(read_run(run)))


def test_differences_that_are_not_powered_are_counted(run: Path) -> None:
    assert "too few prompts" not in " ".join(not_checked(read_run(run)))
    table = run / "findings" / "contrasts.parquet"
    rewrite(table, lambda row: {**row, "verdict": "not powered" if row["against"] == "benign" else "within the bound"})
    (line,) = (line for line in not_checked(read_run(run)) if "between arms" in line)
    assert line == "2\xa0differences between arms: too few prompts or suffixes to tell it from none."


def test_without_causal_tests_the_page_says_so(run: Path) -> None:
    (run / "findings" / "causal.parquet").unlink()
    assert any("attention edges" in sentence for sentence in not_checked(read_run(run)))


def test_the_headline_tells_the_mechanism(run: Path) -> None:
    said = plain_text(headline(read_run(run)))
    assert (
        "Of the fall in projection (32 report prompts) 58" in said
        and "is written by top heads, 25" in said
        and "and 17" in said
    )
    assert "comes from a changed query and 31" in said and "dilution by the suffix" in said
    assert "chat tokens' changed keys" not in said, "parts below a tenth are left to the table"
    assert "giving the projection back brings that to 93" in said
    assert "the same step along a random direction (a control): 41 % (CI 31–47 %), no clear change" in said


@pytest.mark.long
def test_what_a_defence_costs_its_attacker_is_told_once(run: Path) -> None:
    page = build_report(run).read_text("utf-8")
    assert page.count("Attacks that know the defence") == 1
    figure = figures(read_run(run))["adaptive"]
    told = plain_text([figure.caption])
    assert (
        "97 % of the select prompts not refused (half of them first at step 5), 70 % (CI 50–85 %) of 32 report prompts "
        "answered"
    ) in told
    (run / "findings" / "adaptive.parquet").unlink()
    assert "adaptive" not in figures(read_run(run))
    assert "Adaptive attack: not tested." in build_report(run).read_text("utf-8")


def test_numbers() -> None:
    assert plain(-0.004) == "0.00" and plain(-1.5) == "−1.50" and plain(None) == "–"
    assert [percent(x).replace("\u202f", " ") for x in (0, 0.008, 0.41, 0.996, 1)] == [
        "0 %",
        "0.8 %",
        "41 %",
        "99.6 %",
        "100 %",
    ]


# The file


@pytest.mark.long
def test_the_same_folder_gives_the_same_bytes(run: Path) -> None:
    first = build_report(run).read_bytes()
    assert build_report(run, run / "again.html").read_bytes() == first
    code = (
        "import sys; from pathlib import Path; from reports import build_report; build_report(*map(Path, sys.argv[1:]))"
        "; assert 'torch' not in sys.modules"
    )
    for seed in ("1", "2"):
        out = run / f"seed{seed}.html"
        env = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", code, str(run), str(out)], check=True, env=env, cwd=Path(__file__).parents[2]
        )
        assert out.read_bytes() == first


def test_our_own_words_need_no_escaping(fake: Path) -> None:
    page = build.render(read_run(fake)).decode("utf-8")
    shown = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "⟨" not in shown and "None" not in shown and "nan" not in re.sub(r"\w*nano?\w+|\w+nan\w*", "", shown)


def test_the_file_appears_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = build_report(run)
    assert target == run / "report.html"
    before = target.read_bytes()

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(ReportError, match="No space left"):
        build_report(run)
    assert target.read_bytes() == before
    assert [p for p in run.iterdir() if p.suffix == ".tmp"] == []


def test_vegas_script_is_bundled_once_and_a_damaged_or_closed_cache_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(
        build.vl_convert, "javascript_bundle", lambda snippet: made.append(snippet) or f"/* {snippet} */"
    )
    monkeypatch.setenv("SUFFIX_ANALYSIS_CACHE", str(tmp_path / "cache"))
    assert [build._vega_bundle("a"), build._vega_bundle("a"), build._vega_bundle("b")] == ["/* a */"] * 2 + ["/* b */"]
    assert made == ["a", "b"]
    for kept in (tmp_path / "cache").iterdir():
        kept.write_bytes(kept.read_bytes()[:-4])
    assert build._vega_bundle("a") == build._vega_bundle("a") == "/* a */"
    assert made == ["a", "b", "a"]
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SUFFIX_ANALYSIS_CACHE", str(tmp_path / "file"))
    assert build._vega_bundle("a") == "/* a */"


@pytest.mark.long
def test_size(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = read_run(fake)
    assert len(build.render(data)) <= build.MAX_BYTES
    scripts = sum(len(source) for _, source in build._scripts())
    monkeypatch.setattr(build, "MAX_BYTES", scripts + 250_000)
    page = build.render(data)
    assert len(page) <= scripts + 250_000
    assert b"The page was cut to stay small" in page
    monkeypatch.setattr(build, "MAX_BYTES", 1000)
    with pytest.raises(ReportError, match="would take"):
        build.render(data)


def test_reports_imports_no_torch() -> None:
    unwanted = "{'torch', 'attacks', 'suffix_analysis', 'circuitsvis'}"
    code = f"import sys, reports.build; print(sorted({unwanted} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"


def test_layers_where_the_classes_hardly_differ_are_left_out_of_the_normalised_profile() -> None:
    rows = [
        {"arm": arm, "layer": layer, "measure": "normalised", "mean": 0.5, "lo": 0.5 - half, "hi": 0.5 + half}
        for arm, halves in {
            "none": (9.0, 0.1, 0.1),
            "harmless": (0.1, 0.1, 0.2),
            "adversarial": (9.0, 9.0, 0.1),
        }.items()
        for layer, half in enumerate(halves)
    ]
    assert charts._uncertain(rows) == {0, 2}, "prompts without a suffix decide"
    assert charts._uncertain([]) == set()
