"""attacks against nanoGCG on the embedded model: `python benchmarks/gcg.py speed|memory|race|scaling`.

Both sides run in one process on one machine, one after the other; nothing else may run meanwhile. nanoGCG 0.2.3 gets a
copy of the tokenizer without a BOS token, because it would otherwise cut the text that opens every turn.
"""

from __future__ import annotations

import copy
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cyclopts
import torch

import attacks
from attacks.nanogcg import run_nanogcg
from attacks.scorer import Scorer
from suffix_analysis.models import load_model, quiet
from suffix_analysis.prompts import load_prompts

app = cyclopts.App(help=__doc__)
TARGET = "Sure, here is a detailed answer to your request, step by step:"
WARM_UP = 2
SETTINGS = {"topk": 256, "optim_str_init": " ".join(["x"] * 20), "seed": 0}


def mean_interval(gains: list[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean."""
    from scipy import stats

    found = stats.bootstrap((gains,), statistics.fmean, n_resamples=2000, vectorized=False, random_state=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def instructions(n: int) -> list[str]:
    """``n`` harmful select prompts, spread over the topics."""
    pool = [p.text for p in load_prompts("embedded", split="select", kind="harmful")]
    return [pool[i * len(pool) // n] for i in range(n)]


def model_in(dtype: torch.dtype) -> tuple[Any, Any]:
    """The embedded model in ``dtype`` and a tokenizer that nanoGCG can use."""
    model = load_model("embedded", dtype=dtype)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.bos_token = None
    return model.hf, tokenizer


def nanogcg_steps(hf: Any, tokenizer: Any, text: str, width: int, n_steps: int) -> tuple[list[float], list[float]]:
    """Seconds of every step after the warm-up, and all losses, of the real package."""
    import nanogcg.gcg as package

    marks: list[float] = []
    original = package.GCG.compute_token_gradient

    def marked(self: Any, ids: Any) -> Any:
        marks.append(time.perf_counter())
        return original(self, ids)

    package.GCG.compute_token_gradient = marked
    try:
        config = attacks.GCGConfig.nanogcg(num_steps=n_steps, search_width=width, **SETTINGS)
        with quiet():
            found = run_nanogcg(hf, tokenizer, text, TARGET, config)
    finally:
        package.GCG.compute_token_gradient = original
    marks.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(marks)][WARM_UP:], found.losses


def our_steps(
    hf: Any, tokenizer: Any, text: str, config: attacks.GCGConfig
) -> tuple[list[float], list[float], list[attacks.Step]]:
    """Seconds of every step after the warm-up, losses and steps of this package."""
    steps = list(attacks.GCG(hf, tokenizer, text, TARGET, config).steps())
    return [step.seconds for step in steps][WARM_UP:], [step.loss for step in steps], steps


def matmul_rate(dtype: torch.dtype) -> float:
    """Measured FLOP/s of the embedded model's largest linear layers on 2048 tokens; best of ten."""
    x, w = torch.randn(2048, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 576 * 1536 / best


def unavoidable_flops(hf: Any, tokenizer: Any, text: str, n_candidates: float) -> float:
    """2·D·[N_b·((n+1)/2 + a + t − 1) + N_h·t] of the issue: what scoring D candidates cannot avoid."""
    slot = attacks.build_slot(tokenizer, text, TARGET, str(SETTINGS["optim_str_init"]))
    head = hf.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in hf.parameters()) - head
    n, a, t = len(slot.suffix_ids), len(slot.after_ids), len(slot.target_ids)
    return 2 * n_candidates * (body * ((n + 1) / 2 + a + t - 1) + head * t)


@app.command
def speed(width: list[int] | None = None, steps: int = 7) -> None:
    """Seconds a step (median after warm-up), the ratio to nanoGCG, and the share of the measured matmul rate."""
    text = instructions(1)[0]
    for size in width or [128, 512]:
        full, tokenizer = model_in(torch.float32)
        half, _ = model_in(torch.bfloat16)
        config: dict[str, Any] = {"num_steps": steps, "search_width": size, **SETTINGS}
        theirs = {
            "float32": nanogcg_steps(full, tokenizer, text, size, steps),
            "bfloat16": nanogcg_steps(half, tokenizer, text, size, steps),
        }
        compat = attacks.GCGConfig.nanogcg
        runs: list[tuple[str, Any, attacks.GCGConfig, str]] = [
            ("compat float32", full, compat(**config), "float32"),
            ("native float32", full, attacks.GCGConfig(score_dtype="float32", **config), "float32"),
            ("compat bfloat16", half, compat(score_dtype="bfloat16", **config), "bfloat16"),
            ("native bfloat16", half, attacks.GCGConfig(score_dtype="bfloat16", **config), "bfloat16"),
            ("compat, bfloat16 search", full, compat(score_dtype="bfloat16", **config), "float32"),
            ("native, bfloat16 search", full, attacks.GCGConfig(score_dtype="bfloat16", **config), "float32"),
        ]
        print(f"search width {size}")
        for name, (seconds, _) in theirs.items():
            print(f"  nanogcg 0.2.3 {name:22} {statistics.median(seconds):8.3f} s a step")
        for name, hf, setting, peer in runs:
            seconds, losses, done = our_steps(hf, tokenizer, text, setting)
            mid = statistics.median(seconds)
            ratio = statistics.median(theirs[peer][0]) / mid
            dtype = torch.float32 if "float32" in name else torch.bfloat16
            scored = statistics.mean(step.n_candidates for step in done)
            share = unavoidable_flops(hf, tokenizer, text, scored) / mid / matmul_rate(dtype)
            same = sum(abs(a - b) < 1e-3 for a, b in zip(losses, theirs[peer][1], strict=True))
            told = f", equal losses in {same} of {steps} steps" if name.startswith("compat") else ""
            print(
                f"  {name:28} {mid:8.3f} s a step, {ratio:5.1f}× nanogcg {peer}, {share:.0%} of the matmul rate{told}"
            )


@app.command
def overhead() -> None:
    """What starting a forward costs, in tokens: from seconds at several batch sizes (attacks/grouping.py uses it)."""
    import numpy as np

    for dtype in (torch.float32, torch.bfloat16):
        hf, tokenizer = model_in(dtype)
        slot = attacks.build_slot(tokenizer, instructions(1)[0], "Sure", str(SETTINGS["optim_str_init"]))
        scorer = Scorer(hf, [slot], attacks.GCGConfig())
        points = []
        for count in (1, 4, 8, 16, 32, 64):
            ids = slot.suffix_ids.repeat(count, 1)
            times = []
            for _ in range(5):
                started = time.perf_counter()
                scorer(ids)
                times.append(time.perf_counter() - started)
            points.append((count * (len(slot.suffix_ids) + len(slot.after_ids)), min(times)))
        slope, start = np.polyfit([n for n, _ in points], [t for _, t in points], 1)
        print(f"{dtype}: {1000 * start:.1f} ms + {1000 * slope:.3f} ms a token: {start / slope:.0f} tokens a forward")


@app.command
def agreement(n: int = 4, steps: int = 20, width: int = 128) -> None:
    """How often a bfloat16 search with float32 rescoring takes the winner that float32 alone would take."""
    from attacks.candidates import draw, token_gradient
    from attacks.scorer import rescored_best

    hf, tokenizer = model_in(torch.float32)
    same = total = 0
    for text in instructions(n):
        config = attacks.GCGConfig(num_steps=steps, search_width=width, score_dtype="bfloat16", merge=0, **SETTINGS)
        attack = attacks.GCG(hf, tokenizer, text, TARGET, config)
        for _ in range(steps):
            ids = torch.tensor(attack.buffer[0][1])
            gradient = token_gradient(attack.search.model, attack.slots, attack.search.caches, ids, config)
            pool, _ = draw(ids, gradient, attack.forbidden, config, attack.generator, attack._keep())
            won = rescored_best(attack.search, attack.exact, pool, ids)
            assert attack.exact is not None
            truth, _ = attack.exact(pool, ids)
            same += won.ids.tolist() == pool[int(truth.mean(dim=1).argmin())].tolist()
            total += 1
            attack.buffer = [(float(won.per_goal.mean()), tuple(won.ids.tolist()))]
    print(f"same winner in {same} of {total} steps ({same / total:.1%})")


@app.command
def estimate(width: int = 64, steps: int = 5, goals: int = 3) -> None:
    """The self-test's seconds a step beside those that the steps then take, alone and with several conversations."""
    hf, tokenizer = model_in(torch.float32)
    for count in (1, goals):
        config = attacks.GCGConfig(num_steps=WARM_UP + steps, search_width=width, **SETTINGS)
        attack = attacks.GCG(hf, tokenizer, instructions(count), [TARGET] * count, config)
        said = attacks.self_test(attack).seconds_per_step
        taken = statistics.median([step.seconds for step in attack.steps()][WARM_UP:])
        print(f"{count} conversations: said {said:.2f} s a step, taken {taken:.2f} s: {said / taken:.2f}", flush=True)


@app.command
def memory(width: int = 512) -> None:
    """Peak memory of two steps above what the loaded model takes, each side in a process of its own."""
    for side in ("nanogcg", "ours", "ours-float32"):
        done = subprocess.run(
            [sys.executable, __file__, "peak", side, "--width", str(width)], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{side:14} {found['above']:6.2f} GiB above the model, {found['peak']:6.2f} GiB in all")


@app.command(show=False)
def peak(side: str, width: int = 512) -> None:
    """One side of ``memory``."""
    hf, tokenizer = model_in(torch.float32)
    text = instructions(1)[0]
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    if side == "nanogcg":
        nanogcg_steps(hf, tokenizer, text, width, WARM_UP + 1)
    else:
        dtype = "float32" if side.endswith("float32") else "bfloat16"
        config = attacks.GCGConfig(num_steps=2, search_width=width, score_dtype=dtype, **SETTINGS)
        our_steps(hf, tokenizer, text, config)
    top = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"above": (top - before) / 2**30, "peak": top / 2**30}))


