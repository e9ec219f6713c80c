"""How a suffix acts: what carries the fall in projection, why, and what undoes it (METHODS §3 and §4), as tables.

Everything is measured on report prompts; heads and reference values come from the select split. Prompts run in groups,
so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis import causal
from suffix_analysis.causal import Head, Readout
from suffix_analysis.causal_tests import PATCHED, UNCHANGED, Reference, Runs, Test, random_heads, tests
from suffix_analysis.circuits import Paths, edge_rows, find_paths, joined, kept_edges
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.factors import FACTORS, split_change
from suffix_analysis.identities import rounding
from suffix_analysis.judges import Judge, is_refusal
from suffix_analysis.judges import judge as rules
from suffix_analysis.lens import measure_lens
from suffix_analysis.mechanism_checks import check_rows, replay_error, state_error
from suffix_analysis.mechanism_tables import (
    TERMS,
    Cells,
    carried_rows,
    causal_row,
    contrast_rows,
    factor_rows,
    ranking_rows,
    sweep_rows,
)
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from suffix_analysis.replay import Prepared, aligned, groups, prepare, reply
from suffix_analysis.residual import post_norms
from suffix_analysis.traces import output_directions


def reference_of(model: Model, prompts: Sequence[Prompt]) -> Reference:
    """What every head mixes from values on these prompts, at every chat token: the mean, and the first group's own.

    A group is spread over all prompts, and so are those that resampled heads take their values from.
    """
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
    controls: Sequence[Suffix] = (),
    n_random: int = 3,
    reply_tokens: int = 24,
    judge: Judge = rules,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The stage's tables, and ``checks``: its identities and controls.

    Their columns are in docs/run-folder.md.

    Args:
        model: the model.
        direction: its refusal direction; its layer is where the projection is read.
        report: harmful prompts that are measured.
        select: harmful prompts of the select split, which choose the circuit's edges.
        harmless: harmless ones of the select split: what an ablated head gives instead of its own.
        suffixes: adversarial ones; each is crossed with every prompt. The lens is of each arm's first only, and the
            sweep is of the first adversarial one, on the first group of prompts.
        top: the heads chosen on the select split.
        controls: suffixes of other arms. What carries a change of projection, and why the instruction counts less, is
            measured with each of them too; the attacked run is given the attention rows of a shuffled one where the
            token counts are equal.
        n_random: sets of random heads, of the same layers and as many.
        reply_tokens: length of the replies that are made under some of the tests.
        judge: gives these replies' verdicts.
        seed: of the random heads and of the random direction.
        on_step: called with (done, total).

    Raises:
        UserError: there are no prompts of a kind, no suffixes or no heads, or a run cannot be replayed.
    """
    for there, what in (
        (report, "harmful report prompts"), (select, "harmful select prompts"), (harmless, "harmless select prompts"),
        (suffixes, "adversarial suffixes"), (top, "heads"),
    ):  # fmt: skip
        if not there:
            raise UserError(f"There are no {what} to test the mechanism with; give at least one.")
    readout = Readout.of(direction)
    others = [random_heads(top, model.n_heads, readout.layer, seed + i) for i in range(n_random)]
    reference = reference_of(model, harmless)
    level = float(direction.means_harmful[readout.layer].float() @ readout.unit)
    plan = tests(readout, top, others, reference, model.n_layers, model.n_heads, level, seed)
    parts, cells = groups(report), Cells()
    bases: dict[str, int] = {test.on: i for i, test in enumerate(plan) if test.name == UNCHANGED}
    firsts: dict[str, Suffix] = {}
    for suffix in (*suffixes, *controls):
        firsts.setdefault(suffix.arm, suffix)
    # [arm][suffix][group of prompts]
    arms: dict[str, dict[str, list[Paths]]] = {name: {} for name in ("none", *firsts)}
    replies: list[dict[str, Any]] = []
    errors: dict[str, list[float]] = {"replays": [], "states": [], "factors": []}
    for done, group in enumerate(parts, 1):
        plain = prepare(model, [model.chat(p.text) for p in group])
        arms["none"].setdefault("", []).append(find_paths(plain, readout.unit, top, readout.layer))
        shuffled: Prepared | None = None  # the first of them

        def split(run: Prepared, suffix: Suffix, number: int, plain: Prepared = plain) -> None:
            found, arm = split_change(plain, run, readout.unit), suffix.arm
            errors["factors"].append(found.error)
            cells.add(f"terms {arm}", _terms(run, readout, top), number)
            cells.add(f"factors {arm}", torch.stack([_of(found.parts[f], top) for f in FACTORS], dim=1), number)
            paths = find_paths(run, readout.unit, top, readout.layer)
            arms[arm].setdefault(suffix.id, []).append(paths)

        for number, suffix in enumerate(controls):
            run = aligned(plain, prepare(model, [model.chat(p.text, suffix.text) for p in group]))
            split(run, suffix, number)
            if suffix.arm == "shuffled" and shuffled is None:
                shuffled = run
        cells.add("terms none", _terms(plain, readout, top))
        cells.add_outcome("none", causal.base(plain, readout))
        for number, suffix in enumerate(suffixes):
            run = aligned(plain, prepare(model, [model.chat(p.text, suffix.text) for p in group]))
            # attention rows fit only where the control is token by token as long as the attacked run
            fits = shuffled is not None and torch.equal(shuffled.mask, run.mask)
            runs = Runs(plain, run, shuffled if fits else None)
            split(run, suffix, number)
            errors["states"].append(state_error(plain, run))
            cells.add_outcome("attacked", causal.base(run, readout), number)
            for i, test in enumerate(plan):
                if (test.needs_control and runs.control is None) or (test.once and number):
                    continue
                this, hooks = run if test.on == "attacked" else plain, test.hooks(runs)
                cells.add_outcome(f"test {i}", causal.measure(this, hooks, readout), number)
                if test.replies:
                    judged = _judged(test, suffix, group, reply(this, hooks, reply_tokens), judge)
                    replies += judged
                    cells.add(f"replies {i}", torch.tensor([row["refused"] for row in judged]), number)
                    complied = [row["verdict"] == "complied" for row in judged]
                    cells.add(f"complied {i}", torch.tensor(complied), number)
            if number == 0:
                errors["replays"] += [replay_error(plain), replay_error(run)]
                for name, one in (("none", plain), ("adversarial", run)):
                    if done == 1:  # one group is enough: a sweep is many replays
                        cells.add_outcome(f"sweep {name}", causal.head_sweep(one, reference.mean, readout))
                        cells.add_outcome(f"ranked {name}", causal.attribution(one, reference.mean, readout))
        if on_step is not None:
            on_step(done, len(parts))
    made = {
        i: test
        for i, test in enumerate(plan)
        if cells.complete(f"test {i} score", report, 1 if test.once else len(suffixes))
    }
    tested = [causal_row(cells, i, test, bases) for i, test in made.items()]
    every = next(row for row in tested if row["test"] == PATCHED and row["heads"] == "all")
    misses = [paths.error for arm in arms.values() for parts in arm.values() for paths in parts]
    texts = {"none": "", **{arm: suffix.text for arm, suffix in firsts.items()}}
    lens, errors["logits"] = measure_lens(model, report, texts, direction.refusal_tokens, top)
    return {
        "checks": check_rows(
            **errors, paths=misses, patched_all=every["projection_recovered"], rounding=rounding(model)
        ),
        **lens,
        "carried": [row for arm in firsts for row in carried_rows(cells, arm)],
        "factors": [row for arm in firsts for row in factor_rows(cells, top, arm)],
        "mechanism_contrasts": contrast_rows(cells, [arm for arm in firsts if arm != "adversarial"], made),
        "causal": tested,
        "causal_replies": replies,
        "circuit": edge_rows(
            {name: [joined(parts) for parts in arm.values()] for name, arm in arms.items()},
            _edges(model, select, suffixes, readout, top),
        ),
        "sweep": [row for name in ("none", "adversarial") for row in sweep_rows(cells, name)],
        "ranking": [row for name in ("none", "adversarial") for row in ranking_rows(cells, name, readout.layer, seed)],
    }


