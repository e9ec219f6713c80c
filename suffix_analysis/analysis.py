"""What suffixes do: every arm traced, tables with intervals, checks (METHODS §3 and §5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from suffix_analysis.chat import REGIONS, survives_decoding, token_strings
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.heads import TopHead, lift, of_heads, region, top_heads
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import SCHEMA_VERSION, SUFFIX_ARMS, Findings, Suffix, to_suffixes
from suffix_analysis.stats import MIN_SUFFIXES, contrast, interval_table
from suffix_analysis.traces import CLOSURE_BOUND, IDENTITY_BOUND, Traces, trace

GAP_FLOOR = 1e-6  # of the mean residual norm: below it the normalised projection is undefined (METHODS §2)


@dataclass(frozen=True)
class ArmTraces:
    """One arm's traces, suffix by suffix over the same prompts; ``suffixes`` is empty in arms without one."""

    arm: str
    suffixes: tuple[Suffix, ...]
    traces: tuple[Traces, ...]

    def cells(self, pick: Callable[[Traces], Tensor]) -> ndarray:
        """A quantity [prompt …] of every suffix as float64 [prompt suffix measure], measures flattened."""
        stacked = torch.stack([pick(t) for t in self.traces], dim=1).double()
        return stacked.flatten(2).numpy() if stacked.dim() > 2 else stacked[:, :, None].numpy()


