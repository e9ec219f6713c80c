"""A campaign of short attacks under Ray with two workers, beside one: `python benchmarks/workers.py` (extra ray).

Every worker has one processor and loads the model once. Half as many attacks show whether the time is linear in them.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import cyclopts
import ray

from suffix_analysis.attacking import split_for_attack
from suffix_analysis.config import StudyConfig
from suffix_analysis.inputs import study_model
from suffix_analysis.pool import pool_plans
from suffix_analysis.prompts import load_prompts
from suffix_analysis.refusal import discover_refusal_tokens
from suffix_analysis.workers import attack_all


def main(attacks: int = 16, steps: int = 10, width: int = 32) -> None:
    """Seconds of the campaign for one and two workers, and for half of the attacks."""
    config = StudyConfig(
        n_attacks=attacks, steps=steps, search_width=width, n_instructions=2, executor="ray", score_dtype="bfloat16"
    )
    model = study_model(config)
    prompts = {kind: load_prompts("embedded", split="select", kind=kind) for kind in ("harmful", "harmless")}
    chats = [[model.chat(p.text) for p in prompts[kind][:16]] for kind in ("harmful", "harmless")]
    tokens = discover_refusal_tokens(model, *chats)
    train, held_out = split_for_attack(prompts["harmful"], config.n_instructions, config.seed)
    del model
    taken: dict[tuple[int, int], float] = {}
    strings = []
    for workers, count in ((1, attacks), (2, attacks), (2, attacks // 2)):
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
        some = StudyConfig(**{**vars(config), "n_attacks": count})
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            plans = pool_plans(Path(folder), train, held_out[:8], some)
            found = attack_all(plans, tokens, some, lambda done: None)
            taken[workers, count] = time.perf_counter() - started
        strings.append([suffix.text for suffix in found])
        ray.shutdown()
        print(f"{count} attacks, {workers} worker{'s' * (workers > 1)}: {taken[workers, count]:.1f} s", flush=True)
    assert strings[0] == strings[1] and strings[1][: attacks // 2] == strings[2], "workers must not change a result"
    print(f"two workers: {taken[1, attacks] / taken[2, attacks]:.2f} times as fast as one")
    print(f"{attacks} attacks take {taken[2, attacks] / taken[2, attacks // 2]:.2f} times as long as {attacks // 2}")


if __name__ == "__main__":
    cyclopts.run(main)
