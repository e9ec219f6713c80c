"""How a suffix acts: what carries the fall in projection, why, and what undoes it (METHODS §3 and §4), as tables.

Everything is measured on report prompts; heads and reference values come from the select split. Prompts run in groups,
so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from suffix_analysis import causal
from suffix_analysis.causal import Head, Readout
from suffix_analysis.causal_tests import PATCHED, Reference, Runs, Test, random_heads, tests
from suffix_analysis.circuits import Paths, edge_rows, find_paths, joined, kept_edges
from suffix_analysis.directions import Direction
from suffix_analysis.factors import FACTORS, split_change
from suffix_analysis.judges import is_refusal
from suffix_analysis.lens import measure_lens
from suffix_analysis.mechanism_checks import check_rows, replay_error, state_error
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from suffix_analysis.replay import Prepared, groups, prepare, reply
from suffix_analysis.residual import post_norms
from suffix_analysis.stats import interval, rate_interval, ratio_interval, sign_flip_max_t
from suffix_analysis.traces import output_directions

TERMS = ("top heads", "other heads", "MLPs", "embedding")


def reference_of(model: Model, prompts: Sequence[Prompt]) -> Reference:
    """What every head mixes from values on these prompts, at every chat token: the mean, and the first group's own."""
    parts = groups(prompts)
    first = prepare(model, [model.chat(p.text) for p in parts[0]]).z
    total = first.double().sum(dim=0)
    for group in parts[1:]:
        total += prepare(model, [model.chat(p.text) for p in group]).z.double().sum(dim=0)
    return Reference((total / len(prompts)).float(), first)


