"""A campaign as a user runs it: every attack once, a table of them, suffixes that a study takes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from suffix_analysis import attacking, cli
from suffix_analysis.files import read_table
from suffix_analysis.inputs import given_suffixes
from suffix_analysis.models import load_model
from suffix_analysis.runs import read_suffixes
from tests import tiny


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A command of 2 instructions × 1 seed × 2 settings on a tiny model."""
    tiny.hf_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tokens = [word for i in range(0, 700, 2) for word in ("--refusal-tokens", str(i))]
    return [
        "campaign", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--each",
        "--n-instructions", "2", "--vary", "search_width=[4, 8]", "--steps", "2", "--topk", "8", "--suffix-tokens", "3",
        "--prompts-per-split", "6", "--score-dtype", "float32", "--json", *tokens,
    ]  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["suffix-analysis", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


@pytest.mark.long
def test_a_campaign_goes_on_and_is_analysed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    made: list[str] = []
    build = attacking.build_attack

    def counted(model: object, train: object, config: object) -> object:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append("attack")
        return build(model, train, config)  # type: ignore[arg-type]

    monkeypatch.setattr(attacking, "build_attack", counted)
    assert run(monkeypatch, words) == 130 and len(made) == 3
    monkeypatch.setattr(attacking, "build_attack", build)
    for i, path in enumerate(p for p in (tmp_path / "run").rglob("*") if p.is_file()):  # the clock was set meanwhile
        os.utime(path, (2**i % 4 * 10**9,) * 2)
    capsys.readouterr()
    assert run(monkeypatch, words) == 0
    found = json.loads(capsys.readouterr().out)
    rows = read_table(tmp_path / "run" / "findings" / "campaign.parquet")
    assert found["attacks"] == rows and len(rows) == 4
    assert {(tuple(row["instructions"]), row["search_width"]) for row in rows} == {
        (tuple(row["instructions"]), width) for row in rows for width in (4, 8)
    }
    assert [(row["search_width"], row["n_attacks"]) for row in found["settings"]] == [(4, 2), (8, 2)]
    for row in rows:
        steps = tmp_path / "run" / "attacks" / str(row["attack"]) / "steps.jsonl"
        assert steps.read_text().count("\n") == 2
        assert 0 <= row["flipped"] <= 1 and 0 <= row["select_refusal"] <= 1
    own = read_suffixes(Path(found["suffixes"]))
    assert [s.id for s in own] == [row["suffix_id"] for row in rows]
    again = given_suffixes(Path(found["suffixes"]), load_model(str(tmp_path / "model")))
    assert [(s.text, s.arm) for s in again] == [(s.text, s.arm) for s in own]
    assert run(monkeypatch, [word for word in words if word != "--json"]) == 0
    told = capsys.readouterr()
    assert "campaign: done before" in told.err
    assert "search_width 4, 2 attacks: loss" in told.out and "instructions answered" in told.out


@pytest.mark.long
def test_a_campaign_goes_on_past_an_attack_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    """A suffix that does not fit into the context cannot be attacked with; the other setting can."""
    words = [word if word != "search_width=[4, 8]" else "suffix_tokens=[600, 4]" for word in words]
    words[words.index("--suffix-tokens") + 1] = "4"
    for _ in range(2):  # and so does the next call, which makes nothing again
        assert run(monkeypatch, words) == 3
        told = capsys.readouterr().err
        assert "2 of 4 attacks failed" in told and "Attack 1 of 4 (suffix_tokens = 600) failed: " in told
        rows = read_table(tmp_path / "run" / "findings" / "campaign.parquet")
        assert [(row["attack"], row["suffix_tokens"]) for row in rows] == [(2, 4), (4, 4)]
        assert len(read_suffixes(tmp_path / "run" / "suffixes.jsonl")) == 2


@pytest.mark.slow
def test_a_campaign_under_ray_is_the_same_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    """From the command line, with a cluster of its own: the same suffixes; what is there is not made again."""
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    assert run(monkeypatch, words) == 0
    here = json.loads(capsys.readouterr().out)["attacks"]
    there = tmp_path / "there"
    side = [str(there) if word == str(tmp_path / "run") else word for word in words] + ["--executor", "ray"]
    assert run(monkeypatch, side) == 0
    found = json.loads(capsys.readouterr().out)["attacks"]
    assert [(row["text"], row["arm"]) for row in found] == [(row["text"], row["arm"]) for row in here]
    (there / "findings" / "campaign.parquet").unlink()
    (there / "attacks" / "2" / "suffix.jsonl").unlink()
    assert run(monkeypatch, side) == 0
    again = capsys.readouterr()
    assert [row["text"] for row in json.loads(again.out)["attacks"]] == [row["text"] for row in here]
    assert "4/4 attacks done" in again.err and "3/4" not in again.err, "one attack was left"
