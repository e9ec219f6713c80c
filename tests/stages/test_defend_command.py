"""`suffix-analysis defend` as its user calls it: on a run of a tiny model with given suffixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from suffix_analysis import cli, defence_stage, mitigations
from suffix_analysis.errors import UserError
from suffix_analysis.files import read_table
from tests import tiny

pytestmark = pytest.mark.long
TEXTS = {"adversarial": "red green blue", "random": "pick lock bake", "benign": "one two three"}


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str, Any]:
    monkeypatch.setattr("sys.argv", ["suffix-analysis", *words])
    code: Any = 0
    try:
        cli.main()
    except SystemExit as left:
        code = left.code
    told = capsys.readouterr()
    return told.out, told.err, code


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run with three suffixes of each of three arms."""
    folder = tmp_path / "model"
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    words = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "tea", "sea")
    for kind, verb in (("harmful", "Break"), ("harmless", "Bake")):
        rows = [
            {"id": f"{kind}-{split}-{word}", "text": f"{verb} the {word} thing of {split}", "split": split}
            for split in ("fit", "select", "report")
            for word in words
        ]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [
        {"id": f"{arm}-{i}", "arm": arm, "text": " ".join([text.split()[i], *text.split()])}
        for arm, text in TEXTS.items()
        for i in range(3)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    _, err, _ = call(
        monkeypatch, capsys, "run", "--model", str(folder), "--out", str(tmp_path / "run"), "--reply-tokens", "8",
        "--harmful", str(tmp_path / "harmful.jsonl"), "--harmless", str(tmp_path / "harmless.jsonl"),
        "--suffixes", str(tmp_path / "mine.jsonl"), "--n-fit", "12", "--n-select", "12", "--refusal-tokens", "[40, 41]",
        "--score-dtype", "float32", "--induce-threshold", "-1e6", "--kl-threshold", "1e6", "--no-keep-by-score",
        "--n-traced", "4", "--n-causal", "2", "--n-controls", "1", "--n-traced-controls", "1", "--n-instructions", "2",
        "--search-width", "6", "--topk", "16",
    )  # fmt: skip
    assert (tmp_path / "run" / "report.html").exists(), err
    return tmp_path / "run"


def test_the_command_prints_its_tables_and_renews_the_report(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mitigations, "refused", lambda model, prompts, *_: mitigations.torch.ones(len(prompts)) > 0)
    findings = run / "findings"
    out, err, _ = call(monkeypatch, capsys, "defend", str(run), "--most", "4", "--adaptive-steps", "2")
    for phrase in (
        "windowed perplexity", "conversations set no threshold for 1 %", "attack success", "fires in",
        "attacked for 2 steps", "the detector fires in", "detectors alone: adaptive attack: not tested", "not tested",
    ):  # fmt: skip
        assert phrase in out, (phrase, out, err)
    page = (run / "report.html").read_text()
    assert 'id="defences"' in page and "What a defence costs an attacker who knows it" in page
    rows = read_table(findings / "adaptive.parquet")
    assert {row["step"] for row in rows} == {0, 1, 2}
    # what the folder holds is read, and printed alike
    with monkeypatch.context() as patch:
        for name in ("measure_detectors", "measure_mitigations", "attack_defences"):
            patch.setattr(defence_stage, name, None)
        again, err, code = call(monkeypatch, capsys, "defend", str(run), "--most", "4", "--adaptive-steps", "2")
        assert err.count("before and are read") == 2 and not code, err
        assert again == out
        patch.setattr(defence_stage, "attack_defences", lambda *_, **__: [row | {"loss": 7.0} for row in rows])
        call(monkeypatch, capsys, "defend", str(run), "--most", "4", "--adaptive-steps", "3")
        assert {row["loss"] for row in read_table(findings / "adaptive.parquet")} == {7.0}
    # a table that is gone is measured; an interruption there forgets no finished attack
    (findings / "mitigations.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(defence_stage, "measure_mitigations", interrupted)
        assert call(monkeypatch, capsys, "defend", str(run), "--most", "4")[2] == 130
        patch.undo()
        patch.setattr(defence_stage, "attack_defences", None)
        words = ("defend", str(run), "--most", "4", "--adaptive-steps", "3")
        out, err, code = call(patch, capsys, *words)
        assert "read for the detectors" in err and "attacks were made before" in err and not code, err
    # so is another number of prompts
    out, err, _ = call(monkeypatch, capsys, "defend", str(run), "--most", "3")
    assert "read for the detectors" in err and "attack success" in out
    # an attack on what was fitted with other prompts is not of this defence
    assert "made with other inputs" in err and not (findings / "adaptive.parquet").exists()
    assert not (findings / "adaptive_budget.parquet").exists() and "attacked for" not in out
    # tables that other code has measured are not printed as this one's
    monkeypatch.setattr(defence_stage, "CODE", defence_stage.CODE[:-1])
    out, err, _ = call(monkeypatch, capsys, "defend", str(run), "--most", "3")
    assert "read for the detectors" in err


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_adaptive_attack_that_cannot_be_made_is_told_before_anything_is_measured(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_few(*_: object) -> None:
        raise UserError("There are too few prompts.")

    monkeypatch.setattr(mitigations, "split_for_attack", too_few)
    _, err, _ = call(monkeypatch, capsys, "defend", str(run), "--most", "4", "--adaptive-steps", "2")
    assert err.strip().splitlines()[-1] == "suffix-analysis: There are too few prompts."
    assert not (run / "findings" / "detectors.parquet").exists()
