"""Redacted pages: nothing of what was to be taken out is left, wherever it stood, and the bytes are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from reports import ReportError, build_report
from reports.compare import build_comparison
from reports.data import RunData
from reports.redact import is_local, redact, stand_in
from reports.schema import Check, Pattern, Prompt, Suffix, Summary
from tests.fake_run import make_fake_run


def bare(**settings: object) -> RunData:
    summary = Summary(schema_version=1, model=str(settings.get("model", "m")), n_layers=1, n_heads=1, d_model=1)
    return RunData(name="r", place="/home/ann/runs/r", config=tomli_w.dumps(settings), summary=summary, prompts=())


def test_local_paths_keep_their_last_part_only() -> None:
    kept = {"model": "owner/name@refs/pr/1", "harmful": "hf:owner/name#train", "dtype": "float32"}
    assert redact(bare(**kept)).config == tomli_w.dumps(kept)
    hidden = {
        "model": "/home/ann/secret/model-7b", "harmless": "data/of/ann/others.csv", "adapter": "~/secret/adapter/",
        "suffixes": "C:\\Users\\ann\\suffixes.jsonl", "text": "../secret/text.txt", "harmful": "secret/mine.csv",
    }  # fmt: skip
    data = redact(bare(**hidden))
    for word in ("ann", "secret", "Users"):
        assert word not in data.config + data.summary.model + data.place
    assert data.summary.model == "model-7b"
    for last in ("model-7b", "others.csv", "adapter", "suffixes.jsonl", "text.txt", "mine.csv"):
        assert f'"{last}"' in data.config
    assert not is_local("target", "and/or: yes") and not is_local("address", "ray://host:1")


def test_checks_and_notes_lose_suffixes_too() -> None:
    suffix = Suffix(id="a", arm="adversarial", text=" xq zzt!", n_tokens=3)
    check = Check(name="tokens of xq zzt!", value="xq zzt!", bound=1.0, passed=True, sentence="Of “ xq zzt!” all.")
    data = replace(bare(), suffixes=(suffix,), checks=(check,), tables={"abilities": [{"note": "failed on xq zzt!"}]})
    after = redact(data)
    assert "zzt" not in str(after.checks) + str(after.tables)
    assert stand_in(suffix.text) in after.checks[0].sentence and after.checks[0].bound == 1.0


def test_prompts_and_ids_that_hold_a_suffix_lose_it_and_still_belong_together() -> None:
    suffix = Suffix(id="my xq zzt! ww", arm="adversarial", text="xq zzt! ww", n_tokens=3)
    prompt = Prompt(id="p xq zzt! ww", text="Sing xq zzt! ww", kind="harmful", split="report")
    row = {"prompt_id": prompt.id, "suffix_id": suffix.id, "reply": "xq zzt! ww"}
    pattern = Pattern(
        prompt_id=prompt.id, suffix_id=suffix.id, arm="adversarial", tokens=["a"], regions=["chat"], heads=[],
        attention=[], contribution=[],
    )  # fmt: skip
    data = replace(bare(), suffixes=(suffix,), prompts=(prompt,), tables={"replies": [row]}, env={"cpu": "xq zzt! ww"})
    data = replace(data, patterns=(pattern,), summary=data.summary.model_copy(update={"suffix_id": suffix.id}))
    after = redact(data)
    assert "zzt" not in str((after.suffixes, after.prompts, after.tables, after.env, after.patterns, after.summary))
    assert after.patterns[0].prompt_id == after.prompts[0].id
    (found,) = after.tables["replies"]
    assert (found["prompt_id"], found["suffix_id"]) == (after.prompts[0].id, after.suffixes[0].id)
    short = replace(data, suffixes=(Suffix(id="a", arm="random", text="in", n_tokens=1),))
    assert redact(short).prompts == data.prompts, "two letters stand in a prompt by chance"


def test_a_suffix_that_is_part_of_another_or_of_a_stand_in_spoils_nothing() -> None:
    texts = ("abc", "abc def", "sha256", "characters", "def")
    suffixes = tuple(Suffix(id=text, arm="random", text=text, n_tokens=1) for text in texts)
    data = replace(bare(), suffixes=suffixes, config="# abc def and abc\n")
    assert redact(data).config == f"# {stand_in('abc def')} and {stand_in('abc')}\n"


def test_a_page_is_not_redacted_where_the_suffixes_are_not_known(tmp_path: Path) -> None:
    run = make_fake_run(tmp_path / "run", n_prompts=6)
    page, path = tmp_path / "page.html", run / "suffixes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"\n")
    with pytest.raises(ReportError, match=r"without suffixes\.jsonl, which is not used"):
        build_report(run, page, redact=True)
    path.unlink()
    with pytest.raises(ReportError, match=r"without suffixes\.jsonl, which is missing: restore it"):
        build_report(run, page, redact=True)
    assert not page.exists()


def test_what_is_redacted_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "from reports.redact import redact; from reports.data import RunData; from reports.schema import *\n"
        "s = tuple(Suffix(id=t, arm='random', text=t, n_tokens=1) for t in (' a\\tb', 'a\\tb', 'b c', ' b c '))\n"
        "m = Summary(schema_version=1, model='m', n_layers=1, n_heads=1, d_model=1)\n"
        "print(redact(RunData(name='r', config='x a\\tb y b c z', summary=m, prompts=(), suffixes=s)).config)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
        ).stdout
        for seed in range(4)
    }  # fmt: skip
    assert len(found) == 1


def test_without_readable_suffixes_nothing_is_redacted() -> None:
    data = replace(bare(), unusable={"suffixes": "not used: suffixes.jsonl, line 3 is not complete JSON"})
    with pytest.raises(ReportError, match=r"line 3 is not complete JSON"):
        redact(data)


def test_a_redacted_comparison_replaces_no_other_page(tmp_path: Path) -> None:
    runs = [make_fake_run(tmp_path / name, n_prompts=4) for name in ("a", "b")]
    for run in runs:
        for path in (run / "findings").glob("*.parquet"):
            if path.stem != "refusal":
                path.unlink()
    pages = [build_comparison(runs[0], runs[1], redact=redacted) for redacted in (False, True)]
    assert [page.name for page in pages] == ["compare-b.html", "compare-b-redacted.html"]
