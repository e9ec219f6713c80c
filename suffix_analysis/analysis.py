"""What suffixes do: every arm traced, tables with intervals, checks (METHODS §3 and §5)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from suffix_analysis.arms import (
    ArmTraces,
    dominance_rows,
    head_rows,
    profile_rows,
    projection_measures,
    shift_rows,
    term_rows,
)
from suffix_analysis.chat import REGIONS, survives_decoding, token_strings
from suffix_analysis.direction_file import summary_of
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.heads import TopHead, top_heads
from suffix_analysis.identities import rounding
from suffix_analysis.max_t import crossed_max_t
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt, prompts_of, to_prompts
from suffix_analysis.records import SUFFIX_ARMS, Findings, Suffix, to_suffixes
from suffix_analysis.stats import MIN_SUFFIXES, contrast, contrast_row, contrast_table
from suffix_analysis.traces import CLOSURE_BOUND, IDENTITY_BOUND, Job, Traces, trace

LENGTHS_APART = 0.5  # tokens, on average, by which two arms' suffixes may differ and still be held against each other


def analyze(
    model: Model,
    direction: Direction,
    prompts: Sequence[Prompt | str],
    suffixes: Sequence[Suffix | str],
    *,
    n_top: int = 8,
    n_views: int = 4,
    max_prompts: int | None = None,
    on_prompts: Callable[[int], None] | None = None,
    trace_all: Callable[[Sequence[Job]], list[Traces]] | None = None,
) -> Findings:
    """Trace every arm and tabulate projections, region attention and exact head contributions.

    Args:
        model: the model.
        direction: its refusal direction.
        prompts: harmful prompts (kind ``harmful`` or empty, or strings) and, for two more arms, harmless ones. Report
            prompts are measured; select prompts choose the top heads. Where there are none of these, every second
            report prompt does that instead. Without splits both are the same, and a check says so.
        suffixes: records with their arms, or strings (adversarial).
        n_top: how many heads are called top heads.
        n_views: prompts whose full patterns are kept for the attention views.
        max_prompts: at most this many report prompts of each kind (the first ones of an evenly spread choice).
        on_prompts: called with the number of prompts traced after each batch.
        trace_all: traces (prompts, suffix) pairs, in order; here and one after the other if left out.

    Raises:
        UserError: a direction of another model, no harmful prompts or top heads, or a trace fails (see
            `suffix_analysis.traces.trace`).
    """
    n_chat = model.chat("x").n_chat
    if not (0 <= direction.layer < model.n_layers and -n_chat <= direction.position <= -1):
        raise UserError(
            f"The direction is of position {direction.position} and layer {direction.layer}; {model.name} has "
            f"positions −{n_chat} to −1 and layers 0 to {model.n_layers - 1}."
        )
    if n_top < 1:
        raise UserError(f"n_top is {n_top}; there must be at least one top head.")
    prompts, records = to_prompts(prompts), to_suffixes(suffixes)
    empty = next((s.id for s in records if not s.text.strip()), None)
    if empty is not None:
        raise UserError(f"The suffix {empty} is empty; give a text, or leave it out.")
    report = prompts_of(prompts, "harmful", "report", max_prompts)
    if not report:
        raise UserError("There are no harmful prompts of the report split to analyse.")
    chosen_on = prompts_of(prompts, "harmful", "select", None)
    if not chosen_on:  # each half has one of the two tasks
        report, chosen_on = (report[::2], report[1::2]) if len(report) > 1 else (report, report)
    separate = not {p.id for p in chosen_on} & {p.id for p in report}
    harmless = prompts_of(prompts, "harmless", "report", max_prompts)

    first = tuple(s for s in records if s.arm == "adversarial")[:1]
    named = {name: tuple(s for s in records if s.arm == name) for name in SUFFIX_ARMS}
    cells: list[tuple[str, str, tuple[Suffix, ...], Sequence[Prompt]]] = [
        ("select", "none", (), chosen_on),
        ("report", "none", (), report),
        *(("report", name, own, report) for name, own in named.items() if own),
    ]
    if harmless:
        cells.append(("report", "harmless", (), harmless))
    if harmless and first:
        cells.append(("report", "harmless+adversarial", first, harmless))
    if first:
        cells.append(("select", "adversarial", first, chosen_on))
    jobs = [(some, text) for _, _, own, some in cells for text in ([s.text for s in own] or [""])]
    if trace_all is None:
        traced = iter([trace(model, some, direction, suffix=text, on_batch=on_prompts) for some, text in jobs])
    else:
        traced = iter(trace_all(jobs))
    found = [
        (split, ArmTraces(arm, own, tuple(itertools.islice(traced, max(1, len(own)))))) for split, arm, own, _ in cells
    ]
    select_arms, arms = ([arm for split, arm in found if split == name] for name in ("select", "report"))
    heads = top_heads(select_arms[0].traces[0], below=direction.layer, count=n_top)
    pairs, unequal = compared(arms)
    tables = {
        "profile": [row for arm in arms for row in profile_rows(arm, direction)],
        "terms": [row for arm in arms for row in term_rows(arm)],
        "heads": [
            row
            for split, group in (("select", select_arms), ("report", arms))
            for arm in group
            for row in head_rows(arm, split)
        ],
        "top_heads": [vars(head) | {"split": "select" if separate else "report"} for head in heads],
        "shift": [row for arm in arms for row in shift_rows(arm, heads)],
        "dominance": [row for arm in arms for row in dominance_rows(arm)],
        "contrasts": projection_contrasts(pairs, direction),
        "head_differences": head_differences(pairs),
    }
    everything = [t for arm in [*arms, *select_arms] for t in arm.traces]
    views = report[:: max(1, len(report) // n_views)][:n_views]
    return Findings(
        tables=tables,
        summary=summary_of(model, direction)
        | {"retokenised": sum(not survives_decoding(model.tokenizer, chat) for t in everything for chat in t.chats)},
        checks=[*identity_checks(everything, arms, separate, rounding(model)), length_check(unequal)],
        patterns=[
            view
            for prompt in views
            for suffix in (None, *first, *named["random"][:1])  # a control beside it
            for view in [pattern_view(model, direction, prompt, suffix, heads)]
        ],
    )


def n_forwards(prompts: Sequence[Prompt], suffixes: Sequence[Suffix], max_prompts: int | None) -> int:
    """How many prompts `analyze` traces in all, for a progress bar."""
    harmful, harmless = (len(prompts_of(prompts, kind, "report", max_prompts)) for kind in ("harmful", "harmless"))
    select = len(prompts_of(prompts, "harmful", "select", None))
    return 2 * select + harmful * (1 + len(suffixes)) + 2 * harmless


Pair = tuple[ArmTraces, ArmTraces]


def compared(arms: Sequence[ArmTraces]) -> tuple[list[Pair], list[str]]:
    """The arms that are held against each other, and sentences on those whose suffixes are not equally long.

    Every suffix arm against none, the adversarial one against every other, and harmless prompts with a suffix against
    those without.
    """
    by_name = {arm.arm: arm for arm in arms}
    names: list[tuple[str, str]] = [(name, "none") for name in SUFFIX_ARMS]
    names += [("adversarial", name) for name in SUFFIX_ARMS[1:]] + [("harmless+adversarial", "harmless")]
    pairs, unequal = [], []
    for a, b in [(by_name[a], by_name[b]) for a, b in names if a in by_name and b in by_name]:
        lengths = [float(arm.cells(lambda t: t.n_tokens[:, REGIONS.index("suffix")]).mean()) for arm in (a, b)]
        if b.suffixes and abs(lengths[0] - lengths[1]) > LENGTHS_APART:
            unequal.append(f"{a.arm} and {b.arm}: {lengths[0]:.1f} and {lengths[1]:.1f} tokens")
        else:
            pairs.append((a, b))
    return pairs, unequal


def as_long(attacks: Sequence[Suffix], others: Sequence[Suffix]) -> tuple[list[Suffix], list[str]]:
    """Suffixes of the arms that are as long as the attacks on average, and sentences on the other arms.

    What length alone does would pass for something else.
    """
    kept: list[Suffix] = []
    unequal, asked = [], np.mean([s.n_tokens for s in attacks])
    for arm in dict.fromkeys(s.arm for s in others if s.arm != "adversarial"):
        own = [s for s in others if s.arm == arm]
        length = np.mean([s.n_tokens for s in own])
        if abs(length - asked) <= LENGTHS_APART:
            kept += own
        else:
            unequal.append(
                f"The {arm} suffixes are {length:.1f} tokens long on average, the adversarial ones {asked:.1f}; they "
                "were left out of the causal tests."
            )
    return kept, unequal


def projection_contrasts(pairs: Sequence[Pair], direction: Direction) -> list[dict[str, Any]]:
    """Normalised projection at the direction's layer of the arms that `compared` pairs."""
    at = direction.layer

    def values(arm: ArmTraces) -> ndarray:
        return arm.cells(lambda t: projection_measures(t, direction)["normalised"][:, at])[:, :, 0]

    return [
        contrast_row(
            "normalised projection", a.arm, b.arm, contrast(values(a), values(b), against_suffixes=bool(b.suffixes))
        )
        for a, b in pairs
        if np.isfinite(values(a)).all() and np.isfinite(values(b)).all()
    ]


