"""attacks against nanoGCG 0.3.0, which needs an environment of its own: `python benchmarks/gcg_peer.py PEER_PYTHON`.

    python -m venv .venv-peer
    .venv-peer/bin/pip install -c benchmarks/peer.txt torch nanogcg

Both sides run the same model, prompt and seed, one after the other on one machine.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cyclopts
import torch
from gcg import SETTINGS, TARGET, WARM_UP, instructions, model_in, our_steps

import attacks
from suffix_analysis.organism.weights import base_folder

app = cyclopts.App(help=__doc__)


def save_for_peer(hf: Any, folder: Path) -> None:
    """The embedded model as a folder that transformers 4.47 reads."""
    hf.save_pretrained(folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(base_folder() / name, folder / name)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = hf.config.rope_parameters["rope_theta"]  # its name before transformers 5
    path.write_text(json.dumps(config))


@app.default
def peer(python: str, width: list[int] | None = None, steps: int = 7, cache: bool = True) -> None:
    """Seconds a step (median after warm-up) of both, in float32 and bfloat16."""
    text = instructions(1)[0]
    full, tokenizer = model_in(torch.float32)
    half, _ = model_in(torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_for_peer(full, folder)
        for size in width or [128, 512]:
            config: dict[str, Any] = {"num_steps": steps, "search_width": size, **SETTINGS}
            found = {}
            for dtype in ("float32", "bfloat16"):
                task = {
                    "text": text, "target": TARGET, "init": SETTINGS["optim_str_init"], "width": size, "steps": steps,
                    "topk": SETTINGS["topk"], "seed": SETTINGS["seed"], "warm_up": WARM_UP, "dtype": dtype,
                    "cache": cache,
                }  # fmt: skip
                (Path(scratch) / "task.json").write_text(json.dumps(task))
                script = str(Path(__file__).with_name("nanogcg_peer.py"))
                command = [python, script, str(folder), f"{scratch}/task.json"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found[dtype] = json.loads(done.stdout.splitlines()[-1])
            print(f"search width {size}")
            for dtype, theirs in found.items():
                print(f"  nanogcg {theirs['version']} {dtype:20} {statistics.median(theirs['seconds']):8.3f} s a step")
            runs = [
                ("compat float32", full, attacks.GCGConfig.nanogcg(**config), "float32"),
                ("native float32", full, attacks.GCGConfig(score_dtype="float32", **config), "float32"),
                ("native bfloat16", half, attacks.GCGConfig(score_dtype="bfloat16", **config), "bfloat16"),
                ("bfloat16 search, float32", full, attacks.GCGConfig(score_dtype="bfloat16", **config), "float32"),
            ]
            for name, hf, setting, dtype in runs:
                seconds, losses, _ = our_steps(hf, tokenizer, text, setting)
                mid = statistics.median(seconds)
                same = sum(abs(a - b) < 1e-3 for a, b in zip(losses, found[dtype]["losses"], strict=True))
                told = f", equal losses in {same} of {steps} steps" if setting.compat else ""
                ratio = statistics.median(found[dtype]["seconds"]) / mid
                print(f"  {name:28} {mid:8.3f} s a step, {ratio:5.1f}× nanogcg {dtype}{told}", flush=True)


if __name__ == "__main__":
    app()
