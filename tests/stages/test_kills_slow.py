"""Whole runs killed at random moments (SIGKILL): going on gives what an undisturbed run gives.

``KILLS=50 pytest -m slow tests/stages/test_kills_slow.py -s`` prints the figure for 50 moments.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.torch import load_file

from suffix_analysis.files import read_json, read_jsonl, read_table
from tests import tiny

KILLS = int(os.environ.get("KILLS", "12"))
SETTINGS: dict[str, Any] = {
    "n_instructions": 2, "suffix_tokens": 5, "steps": 6, "search_width": 8, "topk": 16, "n_controls": 2, "n_traced": 6,
    "n_traced_controls": 1, "reply_tokens": 8, "n_top_heads": 2, "n_causal": 4, "n_fit": 24, "n_select": 16,
    "prompts_per_split": 16, "kl_threshold": 1e9, "induce_threshold": -1e9, "layer_share": 1.0,
    "score_dtype": "float32",
    # half of the vocabulary, so that a random model "refuses" some prompts and not others
    "refusal_tokens": list(range(0, 700, 2)),
}  # fmt: skip


def command(model: Path, out: Path, **more: Any) -> list[str]:
    settings = model / "study.toml"
    settings.write_text(tomli_w.dumps({**SETTINGS, "model": str(model), **more}))
    return [sys.executable, "-m", "suffix_analysis.cli", "run", "--config", str(settings), "--out", str(out)]


def findings(run: Path) -> dict[str, Any]:
    """Everything a run found, without how long it took."""
    found: dict[str, Any] = {path.name: read_table(path) for path in sorted((run / "findings").glob("*.parquet"))}
    found |= {path.name: read_json(path) for path in sorted((run / "findings").glob("*.json"))}
    found["suffixes"] = read_jsonl(run / "suffixes.jsonl")
    steps = read_jsonl(run / "steps.jsonl")
    found["steps"] = [{k: v for k, v in row.items() if k != "seconds"} for row in steps]
    # tensors, not bytes: the order of a safetensors file's metadata is no part of what was found
    found["direction"] = {k: v.tolist() for k, v in load_file(run / "direction.safetensors").items()}
    return found


def same(a: Any, b: Any) -> bool:
    """Equal, but for rounding: sums may come in another order where memory lies differently (seen: 4e-7)."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.slow
def test_a_pool_that_has_grown_finds_what_one_finds_that_was_made_whole(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.hf_model("llama").save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    for name, counts in (("whole", (4,)), ("grown", (2, 4))):
        for count in counts:
            done = subprocess.run(command(model, tmp_path / name, n_attacks=count), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    wanted, found = findings(tmp_path / "whole"), findings(tmp_path / "grown")
    assert {name for name in wanted | found if not same(found.get(name), wanted.get(name))} == set()
    assert {row["arm"] for row in wanted["suffixes"]} >= {"random", "shuffled"} and len(wanted["suffixes"]) == 10


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_findings(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.hf_model("llama").save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    started = time.perf_counter()
    subprocess.run(command(model, tmp_path / "whole"), check=True, capture_output=True)
    whole, wanted = time.perf_counter() - started, findings(tmp_path / "whole")
    rng, cut, number = random.Random(0), 0, 0
    while cut < KILLS:  # runs differ in how long they take: some end before their moment comes
        number += 1
        assert number <= 2 * KILLS + 4, f"only {cut} of {number} runs were caught"
        out = tmp_path / f"run-{number}"
        child = subprocess.Popen(command(model, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            child.wait(timeout=rng.uniform(0, 1) * whole)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            cut += child.wait() == -signal.SIGKILL
        done = subprocess.run(command(model, out), check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = findings(out)
        assert {name for name in wanted if not same(found.get(name), wanted[name])} == set(), f"kill {number}"
        assert (out / "report.html").exists()
        shutil.rmtree(out)
    print(f"{cut} of {number} runs were killed, in a run of {whole:.0f} s; all went on to the same findings")