def head_differences(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """What the adversarial suffixes change in every head's contribution, against none and each control.

    With enough suffixes in both arms, p values over prompts and suffixes, adjusted for all heads (max-T); None
    otherwise (METHODS §5).
    """
    rows = []
    for a, b in pairs:
        if a.arm != "adversarial":
            continue
        cells = [arm.cells(lambda t: t.head_contribution) for arm in (a, b)]
        mean, lo, hi = contrast_table(cells[0], cells[1])
        several = all(arm.n_texts >= MIN_SUFFIXES for arm in (a, b) if arm.suffixes)
        p = None
        if several and len(cells[0]) > 1:
            p = crossed_max_t(cells[0], cells[1]).p
        n_heads = a.traces[0].attention.shape[2]
        rows += [
            {
                "arm": a.arm, "against": b.arm, "layer": i // n_heads, "head": i % n_heads,
                "contribution": float(mean[i]), "lo": float(lo[i]), "hi": float(hi[i]),
                "p": None if p is None else float(p[i]),
                "n_prompts": len(cells[0]), "n_suffixes": a.n_texts,
            }
            for i in range(len(mean))
        ]  # fmt: skip
    return rows


def identity_checks(
    traces: Sequence[Traces], arms: Sequence[ArmTraces], separate: bool, rounding: float = 0.0
) -> list[dict[str, Any]]:
    """The identities of this run, with their bounds (METHODS §0 and §3), or the precision's ``rounding`` if larger."""
    bounds = [max(bound, rounding) for bound in (IDENTITY_BOUND, CLOSURE_BOUND)]
    # of tensors, because Python's max may hide a value that is not a number
    identity, closure = (
        torch.tensor([[t.identity, t.closure] for t in traces], dtype=torch.float64).amax(dim=0).tolist()
    )
    several = {arm.arm: arm.n_texts for arm in arms if arm.suffixes and not arm.arm.startswith("harmless")}
    few = ", ".join(name for name, n in several.items() if n < MIN_SUFFIXES)
    return [
        {
            "name": "head contributions add up",
            "value": identity,
            "bound": bounds[0],
            "passed": identity <= bounds[0],
            "sentence": "Contributions of all heads and sources plus the bias equal each attention write along r̂.",
        },
        {
            "name": "writes add up",
            "value": closure,
            "bound": bounds[1],
            "passed": closure <= bounds[1],
            "sentence": "Embedding, attention and MLP writes together equal the final residual's projection on r̂.",
        },
        {
            "name": "separate splits",
            "value": float(separate),
            "bound": 1.0,
            "passed": separate,
            "sentence": "Top heads were chosen on other prompts than those they are shown on.",
        },
        {
            "name": "several suffixes per arm",
            "value": float(min(several.values(), default=0)),
            "bound": float(MIN_SUFFIXES),
            "passed": not few,
            "sentence": f"Every arm has at least {MIN_SUFFIXES} suffixes{f' (descriptive: {few})' if few else ''}.",
        },
    ]


def length_check(unequal: Sequence[str]) -> dict[str, Any]:
    """Whether the arms that are held against each other have equally long suffixes; those that do not are left out."""
    told = "; ".join(unequal)
    return {
        "name": "equally long suffixes",
        "value": float(len(unequal)),
        "bound": 0.0,
        "passed": not unequal,
        "sentence": f"Not compared, because their suffixes are not equally long: {told}."
        if unequal
        else "All arms that are compared have equally long suffixes.",
    }


def pattern_view(
    model: Model, direction: Direction, prompt: Prompt, suffix: Suffix | None, heads: Sequence[TopHead]
) -> dict[str, Any]:
    """The top heads' whole patterns on one prompt, for the attention views, and their contributions by source."""
    chat = model.chat(prompt.text, suffix.text if suffix else "")
    full: dict[int, Tensor] = {}

    def keep(pattern: Tensor, hook: Any) -> None:
        full[int(hook.name.split(".")[1])] = pattern[0].detach().float().cpu()

    layers = sorted({head.layer for head in heads})
    with torch.no_grad(), model.bridge.hooks(fwd_hooks=[(f"blocks.{n}.attn.hook_pattern", keep) for n in layers]):
        model.hf(input_ids=chat.ids[None].to(model.hf.device), logits_to_keep=1)
    ((_, share),) = trace(model, [chat], direction, keep_rows=True).rows
    return {
        "prompt_id": prompt.id,
        "arm": suffix.arm if suffix else "none",
        "suffix_id": suffix.id if suffix else None,
        "tokens": token_strings(model.tokenizer, chat.ids),
        "regions": chat.region_names,
        "heads": [[head.layer, head.head] for head in heads],
        "attention": [[[round(float(x), 3) for x in row] for row in full[h.layer][h.head]] for h in heads],
        "contribution": [[round(float(x), 5) for x in share[h.layer, h.head]] for h in heads],
    }
