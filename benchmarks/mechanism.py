"""What traces, sweeps and a whole analysis cost, against plain forwards and TransformerLens's own cache.

`python benchmarks/mechanism.py [trace|peer|sweep|arms|all]` on the embedded model; one run, the same prompts.

- trace: attention rows and contributions of all heads against plain forwards, with and without the shared prefix;
- peer: the same quantities from `run_with_cache` with per-head results;
- sweep: every head mean-ablated at the chat tokens, against whole forwards (of a sample of heads, scaled up), and the
  largest difference;
- arms: 64 report prompts × 8 arms with one suffix each, attribution and statistics.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import cyclopts
import torch
from torch import Tensor

from suffix_analysis.batching import batches, left_pad, pad_token
from suffix_analysis.causal import Readout, head_sweep
from suffix_analysis.chat import Chat
from suffix_analysis.forward import last_logits
from suffix_analysis.models import Model, load_model
from suffix_analysis.prompts import load_prompts
from suffix_analysis.replay import prepare
from suffix_analysis.traces import trace

SUFFIX = "! ? the of and to in is it that for was on are as with at be by"
PARTS = ("trace", "peer", "sweep", "arms")


def setting(count: int) -> tuple[Model, list[Chat], Tensor]:
    """The embedded model, chats with a suffix of the usual length, and a random direction."""
    model = load_model("embedded")
    assert model.bridge is not None
    prompts = load_prompts("embedded", split="report", kind="harmful")[:count]
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    return model, [model.chat(p.text, SUFFIX) for p in prompts], vector / vector.norm()


def best_of(run: Callable[[], Any], times: int = 3) -> float:
    """The shortest of a few runs, in seconds; the first, which warms up, does not count."""
    run()
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


@torch.no_grad()
def plain(model: Model, chats: Sequence[Chat]) -> None:
    """The forwards alone, of whole prompts: what one has without a shared prefix."""
    for group in batches([len(chat.ids) for chat in chats]):
        model.hf(**left_pad([chats[i].ids for i in group], pad_token(model.tokenizer), "cpu"), logits_to_keep=1)


@torch.no_grad()
def through_cache(model: Model, chats: Sequence[Chat], unit: Tensor) -> Tensor:
    """What each head writes along r̂ [prompt layer head], summed over source tokens, the usual way from the cache."""
    found = torch.zeros(len(chats), model.n_layers, model.n_heads)
    for group in batches([len(chat.ids) for chat in chats]):
        padded = left_pad([chats[i].ids for i in group], pad_token(model.tokenizer), "cpu")
        _, cache = model.bridge.run_with_cache(padded["input_ids"], attention_mask=padded["attention_mask"])
        for layer in range(model.n_layers):
            weight = model.bridge.blocks[layer].attn.W_O
            v = cache[f"blocks.{layer}.attn.hook_v"].repeat_interleave(
                model.n_heads // cache[f"blocks.{layer}.attn.hook_v"].shape[2], dim=2
            )
            results = torch.einsum("bthd,hde->bthe", v, weight)  # every head's output per source token
            row = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, -1]
            found[group, layer] = (torch.einsum("bht,bthe->bhte", row, results) @ unit).sum(dim=-1)
    return found


def time_trace(count: int) -> None:
    """Print how much a trace costs beside the forwards."""
    model, chats, unit = setting(count)
    forwards = best_of(lambda: plain(model, chats))
    shared = best_of(lambda: last_logits(model.hf, model.tokenizer, [chat.ids for chat in chats]))
    traced = best_of(lambda: trace(model, chats, unit))
    print(f"trace: {traced:.2f} s ({count} prompts)")
    print(f"  plain forwards {forwards:.2f} s, ratio {traced / forwards:.2f}")
    print(f"  forwards behind the shared prefix, as the trace's {shared:.2f} s, ratio {traced / shared:.2f}")


def one_peer(ours: bool, count: int) -> None:
    """Print the seconds and the memory of one of the two ways, in a process of its own."""
    model, chats, unit = setting(count)

    def run(some: Sequence[Chat]) -> None:
        trace(model, some, unit, keep_rows=True) if ours else through_cache(model, some, unit)

    run(chats[:2])  # warms up, and is small beside what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    run(chats)
    took = time.perf_counter() - started
    print(took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


def time_peer(count: int) -> None:
    """Print the two ways side by side."""
    found = []
    for name in ("ours", "theirs"):
        out = subprocess.run(
            [sys.executable, __file__, "_one", name, "--count", str(count)], capture_output=True, text=True, check=True
        )
        found.append([float(x) for x in out.stdout.split()[-2:]])
    (ours, our_gib), (theirs, their_gib) = found
    model, chats, unit = setting(8)
    apart = (trace(model, chats, unit).head_contribution - through_cache(model, chats, unit)).abs().max()
    print(
        f"run_with_cache: {theirs:.1f} s and {their_gib:.2f} GiB; trace: {ours:.1f} s and {our_gib:.2f} GiB; "
        f"{theirs / ours:.1f}× faster, {their_gib / max(our_gib, 0.01):.0f}× less memory above the loaded model's peak "
        f"({count} prompts; ours counted as at least 0.01 GiB); largest difference on 8 prompts {float(apart):.1e}"
    )


@torch.no_grad()
def time_sweep(count: int, sample: int = 12) -> None:
    """Print the sweep over all heads against whole forwards."""
    model, chats, unit = setting(count)
    run = prepare(model, chats)
    readout = Readout(unit, model.n_layers - 4, (57,))
    values = run.z.mean(dim=0)
    started = time.perf_counter()
    found = head_sweep(prepare(model, chats), values, readout)
    ours = time.perf_counter() - started
    heads = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    padded = left_pad([chat.ids for chat in chats], pad_token(model.tokenizer), "cpu")
    seen: list[Tensor] = []
    errors: list[float] = []
    whole = 0.0

    def look(x: Tensor, hook: Any) -> None:
        seen.append(x[:, -1] @ unit)

    name = f"blocks.{readout.layer}.hook_resid_pre"
    with model.bridge.hooks(fwd_hooks=[(name, look)]):
        model.hf(**padded, logits_to_keep=1)
    base = seen.pop()
    for layer, head in heads[:: len(heads) // sample]:

        def put(z: Tensor, hook: Any, layer: int = layer, head: int = head) -> Tensor:
            z = z.clone()
            z[:, -run.n_chat :, head] = values[layer, :, head]
            return z

        started = time.perf_counter()
        with model.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put), (name, look)]):
            model.hf(**padded, logits_to_keep=1)
        whole += time.perf_counter() - started
        effect = seen.pop() - base
        errors.append(float((effect - found.projection[:, layer, head]).abs().max() / base.abs().max()))
    theirs = whole * len(heads) / len(heads[:: len(heads) // sample])
    worst = float(torch.tensor(errors).max())  # NaN where one is, which Python's max may hide
    print(f"sweep over {len(heads)} heads: {ours:.1f} s, whole forwards {theirs:.0f} s, {theirs / ours:.1f}× faster, "
          f"largest difference {worst:.1e} of the projection ({count} prompts)")  # fmt: skip


def time_arms(count: int) -> None:
    """Print what an analysis with one suffix in each of eight arms takes, and with half the prompts."""
    from suffix_analysis.analysis import analyze
    from suffix_analysis.directions import Direction
    from suffix_analysis.records import SUFFIX_ARMS, Suffix

    model, _, unit = setting(1)
    means = torch.randn(model.n_layers + 1, model.d_model, generator=torch.Generator().manual_seed(1))
    direction = Direction(unit, -1, 23, [], means + 5 * unit, means, (57,), {})
    prompts = [p for kind in ("harmful", "harmless") for p in load_prompts("embedded", kind=kind) if p.split != "fit"]
    few = [p for p in prompts if p.split == "report"] + [p for p in prompts if p.split == "select"][:16]
    suffixes = [Suffix(f"{arm}-1", arm, SUFFIX) for arm in SUFFIX_ARMS]
    times = []
    for n in (count, count // 2):
        started = time.perf_counter()
        analyze(model, direction, few, suffixes, max_prompts=n)
        times.append(time.perf_counter() - started)
    arms = len(SUFFIX_ARMS) + 3
    print(f"analysis of {count} prompts × {arms} arms: {times[0]:.1f} s; of {count // 2}: {times[1]:.1f} s")


def main(part: str = "all", which: str = "", *, count: int = 64) -> None:
    """Run one part or all."""
    if part == "_one":
        one_peer(which == "ours", count)
        return
    parts: dict[str, Callable[[], None]] = {
        "trace": lambda: time_trace(count),
        "peer": lambda: time_peer(min(count, 32)),
        "sweep": lambda: time_sweep(min(count, 16)),
        "arms": lambda: time_arms(count),
    }
    for name in PARTS if part == "all" else (part,):
        parts[name]()


if __name__ == "__main__":
    cyclopts.run(main)