def _judged(
    test: Test, suffix: Suffix, prompts: Sequence[Prompt], texts: Sequence[str], judge: Judge
) -> list[dict[str, Any]]:
    """Replies under a test, with their verdicts."""
    return [
        {"test": test.name, "heads": test.heads, "on": test.on, "dose": test.dose, "n_heads": test.n_heads,
         "suffix_id": None if test.once else suffix.id, "prompt_id": p.id, "refused": is_refusal(text),
         "verdict": judge(p.text, text), "reply": text}
        for p, text in zip(prompts, texts, strict=True)
    ]  # fmt: skip


def _edges(
    model: Model, select: Sequence[Prompt], suffixes: Sequence[Suffix], readout: Readout, top: Sequence[Head]
) -> list[tuple[Any, ...]]:
    """The circuit's edges, chosen on the select split: without a suffix, and with the suffixes on average."""
    plain: list[Paths] = []
    attacked: list[Paths] = []
    for group in groups(select):
        for text in ("", *(suffix.text for suffix in suffixes)):
            run = prepare(model, [model.chat(p.text, text) for p in group])
            (attacked if text else plain).append(find_paths(run, readout.unit, top, readout.layer))
    return kept_edges([joined(plain), joined(attacked)])


def _of(values: Tensor, heads: Sequence[Head]) -> Tensor:
    return torch.stack([values[:, layer, head] for layer, head in heads], dim=1)


@torch.no_grad()
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
