"""What a run goes on from, poisoned: every reader of a state file takes what was written or says one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attacks
from suffix_analysis import attacking, replies, runs
from suffix_analysis.config import StudyConfig
from suffix_analysis.console import Console
from suffix_analysis.direction_file import load_direction
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
        attacks.GCGConfig(num_steps=2, search_width=2, optim_str_init="x x"),
    )
    attack.restore(runs.read_json(study.folder / "checkpoint.json"))
    return list(attack.steps())


READERS: dict[str, Any] = {
    "status.json": lambda study: runs.add_seconds(study.folder, "attack", 1.0, "done"),
    "fast_dtype.json": lambda study: study.fast_dtype,
    "refusal_tokens.json": Study.refusal_tokens,
    "skipped.json": lambda study: study.skip("Something was left out."),
    "prompts.jsonl": Study.prompts,
    "suffixes.jsonl": lambda study: runs.read_suffixes(study.folder / "suffixes.jsonl"),
    "replies.jsonl": _replies,
    "steps.jsonl": _steps,
    "checkpoint.json": _checkpoint,
    "config.toml": lambda study: runs.read_config(study.folder),
    "direction.safetensors": lambda study: load_direction(study.folder / "direction.safetensors", []),
}


@pytest.mark.parametrize("name", READERS)
@MANY
@given(content=JSON | st.binary(max_size=60))
def test_a_state_file_of_anything(study: Study, name: str, content: Any) -> None:
    path = study.folder / name
    path.write_bytes(content if isinstance(content, bytes) else (json.dumps(content) + "\n").encode())
    try:
        READERS[name](study)
    except (UserError, attacks.AttackError) as error:
        text = str(error)
        assert text and "\n" not in text.strip() and "Traceback" not in text
    finally:
        path.unlink(missing_ok=True)
