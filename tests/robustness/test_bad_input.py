"""Thousands of generated bad inputs through the public entry points: a result or one clear error, never a traceback."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attacks
from attacks.config import AttackError
from reports.build import render
from reports.data import RunData, read_run
from reports.errors import ReportError
from suffix_analysis import cli
from suffix_analysis.chat import REGIONS, render_chat
from suffix_analysis.config import VARIED, CampaignConfig, StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.files import read_table, write_table
from suffix_analysis.inputs import given_suffixes
from suffix_analysis.prompts import Prompt, load_prompts
from suffix_analysis.study import Study
from tests import tiny
from tests.fake_run import make_fake_run

# `make test-slow` sets FUZZ to 250: more than 2,500 bad inputs in all
MANY = settings(max_examples=int(os.environ.get("FUZZ", "60")), deadline=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "goal", "id", "kind", "split", "ids", "arm", "n_tokens", "loss", ""])
            | st.text(max_size=6),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@contextlib.contextmanager
def a_file(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def sentence(error: Exception) -> None:
    said = str(error)
    assert said.strip() and "Traceback" not in said


@MANY
@given(st.binary(max_size=200), st.sampled_from([".csv", ".json", ".jsonl", ".parquet", ".txt", ".pkl", ""]))
def test_prompt_files_of_any_bytes(content: bytes, ending: str) -> None:
    with a_file(f"prompts{ending}", content) as path:
        try:
            assert all(isinstance(p, Prompt) and p.text.strip() for p in load_prompts(path))
        except UserError as error:
            sentence(error)


@MANY
@given(st.lists(JSON, max_size=4), st.sampled_from([".json", ".jsonl"]))
def test_prompt_files_of_any_json(rows: list[Any], ending: str) -> None:
    text = "\n".join(map(json.dumps, rows)) if ending == ".jsonl" else json.dumps(rows)
    with a_file(f"prompts{ending}", text.encode()) as path:
        try:
            found = load_prompts(path)
            assert len({p.id for p in found}) == len(found)
        except UserError as error:
            sentence(error)


ROWS = st.dictionaries(st.sampled_from(["text", "ids", "id", "arm", "loss", "seed", "trained_on"]), JSON, max_size=4)


@MANY
@given(st.lists(JSON | ROWS, max_size=3) | st.binary(max_size=60), st.sampled_from([".jsonl", ".json", ".csv", ".txt"]))
def test_suffix_files_of_anything(rows: list[Any] | bytes, ending: str) -> None:
    content = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows)).encode()
    with a_file(f"suffixes{ending}", content) as path:
        try:
            found = given_suffixes(path, tiny.model("llama"))
            assert all(s.text.strip() and s.ids and s.n_tokens == len(s.ids) for s in found)
        except UserError as error:
            sentence(error)


@MANY
@given(st.text(max_size=40), st.text(max_size=20))
def test_conversations_of_any_text(instruction: str, suffix: str) -> None:
    try:
        chat = render_chat(tiny.tokenizer(), instruction, suffix)
    except UserError as error:
        sentence(error)
        return
    assert torch.stack([chat.regions[name] for name in REGIONS]).sum(dim=0).eq(1).all()


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_run(tmp_path_factory.mktemp("bad") / "run", n_prompts=4)


FILES = (
    "prompts.jsonl", "suffixes.jsonl", "steps.jsonl", "status.json", "env.json", "config.toml",
    "findings/summary.json", "findings/checks.json", "findings/patterns.json", "findings/refusal.parquet",
    "findings/causal.parquet",
)  # fmt: skip


@settings(MANY, max_examples=MANY.max_examples * 3 // 8)  # each reads a whole folder
@given(st.sampled_from(FILES), st.binary(max_size=60) | JSON, st.booleans())
def test_run_folders_with_one_file_of_anything(fake: Path, name: str, content: Any, cut: bool) -> None:
    path = fake / name
    before = path.read_bytes()
    try:
        new = content if isinstance(content, bytes) else json.dumps(content).encode()
        path.write_bytes(before[: len(before) // 2] if cut else new)
        assert isinstance(read_run(fake), RunData)
    except ReportError as error:
        sentence(error)
    finally:
        path.write_bytes(before)


def changed(value: Any, new: Any, draw: random.Random) -> Any:
    """The value with one of its leaves replaced, as what is written by another version or by hand may be."""
    if isinstance(value, dict) and value:
        key = draw.choice(sorted(value))
        return value | {key: changed(value[key], new, draw)}
    if isinstance(value, list) and value:
        i = draw.randrange(len(value))
        return [*value[:i], changed(value[i], new, draw), *value[i + 1 :]]
    return new


@settings(MANY, max_examples=max(6, MANY.max_examples // 8))  # each draws a whole page
@given(
    st.sampled_from([name for name in FILES if not name.endswith(".toml")]),
    st.sampled_from([None, math.nan, math.inf, -1, 0, 10**30, 1e300, "", "\ud800", "</script>", [], {}, True]) | JSON,
    st.randoms(use_true_random=False),
)
def test_pages_of_folders_with_one_value_of_anything(fake: Path, name: str, new: Any, draw: random.Random) -> None:
    path = fake / name
    before = path.read_bytes()
    try:
        if name.endswith(".parquet"):
            rows = read_table(path)
            row = draw.randrange(len(rows))
            column = draw.choice([key for key, value in rows[row].items() if isinstance(value, float)])
            rows[row][column] = new if isinstance(new, float) else None
            write_table(path, rows)
        else:
            lines = before.decode().splitlines() if name.endswith(".jsonl") else [before.decode()]
            line = draw.randrange(len(lines))
            lines[line] = json.dumps(changed(json.loads(lines[line]), new, draw))
            path.write_text("\n".join(lines) + "\n")
        page = render(read_run(fake))
        assert page.startswith(b"<!doctype html>") and b'</script>"' not in page
    except ReportError as error:
        sentence(error)
    finally:
        path.write_bytes(before)


def exit_code(*words: str) -> int:
    argv = sys.argv
    sys.argv = ["suffix-analysis", *words]
    try:
        cli.main()
    except SystemExit as done:
        return int(done.code or 0)
    finally:
        sys.argv = argv
    return 0


VALUES = st.integers(-5, 5) | st.floats(allow_nan=True) | st.booleans() | st.text("ab1.-_ ", max_size=5) | st.lists(
    st.integers(-2, 9), max_size=2
)  # fmt: skip


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "run", lambda self, stages=None: None)
    monkeypatch.setattr(cli.stages, "finish", lambda study, as_json: None)


@MANY
@given(settings_=st.dictionaries(st.sampled_from([*StudyConfig.__dataclass_fields__, "nonsense"]), VALUES, max_size=4))
def test_settings_of_anything(no_run: None, capsys: pytest.CaptureFixture[str], settings_: dict[str, Any]) -> None:
    lines = [f"{name} = {_toml(value)}" for name, value in settings_.items()]
    with a_file("c.toml", "\n".join(lines).encode()) as path:
        assert exit_code("run", "--config", str(path), "--out", str(path.parent / "run")) in (0, 1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Please report" not in said


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else str(value)


@MANY
@given(st.binary(max_size=80))
def test_settings_files_of_any_bytes(no_run: None, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    with a_file("c.toml", content) as path:
        assert exit_code("run", "--config", str(path), "--out", str(path.parent / "run")) in (0, 1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Please report" not in said


@MANY
@given(
    st.sampled_from([name.upper() for name in StudyConfig.__dataclass_fields__]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12),
)
def test_variables_of_anything(no_run: None, capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(f"SUFFIX_ANALYSIS_{name}", value)
        assert exit_code("run", "--out", f"{folder}/run") in (0, 1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Please report" not in said


@MANY
@given(st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from([*VARIED, "seed"]), JSON.map(json.dumps)))
def test_what_is_to_vary_of_anything(vary: str) -> None:
    try:
        assert CampaignConfig(vary=(vary,)).settings()
    except UserError as error:
        sentence(error)


MODEL = tiny.hf_model("llama")
SHORT = st.text(max_size=12)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]) | SHORT, "content": SHORT})
    | st.dictionaries(SHORT, SHORT, max_size=2),
    max_size=3,
)


@MANY
@given(SHORT | TURNS | st.lists(SHORT | TURNS, max_size=3), SHORT | st.lists(SHORT, max_size=3))
def test_attacks_on_conversations_of_anything(messages: Any, target: Any) -> None:
    config = attacks.GCGConfig(num_steps=1, search_width=2, optim_str_init="x x")
    try:
        attacks.GCG(MODEL, tiny.tokenizer(), messages, target, config)
    except AttackError as error:
        sentence(error)


WORDS = st.sampled_from(
    ["demo", "run", "attack", "campaign", "direction", "analyze", "defend", "env", "report", "models", "organism",
     "--vary", "steps=[5,6]", "--each", "--steps", "--seed", "-1", "x", "--out", "--json",
     "--nope", "", "--config", "--redact", "--figures", "abilities", "eval"]
)  # fmt: skip


@MANY
@given(words=st.lists(WORDS, max_size=5))
def test_command_lines_of_anything(no_run: None, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    if words[:1] in (["organism"], ["abilities"]):
        words = ["demo", *words[1:]]  # these would load the model
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        assert exit_code(*words) in (0, 1, 2, 3)
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Please report" not in said


@MANY
@given(
    st.sampled_from(
        ["num_steps", "search_width", "topk", "n_replace", "buffer_size", "momentum", "rescore", "patience"]
    ),
    st.integers(-3, 3) | st.floats(-2, 2),
    st.text(max_size=30),
    st.text(max_size=6),
)
def test_attacks_of_anything(name: str, value: float, message: str, target: str) -> None:
    try:
        attacks.GCGConfig(**{name: value})  # type: ignore[arg-type]
        attacks.build_slot(tiny.tokenizer(), message, target, "x x")
    except (AttackError, TypeError) as error:
        sentence(error)
