"""One side of `gcg_peer.py`: nanoGCG's seconds a step in an environment of its own (needs only nanogcg).

    python benchmarks/nanogcg_peer.py MODEL_FOLDER TASK.json

TASK.json holds text, target, init, width, steps, topk, seed, warm_up, dtype and cache; prints what was found as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nanogcg
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main(folder: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run nanoGCG and time its steps: from one gradient to the next."""
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=getattr(torch, task["dtype"])).eval()
    template = (Path(folder) / "chat_template.jinja").read_text()
    # no BOS: nanoGCG would cut it from every turn of the rendered chat
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    marks: list[float] = []
    original = nanogcg.gcg.GCG.compute_token_gradient

    def marked(self: Any, *args: Any) -> Any:
        marks.append(time.perf_counter())
        return original(self, *args)

    nanogcg.gcg.GCG.compute_token_gradient = marked
    config = nanogcg.GCGConfig(
        num_steps=task["steps"], optim_str_init=task["init"], search_width=task["width"], topk=task["topk"],
        seed=task["seed"], use_prefix_cache=task["cache"], verbosity="WARNING",
    )  # fmt: skip
    found = nanogcg.run(model, tokenizer, task["text"], task["target"], config)
    marks.append(time.perf_counter())
    seconds = [b - a for a, b in itertools.pairwise(marks)][task["warm_up"] :]
    return {"version": version("nanogcg"), "seconds": seconds, "losses": found.losses}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
