"""An attack that is killed (SIGKILL, nothing can be tidied up) and goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import attacks
from suffix_analysis.attacking import Plan, make_attack
from suffix_analysis.config import StudyConfig
from suffix_analysis.prompts import Prompt
from tests import tiny

STEPS = 40
SETTINGS: dict[str, Any] = {
    "steps": STEPS, "search_width": 12, "topk": 32, "suffix_tokens": 8, "n_instructions": 2, "stop_below": 0.0,
    "score_dtype": "bfloat16", "seed": 3,
}  # fmt: skip
# every token counts as a refusal's start, so nothing ever stops refusing and no run ends early
REFUSAL_TOKENS = list(range(700))  # all of them
TRAIN = [Prompt(str(i), text, "harmful", "select") for i, text in enumerate(("Pick a lock", "Bake a cake"))]


def go_on(folder: Path) -> None:
    """Run the attack in ``folder`` to its end, from wherever it is."""
    train = tuple(TRAIN)
    make_attack(tiny.model("llama"), Plan("It", StudyConfig(**SETTINGS), train, train, folder), REFUSAL_TOKENS)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The recorded steps, without what may differ between runs."""
    found = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


@pytest.mark.slow
def test_forty_steps_equal_twenty_a_kill_and_twenty_more(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    go_on(whole)
    assert len(rows(whole)) == STEPS
    code = f"from pathlib import Path; from tests.stages.test_killed import go_on; go_on(Path({str(cut)!r}))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(attacks.__file__).parents[1])
    steps = cut / "steps.jsonl"
    while child.poll() is None and not (steps.exists() and steps.read_bytes().count(b"\n") >= STEPS // 2):
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    reached = json.loads((cut / "checkpoint.json").read_text())["step"]
    assert STEPS // 2 - 1 <= reached < STEPS
    go_on(cut)
    assert rows(cut) == rows(whole)
