"""Whole runs killed at random moments (SIGKILL): going on gives what an undisturbed run gives.

``KILLS=50 pytest -m slow tests/stages/test_kills_slow.py -s`` prints the figure for 50 moments.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from suffix_analysis.runs import read_json, read_jsonl, read_table
from tests import tiny

KILLS = int(os.environ.get("KILLS", "6"))
SETTINGS: dict[str, Any] = {
    "n-instructions": 2, "suffix-tokens": 5, "steps": 6, "search-width": 8, "topk": 16, "n-controls": 2, "n-traced": 6,
    "n-traced-controls": 1, "reply-tokens": 8, "n-top-heads": 2, "n-causal": 4, "n-fit": 8, "n-select": 4,
    "prompts-per-split": 8, "kl-threshold": 1e9, "induce-threshold": -1e9, "layer-share": 1.0,
    "score-dtype": "float32",
}  # fmt: skip
REFUSAL_TOKENS = ("40", "41")


def command(model: Path, out: Path) -> list[str]:
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    flags += [word for token in REFUSAL_TOKENS for word in ("--refusal-tokens", token)]
    return [sys.executable, "-m", "suffix_analysis.cli", "run", "--model", str(model), "--out", str(out), *flags]


def findings(run: Path) -> dict[str, Any]:
    """Everything a run found, without how long it took."""
    found: dict[str, Any] = {path.name: read_table(path) for path in sorted((run / "findings").glob("*.parquet"))}
    found |= {path.name: read_json(path) for path in sorted((run / "findings").glob("*.json"))}
    found["suffixes"] = read_jsonl(run / "suffixes.jsonl")
    steps = read_jsonl(run / "steps.jsonl")
    found["steps"] = [{k: v for k, v in row.items() if k != "seconds"} for row in steps]
    found["direction"] = (run / "direction.safetensors").read_bytes()
    return found


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_findings(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.hf_model("llama").save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    started = time.perf_counter()
    subprocess.run(command(model, tmp_path / "whole"), check=True, capture_output=True)
    whole, wanted = time.perf_counter() - started, findings(tmp_path / "whole")
    rng, cut = random.Random(0), 0
    for number in range(KILLS):
        out = tmp_path / f"run-{number}"
        child = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(timeout=rng.uniform(0.2, 0.95) * whole)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            cut += child.wait() == -signal.SIGKILL
        done = subprocess.run(command(model, out), check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = findings(out)
        assert {name for name in wanted if found.get(name) != wanted[name]} == set(), f"kill {number}"
        assert (out / "report.html").exists()
    print(f"{cut} of {KILLS} runs were killed, in a run of {whole:.0f} s; all went on to the same findings")
    assert cut >= KILLS / 2