@app.command
def race(n: int = 6, steps: int = 60, width: int = 128, seeds: int = 1) -> None:
    """Time to the loss that nanoGCG reaches after ``steps`` steps, as a share of its time.

    Its losses come from the compatibility mode (equal by test), its time is steps × its measured step.
    """
    hf, tokenizer = model_in(torch.float32)
    shares = []
    for text in instructions(n):
        per_step = statistics.median(nanogcg_steps(hf, tokenizer, text, width, WARM_UP + 5)[0])
        for seed in range(seeds):
            setting = {**SETTINGS, "seed": seed}
            compat = attacks.GCGConfig.nanogcg(num_steps=steps, search_width=width, score_dtype="bfloat16", **setting)
            goal = min(our_steps(hf, tokenizer, text, compat)[1])
            config = attacks.GCGConfig(num_steps=4 * steps, search_width=width, **setting)
            started, reached, took = time.perf_counter(), None, 0
            for step in attacks.GCG(hf, tokenizer, text, TARGET, config).steps():
                took = step.step
                if step.best_loss <= goal:
                    reached = time.perf_counter() - started
                    break
            share = float("inf") if reached is None else reached / (steps * per_step)
            shares.append(share)
            told = "not reached" if reached is None else f"{reached:6.1f} s ({took} steps)"
            print(
                f"  loss {goal:.3f}: {told} against {steps * per_step:.1f} s, 1/{1 / share:.1f}  {text[:50]}",
                flush=True,
            )
    print(f"median share of nanoGCG's time: 1/{1 / statistics.median(shares):.1f}")


