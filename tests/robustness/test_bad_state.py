"""What a run goes on from, poisoned: every reader of a state file takes what was written or says one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attacks
from suffix_analysis import attacking, files, replies, runs
from suffix_analysis.config import StudyConfig
from suffix_analysis.console import Console
from suffix_analysis.direction_file import load_direction, save_direction
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.prompts import Prompt
from suffix_analysis.study import Study
from tests import tiny

MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
KEYS = st.sampled_from(
    ["step", "loss", "ids", "string", "rows", "arm", "suffix_id", "id", "text", "kind", "split", "stages", "state",
     "schema_version", "peak_gib", "buffer", "best", "generator", "active"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=5),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    found = Study(tmp_path_factory.mktemp("state"), StudyConfig(score_dtype="float32", n_attacks=2), Console())
    found._model = tiny.model("llama")
    return found


def _replies(study: Study) -> object:
    prompts = [Prompt("p", "Pick a lock", "harmful", "report")]
    kept = replies.measure_replies(
        prompts, [], lambda cells: iter([(i, []) for i in range(len(cells))]), study.folder / "replies.jsonl"
    )
    return replies.refusal_table(kept) if kept else kept


def _steps(study: Study) -> object:
    prompt = Prompt("p", "Pick a lock", "harmful", "select")
    plan = attacking.Plan("It", study.config, (prompt,), (prompt,), study.folder)
    steps = attacking.steps_of(plan)
    return attacking.best_suffix(steps, plan) if steps else None


def _checkpoint(study: Study) -> object:
    model = study.model
    attack = attacks.GCG(
        model.hf,
        model.tokenizer,
        "Pick a lock",
        "Sure",
        attacks.GCGConfig(num_steps=2, search_width=2, optim_str_init="x x", momentum=0.5),
    )
    attack.restore(files.read_json(study.folder / "checkpoint.json"))
    return list(attack.steps())


def _findings(study: Study) -> object:
    return files.read_table(study.folder / "table.parquet", ("layer", "head"))


READERS: dict[str, Any] = {
    "status.json": lambda study: runs.add_seconds(study.folder, "attack", 1.0, "done"),
    "fast_dtype.json": lambda study: study.fast_dtype,
    "refusal_tokens.json": Study.refusal_tokens,
    "skipped.json": lambda study: study.skip("Something was left out."),
    "prompts.jsonl": Study.prompts,
    "suffixes.jsonl": lambda study: runs.read_suffixes(study.folder / "suffixes.jsonl"),
    "replies.jsonl": _replies,
    "interventions.jsonl": lambda study: replies.made_once(study.folder / "interventions.jsonl")(
        "ablated, harmful", 1, lambda: ["Yes."]
    ),
    "steps.jsonl": _steps,
    "checkpoint.json": _checkpoint,
    "table.parquet": _findings,
    "config.toml": lambda study: runs.read_config(study.folder),
    "direction.safetensors": lambda study: load_direction(study.folder / "direction.safetensors", []),
}


def read(study: Study, name: str, content: bytes) -> bool:
    """Read a state file of this content; whether it was taken. What is refused is said in one sentence."""
    path = study.folder / name
    path.write_bytes(content)
    try:
        READERS[name](study)
    except (UserError, attacks.AttackError) as error:
        text = str(error)
        assert text and "\n" not in text.strip() and "Traceback" not in text
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


@pytest.mark.parametrize("name", READERS)
@MANY
@given(content=JSON | st.binary(max_size=60))
def test_a_state_file_of_anything(study: Study, name: str, content: Any) -> None:
    read(study, name, content if isinstance(content, bytes) else (json.dumps(content) + "\n").encode())


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"", b"\xff\xfe", b'{"a": 1}'], ids=str)
def test_a_state_file_that_breaks_parsers(study: Study, name: str, content: bytes) -> None:
    read(study, name, content)


def _valid(study: Study) -> dict[str, Any]:
    """What each of the files of records holds where nothing is wrong."""
    step = {
        "step": 1,
        "loss": 1.5,
        "string": "x",
        "ids": [5],
        "seconds": 1.0,
        "flops": 2.0,
        "flipped": 0,
        "select_refusal": 0.5,
    }
    reply = {
        "arm": "none", "split": "report", "kind": "harmful", "prompt_id": "p", "suffix_id": None, "refused": True,
        "verdict": "refused", "refusal_score": 0.5, "reply": "No.",
    }  # fmt: skip
    model = study.model
    config = attacks.GCGConfig(num_steps=2, search_width=2, optim_str_init="x x", momentum=0.5)
    attack = attacks.GCG(model.hf, model.tokenizer, "Pick a lock", "Sure", config)
    next(attack.steps())
    return {
        "status.json": {
            "schema_version": 1, "state": "done", "peak_gib": 1.0,
            "stages": {"attack": {"state": "done", "seconds": 1.0, "findings": []}},
        },
        "prompts.jsonl": {
            "id": "p", "text": "Pick a lock", "kind": "harmful", "split": "report", "policy": "", "topic": "",
        },
        "suffixes.jsonl": {
            "id": "a-1", "arm": "adversarial", "text": "x", "ids": [5], "n_tokens": 1, "loss": 1.0, "seed": 0,
        },
        "replies.jsonl": {"arm": "none", "suffix_id": None, "rows": [reply]},
        "interventions.jsonl": {"name": "ablated, harmful", "replies": ["No."]},
        "steps.jsonl": step,
        "checkpoint.json": attack.state(),
        "refusal_tokens.json": [5, 6],
        "fast_dtype.json": "float32",
    }  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The addresses of everything inside a value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in _places(item, (*at, key)))]


OTHERS = (None, True, -1, 10**6, 0.5, "a", "5", [], {}, [1, 2, 3])
FIELDS = (
    "status.json", "prompts.jsonl", "suffixes.jsonl", "replies.jsonl", "interventions.jsonl", "steps.jsonl",
    "checkpoint.json", "refusal_tokens.json", "fast_dtype.json",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", FIELDS)
def test_a_state_file_with_one_field_of_something_else(study: Study, name: str) -> None:
    """Whatever stands in one place, or is missing there, is taken as what it must be or refused in a sentence."""
    valid = json.loads(json.dumps(_valid(study)[name]))
    assert read(study, name, json.dumps(valid).encode() + b"\n"), "the valid one must be taken"
    refused = 0
    for place in _places(valid):
        for other in (*OTHERS, ...):
            changed = json.loads(json.dumps(valid))
            if not place:
                changed = other
            else:
                *way, last = place
                inside = changed
                for key in way:
                    inside = inside[key]
                if other is ...:
                    del inside[last]
                else:
                    inside[last] = other
            if changed is not ...:
                refused += not read(study, name, json.dumps(changed).encode() + b"\n")
    assert refused >= len(_places(valid)), "most of these are wrong"


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.99])
def test_a_direction_that_is_cut_off_is_refused(study: Study, keep: float) -> None:
    zeros, others = torch.zeros(3, 8), torch.zeros(3, 8)
    path = study.folder / "direction.safetensors"
    save_direction(path, Direction(torch.ones(8), -1, 1, [], zeros, others, (5,), {"harmful": 2}))
    whole = path.read_bytes()
    assert read(study, path.name, whole)
    assert not read(study, path.name, whole[: int(keep * len(whole))])