def analyze(
    model: Model,
    direction: Direction,
    prompts: Sequence[Prompt],
    suffixes: Sequence[Suffix | str],
    *,
    n_top: int = 8,
    n_views: int = 4,
    max_prompts: int | None = None,
    on_prompts: Callable[[int], None] | None = None,
) -> Findings:
    """Trace every arm and tabulate projections, region attention and exact head contributions.

    Args:
        model: the model.
        direction: its refusal direction.
        prompts: harmful prompts (kind ``harmful`` or empty) and, for two more arms, harmless ones. Report prompts are
            measured; select prompts choose the top heads. Without splits both are the same, and a check says so.
        suffixes: records with their arms, or strings (adversarial).
        n_top: how many heads are called top heads.
        n_views: prompts whose full patterns are kept for the attention views.
        max_prompts: at most this many report prompts of each kind (the first ones of an evenly spread choice).
        on_prompts: called with the number of prompts traced after each batch.

    Raises:
        UserError: no harmful prompts, or a trace fails (see :func:`suffix_analysis.traces.trace`).
    """
    records = to_suffixes(suffixes)
    report = _of(prompts, "harmful", "report", max_prompts)
    chosen_on = _of(prompts, "harmful", "select", None)
    if not report:
        raise UserError("There are no harmful prompts of the report split to analyse.")
    separate = not {p.id for p in chosen_on} & {p.id for p in report}
    harmless = _of(prompts, "harmless", "report", max_prompts)

    def run(some: Sequence[Prompt], suffix: str = "") -> Traces:
        return trace(model, some, direction, suffix=suffix, on_batch=on_prompts)

    select_none = run(chosen_on)
    heads = top_heads(select_none, below=direction.layer, count=n_top)
    arms = [ArmTraces("none", (), (run(report),))]
    for name in SUFFIX_ARMS:
        own = tuple(s for s in records if s.arm == name)
        if own:
            arms.append(ArmTraces(name, own, tuple(run(report, s.text) for s in own)))
    first = next((s for s in records if s.arm == "adversarial"), None)
    if harmless:
        arms.append(ArmTraces("harmless", (), (run(harmless),)))
        if first is not None:
            arms.append(ArmTraces("harmless+adversarial", (first,), (run(harmless, first.text),)))
    select_arms = [ArmTraces("none", (), (select_none,))]
    if first is not None:
        select_arms.append(ArmTraces("adversarial", (first,), (run(chosen_on, first.text),)))
    tables = {
        "profile": [row for arm in arms for row in profile_rows(arm, direction)],
        "heads": [
            row
            for split, group in (("select", select_arms), ("report", arms))
            for arm in group
            for row in head_rows(arm, split)
        ],
        "top_heads": [vars(head) for head in heads],
        "shift": [row for arm in arms for row in shift_rows(arm, heads)],
        "contrasts": projection_contrasts(arms, direction),
    }
    everything = [t for arm in [*arms, *select_arms] for t in arm.traces]
    views = report[:: max(1, len(report) // n_views)][:n_views]
    return Findings(
        tables=tables,
        summary=_summary(model, direction, everything),
        checks=identity_checks(everything, arms, separate),
        patterns=[
            view
            for prompt in views
            for suffix in ([None, first] if first is not None else [None])
            for view in [pattern_view(model, direction, prompt, suffix, heads)]
        ],
    )


def _of(prompts: Sequence[Prompt], kind: str, split: str, most: int | None) -> list[Prompt]:
    """Prompts of a kind and split; those without a kind are harmful, those without a split belong to every one."""
    own = [p for p in prompts if (p.kind or "harmful") == kind and (p.split or split) == split]
    if most is None or len(own) <= most:
        return own
    return [own[i * len(own) // most] for i in range(most)]  # evenly spread, so that no topic is cut off


def projection_measures(traces: Traces, direction: Direction) -> dict[str, Tensor]:
    """Cosine, raw and normalised projection [prompt layer]; normalised has NaN columns where the gap is too small."""
    unit = direction.unit
    harmful, harmless = direction.means_harmful @ unit, direction.means_harmless @ unit
    gap = harmful - harmless
    scale = direction.means_harmful.norm(dim=-1)
    gap = torch.where(gap.abs() < GAP_FLOOR * scale, torch.full_like(gap, float("nan")), gap)
    return {
        "cosine": traces.projection / traces.norm,
        "projection": traces.projection,
        "normalised": (traces.projection - harmless) / gap,
    }


def profile_rows(arm: ArmTraces, direction: Direction) -> list[dict[str, Any]]:
    """Projection profile by layer with intervals."""
    rows = []
    for measure in ("cosine", "normalised", "projection"):
        cells = arm.cells(lambda t, m=measure: projection_measures(t, direction)[m])  # type: ignore[misc]
        good = np.isfinite(cells).all(axis=(0, 1))
        mean, lo, hi = (np.full(cells.shape[2], np.nan) for _ in range(3))
        mean[good], lo[good], hi[good] = interval_table(cells[:, :, good])
        rows += [
            {
                "arm": arm.arm,
                "layer": layer,
                "measure": measure,
                "mean": _or_none(mean[layer]),
                "lo": _or_none(lo[layer]),
                "hi": _or_none(hi[layer]),
                "n_prompts": cells.shape[0],
            }
            for layer in range(cells.shape[2])
        ]
    return rows


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def head_rows(arm: ArmTraces, split: str) -> list[dict[str, Any]]:
    """Every head's contribution with its interval, and its mean attention by region."""
    mean, lo, hi = interval_table(arm.cells(lambda t: t.head_contribution))
    shown = ("instruction", "suffix", "chat", "system")
    attention = {name: arm.cells(lambda t, n=name: region(t.attention, n)).mean(axis=(0, 1)) for name in shown}  # type: ignore[misc]
    n_heads = arm.traces[0].attention.shape[2]
    return [
        {
            "arm": arm.arm,
            "split": split,
            "layer": i // n_heads,
            "head": i % n_heads,
            "contribution": float(mean[i]),
            "lo": float(lo[i]),
            "hi": float(hi[i]),
            **{f"attention_{name}": float(attention[name][i]) for name in shown},
        }
        for i in range(len(mean))
    ]


def shift_rows(arm: ArmTraces, heads: Sequence[TopHead]) -> list[dict[str, Any]]:
    """Attention and contribution by region for the top heads and, as layer and head −1, for their sum."""
    attention = arm.cells(lambda t: _with_sum(of_heads(t.attention, heads)))
    written = arm.cells(lambda t: _with_sum(of_heads(t.contribution, heads)))
    lifted = arm.cells(
        lambda t: _with_sum(torch.stack([lift(t.attention[:, h.layer, h.head], t.n_tokens) for h in heads], dim=1))
    ).mean(axis=(0, 1))
    a_mean, a_lo, a_hi = interval_table(attention)
    c_mean, c_lo, c_hi = interval_table(written)
    labels = [(h.layer, h.head) for h in heads] + [(-1, -1)]
    rows = []
    for i, (layer, head) in enumerate(labels):
        for j, name in enumerate(REGIONS):
            k = i * len(REGIONS) + j
            share = 1.0 if layer >= 0 else float(len(heads))  # lift of a sum is the mean lift
            rows.append(
                {
                    "arm": arm.arm,
                    "layer": layer,
                    "head": head,
                    "region": name,
                    "attention": float(a_mean[k]),
                    "attention_lo": float(a_lo[k]),
                    "attention_hi": float(a_hi[k]),
                    "lift": float(lifted[k]) / share,
                    "contribution": float(c_mean[k]),
                    "contribution_lo": float(c_lo[k]),
                    "contribution_hi": float(c_hi[k]),
                }
            )
    return rows


def _with_sum(values: Tensor) -> Tensor:
    """[prompt top region] with one more row: the sum over the heads."""
    return torch.cat([values, values.sum(dim=1, keepdim=True)], dim=1)


def projection_contrasts(arms: Sequence[ArmTraces], direction: Direction) -> list[dict[str, Any]]:
    """Normalised projection at the direction's layer, each suffix arm against none (and adversarial against random)."""
    at = direction.layer
    values = {
        arm.arm: arm.cells(lambda t: projection_measures(t, direction)["normalised"][:, at])[:, :, 0] for arm in arms
    }
    pairs = [(name, "none") for name in SUFFIX_ARMS] + [("adversarial", "random"), ("harmless+adversarial", "harmless")]
    return [
        {
            "measure": "normalised projection",
            "arm": a,
            "against": b,
            **vars(contrast(values[a], values[b])),
        }
        for a, b in pairs
        if a in values and b in values and np.isfinite(values[a]).all() and np.isfinite(values[b]).all()
    ]


def identity_checks(traces: Sequence[Traces], arms: Sequence[ArmTraces], separate: bool) -> list[dict[str, Any]]:
    """The identities of this run, with their bounds (METHODS §0 and §3)."""
    identity, closure = max(t.identity for t in traces), max(t.closure for t in traces)
    several = {arm.arm: len(arm.suffixes) for arm in arms if arm.suffixes}
    few = ", ".join(name for name, n in several.items() if n < MIN_SUFFIXES and not name.startswith("harmless"))
    return [
        {
            "name": "head contributions add up",
            "value": identity,
            "bound": IDENTITY_BOUND,
            "passed": identity <= IDENTITY_BOUND,
            "sentence": "Contributions of all heads and sources plus the bias equal each attention write along r̂.",
        },
        {
            "name": "writes add up",
            "value": closure,
            "bound": CLOSURE_BOUND,
            "passed": closure <= CLOSURE_BOUND,
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
            "sentence": f"Arms with fewer than {MIN_SUFFIXES} suffixes are descriptive: {few or 'none'}.",
        },
    ]


def _summary(model: Model, direction: Direction, traces: Sequence[Traces]) -> dict[str, Any]:
    n_chat = traces[0].chats[0].n_chat
    chat_ids = traces[0].chats[0].ids[-n_chat:]
    vector = direction.vector
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "embedded": model.name == "embedded",
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "d_model": model.d_model,
        "direction": {
            "position": direction.position,
            "layer": direction.layer,
            "token": token_strings(model.tokenizer, [int(chat_ids[direction.position])])[0],
            "norm": float(vector.norm()),
            # few very large coordinates can dominate a difference of means
            "top10_share": float(vector.square().topk(min(10, len(vector))).values.sum() / vector.square().sum()),
        },
        "refusal_tokens": [{"id": i, "text": token_strings(model.tokenizer, [i])[0]} for i in direction.refusal_tokens],
        "retokenised": sum(not survives_decoding(model.tokenizer, chat) for t in traces for chat in t.chats),
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