def measure_mechanism(
    model: Model,
    direction: Direction,
    report: Sequence[Prompt],
    select: Sequence[Prompt],
    harmless: Sequence[Prompt],
    suffixes: Sequence[Suffix],
    top: Sequence[Head],
    *,
    control: Suffix | None = None,
    n_random: int = 3,
    reply_tokens: int = 24,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Tables ``carried``, ``factors``, ``causal``, ``circuit``, ``sweep``, ``lens``, ``logits`` and ``checks``.

    Args:
        model: the model.
        direction: its refusal direction; its layer is where the projection is read.
        report: harmful prompts that are measured.
        select: harmful prompts of the select split, which choose the circuit's edges.
        harmless: harmless ones of the select split: what an ablated head gives instead of its own.
        suffixes: adversarial ones; each is crossed with every prompt. Circuit and lens are of the first only, and so is
            the sweep, on the first group of prompts.
        top: the heads chosen on the select split.
        control: a shuffled suffix, whose attention rows the attacked run is given where the token counts are equal.
        n_random: sets of random heads, of the same layers and as many.
        reply_tokens: length of the replies that are made under some of the tests.
        seed: of the random heads.
        on_step: called with (done, total).
    """
    readout = Readout.of(direction)
    others = [random_heads(top, model.n_heads, readout.layer, seed + i) for i in range(n_random)]
    reference = reference_of(model, harmless)
    plan = tests(readout, top, others, reference, model.n_layers, model.n_heads)
    parts, cells = groups(report), _Cells()
    arms: dict[str, list[Paths]] = {"none": [], "adversarial": []}
    errors: dict[str, list[float]] = {"replays": [], "states": [], "factors": []}
    for done, group in enumerate(parts, 1):
        plain = prepare(model, [model.chat(p.text) for p in group])
        beside = None if control is None else prepare(model, [model.chat(p.text, control.text) for p in group])
        cells.add("terms none", _terms(plain, readout, top))
        cells.add_outcome("none", causal.base(plain, readout))
        for number, suffix in enumerate(suffixes):
            run = prepare(model, [model.chat(p.text, suffix.text) for p in group])
            # attention rows fit only where the control is token by token as long as the attacked run
            runs = Runs(plain, run, beside if beside is not None and torch.equal(beside.mask, run.mask) else None)
            split = split_change(plain, run, readout.unit)
            errors["factors"].append(split.error)
            errors["states"].append(state_error(plain, run))
            cells.add("terms", _terms(run, readout, top), number)
            cells.add_outcome("attacked", causal.base(run, readout), number)
            cells.add("factors", torch.stack([_of(split.parts[f], top) for f in FACTORS], dim=1), number)
            for i, test in enumerate(plan):
                if (test.needs_control and runs.control is None) or (test.once and number):
                    continue
                this, hooks = run if test.on == "attacked" else plain, test.hooks(runs)
                cells.add_outcome(f"test {i}", causal.measure(this, hooks, readout), number)
                if test.replies:
                    texts = reply(this, hooks, reply_tokens)
                    cells.add(f"replies {i}", torch.tensor([float(is_refusal(text)) for text in texts]), number)
            if number == 0:
                errors["replays"] += [replay_error(plain), replay_error(run)]
                for name, one in (("none", plain), ("adversarial", run)):
                    if done == 1:  # one group is enough: a sweep is many replays
                        cells.add_outcome(f"sweep {name}", causal.head_sweep(one, reference.mean, readout))
                    arms[name].append(find_paths(one, readout.unit, top, readout.layer))
        if on_step is not None:
            on_step(done, len(parts))
    tested = [
        _causal_row(cells, i, test)
        for i, test in enumerate(plan)
        if cells.complete(f"test {i} score", report, 1 if test.once else len(suffixes))
    ]
    every = next(row for row in tested if row["test"] == PATCHED and row["heads"] == "all")
    misses = [paths.error for parts in arms.values() for paths in parts]
    lens, errors["logits"] = measure_lens(model, report, suffixes[0], direction.refusal_tokens, top)
    return {
        "checks": check_rows(**errors, paths=misses, patched_all=every["projection_recovered"]),
        **lens,
        "carried": _carried_rows(cells),
        "factors": _factor_rows(cells, top),
        "causal": tested,
        "circuit": edge_rows(
            {name: joined(parts) for name, parts in arms.items()}, _edges(model, select, suffixes[0], readout, top)
        ),
        "sweep": [row for name in ("none", "adversarial") for row in _sweep_rows(cells, name)],
    }


def _edges(
    model: Model, select: Sequence[Prompt], suffix: Suffix, readout: Readout, top: Sequence[Head]
) -> list[tuple[Any, ...]]:
    """The circuit's edges, chosen on the select split."""
    found: dict[str, list[Paths]] = {"": [], suffix.text: []}
    for group in groups(select):
        for text, parts in found.items():
            run = prepare(model, [model.chat(p.text, text) for p in group])
            parts.append(find_paths(run, readout.unit, top, readout.layer))
    return kept_edges([joined(parts) for parts in found.values()])


class _Cells:
    """Arrays [prompt …] of every quantity and suffix, gathered group by group."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int, list[Tensor]]] = {}

    def add(self, name: str, values: Tensor, suffix: int = 0) -> None:
        """One group's values."""
        self._found.setdefault(name, {}).setdefault(suffix, []).append(values.double().cpu())

    def add_outcome(self, name: str, found: causal.Outcome, suffix: int = 0) -> None:
        """One group's scores and projections."""
        self.add(f"{name} score", found.score, suffix)
        self.add(f"{name} projection", found.projection, suffix)

    def get(self, name: str) -> Float[ndarray, "prompt suffix *rest"] | None:
        """All prompts and suffixes, or None."""
        if name not in self._found:
            return None
        return torch.stack([torch.cat(parts) for parts in self._found[name].values()], dim=1).numpy()

    def complete(self, name: str, prompts: Sequence[Prompt], n_suffixes: int) -> bool:
        """Whether the quantity is there for every prompt and suffix (a control may not fit some of them)."""
        parts = self._found.get(name, {})
        return len(parts) == n_suffixes and all(sum(map(len, found)) == len(prompts) for found in parts.values())

    def need(self, name: str) -> Float[ndarray, "prompt suffix *rest"]:
        """All prompts and suffixes of what is known to be there."""
        found = self.get(name)
        assert found is not None, name
        return found


def _of(values: Tensor, heads: Sequence[Head]) -> Tensor:
    return torch.stack([values[:, layer, head] for layer, head in heads], dim=1)


def _terms(run: Prepared, readout: Readout, top: Sequence[Head]) -> Float[Tensor, "prompt term"]:
    """What was written along r̂ at chat[-1] before the readout's layer, by the top heads and by everything else."""
    model, unit = run.model, readout.unit.to(run.resid.device)
    norms = post_norms(model)
    ends = output_directions(model, unit, norms)
    below = [head for head in top if head[0] < readout.layer]
    found = torch.zeros(len(run), len(TERMS), device=unit.device)
    found[:, 3] = run.resid[:, 0, -1].float() @ unit
    found[:, 2] = run.mlp_out[:, : readout.layer, -1].float().sum(dim=1) @ unit
    for layer, head in below:
        write = run.z[:, layer, -1, head].float() @ ends[layer, head]
        if (norm := norms[layer]) is not None:
            write = write * norm.scale(run.attention_output(layer))
        found[:, 0] += write
    # all else is attention: other heads (and attention biases, where there are any)
    found[:, 1] = run.resid[:, readout.layer, -1].float() @ unit - found[:, [0, 2, 3]].sum(dim=1)
    return found


def _carried_rows(cells: _Cells) -> list[dict[str, Any]]:
    """How much of the fall in projection each kind of term carries."""
    fall = cells.need("terms none") - cells.need("terms")
    whole = fall.sum(axis=2)
    return [
        {"term": name, **_with_share(fall[:, :, i], whole), **_whole(whole)} for i, name in enumerate(TERMS)
    ]  # fmt: skip


def _whole(whole: ndarray) -> dict[str, Any]:
    return {"n_prompts": whole.shape[0], "n_suffixes": whole.shape[1]}


def _with_share(part: ndarray, whole: ndarray) -> dict[str, float | None]:
    """A part's mean with its interval, and its share of the whole with its interval."""
    mean = interval(part)
    share, lo, hi = ratio_interval(part, whole)
    return {
        "value": mean.estimate, "lo": mean.lo, "hi": mean.hi, "share": share, "share_lo": lo, "share_hi": hi,
    }  # fmt: skip


def _factor_rows(cells: _Cells, top: Sequence[Head]) -> list[dict[str, Any]]:
    """The parts of the change of the instruction's contribution, by top head and (layer and head −1) for their sum."""
    parts = cells.need("factors")  # [prompt suffix factor top]
    change = parts.sum(axis=2)
    rows = []
    for j, (layer, head) in enumerate([*top, (-1, -1)]):
        own = parts.sum(axis=3) if layer < 0 else parts[..., j]
        whole = change.sum(axis=2) if layer < 0 else change[..., j]
        rows += [
            {"layer": layer, "head": head, "factor": name, **_with_share(own[:, :, i], whole), **_whole(whole)}
            for i, name in enumerate(FACTORS)
        ]
    return rows


def _causal_row(cells: _Cells, number: int, test: Test) -> dict[str, Any]:
    """One test: what became of the score and the projection, and how much of the way to the other run that is."""
    row: dict[str, Any] = {
        "test": test.name,
        "heads": test.heads,
        "on": test.on,
        "dose": test.dose,
        "n_heads": test.n_heads,
    }
    for measure in ("score", "projection"):
        after = cells.need(f"test {number} {measure}")
        plain, attacked = cells.need(f"none {measure}"), cells.need(f"attacked {measure}")
        before, source = (attacked, plain) if test.on == "attacked" else (plain, attacked)
        before, source, after = np.broadcast_arrays(before, source, after)
        effect = interval(after - before)
        share, lo, hi = ratio_interval(after - before, source - before)
        row |= {
            f"{measure}_before": float(before.mean()), f"{measure}_after": float(after.mean()),
            f"{measure}_effect": effect.estimate, f"{measure}_lo": effect.lo, f"{measure}_hi": effect.hi,
            f"{measure}_recovered": share, f"{measure}_recovered_lo": lo, f"{measure}_recovered_hi": hi,
        }  # fmt: skip
    refused = cells.get(f"replies {number}")
    rate: tuple[float | None, float | None, float | None] = (None, None, None)
    if refused is not None and refused.shape[1] == 1:
        rate = rate_interval(refused[:, 0])
    elif refused is not None:
        both = interval(refused, rate=True)
        rate = (both.estimate, both.lo, both.hi)
    row |= dict(zip(("refused", "refused_lo", "refused_hi"), rate, strict=True))
    return row | _whole(after)


def _sweep_rows(cells: _Cells, run: str) -> list[dict[str, Any]]:
    """Mean-ablation of every single head, with p values adjusted for all heads.

    None with a suffix, because one suffix allows no p value (METHODS §5), and where there is one prompt.
    """
    projection, score = (cells.need(f"sweep {run} {name}")[:, 0] for name in ("projection", "score"))
    several = len(projection) > 1 and run == "none"
    tested = [sign_flip_max_t(values).p if several else None for values in (projection, score)]

    def p_value(found: ndarray | None, layer: int, head: int) -> float | None:
        return None if found is None else float(found[layer, head])

    _, n_layers, n_heads = projection.shape
    return [
        {
            "run": run, "layer": layer, "head": head, "n_prompts": len(projection),
            "projection_effect": float(projection[:, layer, head].mean()),
            "projection_p": p_value(tested[0], layer, head),
            "score_effect": float(score[:, layer, head].mean()),
            "score_p": p_value(tested[1], layer, head),
        }
        for layer in range(n_layers)
        for head in range(n_heads)
    ]  # fmt: skip
