"""One arm's traces, and its tables with intervals: projections, heads, attention and dominance by region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from suffix_analysis.chat import REGIONS
from suffix_analysis.directions import Direction
from suffix_analysis.heads import TopHead, lift, of_heads, region, without_sink
from suffix_analysis.records import Suffix, by_text
from suffix_analysis.stats import interval_table
from suffix_analysis.traces import Traces

GAP_FLOOR = 1e-6  # of the mean residual's norm: below it the normalised projection is undefined (METHODS §2)


@dataclass(frozen=True)
class ArmTraces:
    """One arm's traces, suffix by suffix over the same prompts; ``suffixes`` is empty in arms without one."""

    arm: str
    suffixes: tuple[Suffix, ...]
    traces: tuple[Traces, ...]

    @property
    def n_texts(self) -> int:
        """How many of the suffixes are no permutations of others; 0 in arms without one."""
        return len(by_text(self.suffixes))

    def cells(self, pick: Callable[[Traces], Tensor]) -> ndarray:
        """A quantity [prompt …] of every suffix as float64 [prompt suffix measure], measures flattened.

        Permutations of one text count as one suffix, with their mean.
        """
        stacked = torch.stack([pick(t) for t in self.traces], dim=1).double()
        texts = by_text(self.suffixes)
        if len(texts) < len(self.suffixes):
            stacked = torch.stack([stacked[:, some].mean(dim=1) for some in texts], dim=1)
        return stacked.flatten(2).numpy() if stacked.dim() > 2 else stacked[:, :, None].numpy()


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


def term_rows(arm: ArmTraces) -> list[dict[str, Any]]:
    """What attention and MLP of every layer write along r̂ at chat[-1], with intervals; and the embedding (layer −1).

    The means sum to the raw projection after the last block.
    """
    picks: dict[str, Callable[[Traces], Tensor]] = {
        "attention": lambda t: t.attention_out,
        "MLP": lambda t: t.mlp_out,
        "embedding": lambda t: t.embedding,
    }
    rows = []
    for term, pick in picks.items():
        cells = arm.cells(pick)
        for layer, (mean, lo, hi) in enumerate(zip(*interval_table(cells), strict=True)):
            rows.append(
                {
                    "arm": arm.arm, "layer": -1 if term == "embedding" else layer, "term": term, "mean": float(mean),
                    "lo": float(lo), "hi": float(hi), "n_prompts": cells.shape[0], "n_suffixes": len(arm.suffixes),
                }
            )  # fmt: skip
    return rows


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def head_rows(arm: ArmTraces, split: str) -> list[dict[str, Any]]:
    """Every head's contribution with its interval, and its mean attention by region."""
    mean, lo, hi = interval_table(arm.cells(lambda t: t.head_contribution))
    shown = ("instruction", "suffix", "chat", "system")
    attention = {name: arm.cells(lambda t, n=name: region(t.attention, n)).mean(axis=(0, 1)) for name in shown}  # type: ignore[misc]
    sink = arm.cells(lambda t: t.sink).mean(axis=(0, 1))
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
            "attention_first": float(sink[i]),
            "n_prompts": len(arm.traces[0].chats),
        }
        for i in range(len(mean))
    ]


def dominance_rows(arm: ArmTraces) -> list[dict[str, Any]]:
    """Each region's dominance in every layer's attention output at chat[-1]; the suffix's is its hijacking strength."""
    mean, lo, hi = interval_table(arm.cells(lambda t: t.dominance))
    return [
        {
            "arm": arm.arm, "layer": i // len(REGIONS), "region": REGIONS[i % len(REGIONS)],
            "dominance": float(mean[i]), "lo": float(lo[i]), "hi": float(hi[i]),
        }
        for i in range(len(mean))
    ]  # fmt: skip


def shift_rows(arm: ArmTraces, heads: Sequence[TopHead]) -> list[dict[str, Any]]:
    """Attention and contribution by region for the top heads and, as layer and head −1, for their sum."""
    attention = arm.cells(lambda t: _with_sum(of_heads(t.attention, heads)))
    written = arm.cells(lambda t: _with_sum(of_heads(t.contribution, heads)))
    rest = arm.cells(lambda t: _with_sum(of_heads(without_sink(t), heads))).mean(axis=(0, 1))
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
            share = 1.0 if layer >= 0 else float(len(heads))  # lift of a sum is the mean lift, and so is the rest
            rows.append(
                {
                    "arm": arm.arm,
                    "layer": layer,
                    "head": head,
                    "region": name,
                    "attention": float(a_mean[k]),
                    "attention_lo": float(a_lo[k]),
                    "attention_hi": float(a_hi[k]),
                    "attention_rest": float(rest[k]) / share,
                    "lift": _or_none(lifted[k] / share),
                    "contribution": float(c_mean[k]),
                    "contribution_lo": float(c_lo[k]),
                    "contribution_hi": float(c_hi[k]),
                    "n_prompts": len(arm.traces[0].chats),
                }
            )
    return rows


def _with_sum(values: Tensor) -> Tensor:
    """[prompt top region] with one more row: the sum over the heads."""
    return torch.cat([values, values.sum(dim=1, keepdim=True)], dim=1)
