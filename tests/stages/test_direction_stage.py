"""The direction as a stage of a study: what is said early, and what is kept when it fails."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from reports import build_report
from suffix_analysis import cli
from suffix_analysis.analysis import as_long
from suffix_analysis.causal_tests import ATTENTION, shortfalls
from suffix_analysis.config import StudyConfig
from suffix_analysis.console import Console
from suffix_analysis.errors import UserError
from suffix_analysis.files import read_table
from suffix_analysis.records import Suffix
from suffix_analysis.study import Study
from tests import tiny


def gzip_of(page: str) -> str:
    """The data that a page holds."""
    packed = re.search(r'id="payload"[^>]*>([^<]*)<', page)
    assert packed is not None
    return gzip.decompress(base64.b64decode(packed.group(1))).decode()


def study(folder: Path, n: int, **settings: Any) -> Study:
    """A study of a tiny model on ``n`` prompts of each kind and split."""
    for kind, word in (("harmful", "Break"), ("harmless", "Bake")):
        rows = [
            {"id": f"{kind}-{split}-{i}", "text": f"{word} thing {i} of {split}", "split": split}
            for split in ("fit", "select", "report")
            for i in range(n)
        ]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {kind: str(folder / f"{kind}.jsonl") for kind in ("harmful", "harmless")}
    made = Study(
        folder / "run", StudyConfig(**files, refusal_tokens=(5,), score_dtype="float32", **settings), Console()
    )
    made.folder.mkdir()
    (made.folder / "findings").mkdir()
    made._model = tiny.model("llama")
    return made


def test_too_few_prompts_are_refused_before_the_attack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"14 harmful prompts .* 7 for extraction \(at least 8\)"):
        study(tmp_path, 7)._prompts()


def test_fewer_prompts_than_asked_for_are_told(tmp_path: Path) -> None:
    made = study(tmp_path, 9, n_fit=9, n_select=10)
    made._prompts()
    assert json.loads((made.folder / "skipped.json").read_text()) == [
        f"The direction comes from 9 {kind} prompts and is chosen on 9; asked for were 9 and 10."
        for kind in ("harmful", "harmless")
    ]


def test_the_table_is_kept_and_shown_where_no_candidate_passes(tmp_path: Path) -> None:
    made = study(tmp_path, 10, n_fit=10, n_select=10, induce_threshold=1e6, keep_by_score=False)
    (made.folder / "config.toml").write_text("")
    made._prompts()
    with pytest.raises(UserError, match=r"does not induce .* All candidates are in .*candidates\.parquet"):
        made._direction()
    rows = read_table(made.folder / "findings" / "candidates.parquet")
    assert len(rows) == 3 * made.model.chat("x").n_chat and {"token", "status"} <= rows[0].keys()
    assert not (made.folder / "direction.safetensors").exists()
    page = build_report(made.folder).read_text()
    assert "How the direction was chosen" in page and "findings/interventions.parquet" in page


def test_a_model_that_does_not_refuse_is_told_before_the_attack_also_where_tokens_are_given(tmp_path: Path) -> None:
    made = study(tmp_path, 10)
    made._prompts()
    with pytest.raises(UserError, match=r"of 10 replies of tiny-llama to harmful prompts open with the refusal tokens"):
        made.refusal_tokens()


def test_a_text_that_is_too_short_is_told_before_the_attack(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(UserError, match="has 0 tokens; give a longer one"):
        study(tmp_path, 10, text=str(tmp_path / "text.txt"))._prompts()


def test_what_a_study_lacks_is_told_once(tmp_path: Path) -> None:
    made = study(tmp_path, 8)
    for _ in range(2):  # a stage that was interrupted says it again
        made.skip("There is no such thing.")
    assert json.loads((made.folder / "skipped.json").read_text()) == ["There is no such thing."]


def test_arms_of_another_length_are_left_out_of_the_causal_tests_and_told() -> None:
    attacks = [Suffix(f"adversarial-{i}", "adversarial", "x y", n_tokens=n) for i, n in ((1, 4), (2, 6))]
    others = [Suffix(f"random-{i}", "random", "a b", n_tokens=n) for i, n in ((1, 4), (2, 6))]
    kept, told = as_long(attacks, [*others, Suffix("failed-1", "failed", "a", n_tokens=4), *attacks])
    assert kept == others
    assert told == [
        "The failed suffixes are 4.0 tokens long on average, the adversarial ones 5.0; they were left out of the "
        "causal tests."
    ]


def test_tests_that_a_small_model_has_no_control_for_are_told() -> None:
    row = {"test": ATTENTION, "heads": "random", "n_heads": 2}
    assert shortfalls([row], 2) == []
    (few,) = shortfalls([row], 3)
    assert "no 3 other heads" in few
    assert "no attention transplanted" in shortfalls([row | {"test": "x"}], 2)[0]


def test_the_command_tells_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path, 10)  # its prompt files
    folder = tmp_path / "model"
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    words = [
        "direction", "--model", str(folder), "--out", str(tmp_path / "new"), "--reply-tokens", "8",
        "--harmful", str(tmp_path / "harmful.jsonl"), "--harmless", str(tmp_path / "harmless.jsonl"),
        "--n-fit", "10", "--n-select", "10", "--refusal-tokens", "[40, 41]", "--score-dtype", "float32",
        "--induce-threshold", "-1e6", "--kl-threshold", "1e6", "--no-keep-by-score", "--n-control-directions", "2",
    ]  # fmt: skip
    said = (
        "refusals open with ", "(40), ", "held-out AUROC of differences of means", "split-half cosine",
        "with the direction ablated", "cosine with the chosen", "8 random and orthogonal", "chosen: position",
        "induce", "KL", "intervention_replies.parquet",
    )  # fmt: skip
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["suffix-analysis", *words, *more])
        with contextlib.suppress(SystemExit):
            cli.main()
        told = capsys.readouterr()
        if more:
            found = json.loads(told.out)
            assert [token["id"] for token in found["refusal_tokens"]] == [40, 41] and Path(found["replies"]).exists()
            assert {row["intervention"] for row in found["interventions"]} >= {"ablated", "added", "orthogonalised"}
            assert {row["control"] for row in found["interventions"]} == {None, 1, 2}
        else:
            assert [phrase for phrase in said if phrase not in told.out] == [], told.err
    page = build_report(tmp_path / "new").read_text()
    assert "How the direction was chosen" in page and "Is it one direction?" in page, "without attack and analysis"
    assert "harmful: random ablated (2)" in page or "random ablated (2)" in gzip_of(page), "each control has its row"
    assert "How the direction was chosen" in build_report(tmp_path / "new", redact=True).read_text(), (
        "there is no suffix"
    )