@app.command
def scaling(out: str = "benchmarks/gcg_scaling.svg") -> None:
    """Seconds a step against candidates, tokens after the suffix, and tokens before it; a table and a figure."""
    import altair as alt

    hf, tokenizer = model_in(torch.float32)
    text = instructions(1)[0]
    filler = "Please read all of this first. "
    plans: dict[str, list[tuple[int, Callable[[int], tuple[Any, int]]]]] = {
        "candidates": [(k, lambda k: (text, k)) for k in (64, 128, 256, 512)],
        "tokens after the suffix": [
            (k, lambda k: ([{"role": "user", "content": text + " {optim_str} " + filler * k}], 128))
            for k in (0, 4, 8, 16)
        ],
        "tokens before the suffix": [(k, lambda k: (filler * k + text, 128)) for k in (0, 8, 16, 32)],
    }
    rows = []
    for name, points in plans.items():
        for value, make in points:
            talk, width = make(value)
            slot = attacks.build_slot(tokenizer, talk, TARGET, str(SETTINGS["optim_str_init"]))
            size = {"candidates": width, "tokens after the suffix": len(slot.after_ids)}.get(name, len(slot.before_ids))
            config = attacks.GCGConfig(num_steps=WARM_UP + 5, search_width=width, score_dtype="bfloat16", **SETTINGS)
            seconds = statistics.median(our_steps(hf, tokenizer, talk, config)[0])
            rows.append({"what": name, "size": size, "seconds": seconds})
            print(f"{name:26} {size:5} {seconds:8.3f} s a step", flush=True)
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("size:Q", title=None),
            y=alt.Y("seconds:Q", title="seconds a step"),
            column=alt.Column("what:N", title=None),
        )
    )
    chart.resolve_scale(x="independent", y="independent").save(out)


if __name__ == "__main__":
    app()
