"""From traces to findings about heads: rankings, region attention and the two views of a shift (METHODS §3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.chat import REGIONS
from suffix_analysis.errors import UserError
from suffix_analysis.traces import Traces


@dataclass(frozen=True)
class TopHead:
    """A head chosen for its contribution on the select split."""

    rank: int
    layer: int
    head: int
    select_contribution: float


def top_heads(traces: Traces, below: int, count: int = 8) -> list[TopHead]:
    """The heads with the largest |mean contribution| to r̂ at chat[-1] (the paper, §5.2), strongest first.

    Args:
        traces: harmful prompts of the select split without a suffix.
        below: only heads in layers before this one: the direction is read at its input, so later heads cannot
            have moved it.
        count: how many.

    Raises:
        UserError: no head stands before the layer.
    """
    if not below:
        raise UserError("The direction is read at layer 0, before any head has written; choose one of a later layer.")
    mean = traces.head_contribution.mean(dim=0)[:below]
    order = mean.abs().flatten().argsort(descending=True)[:count].tolist()
    n_heads = mean.shape[1]
    return [TopHead(i + 1, n // n_heads, n % n_heads, float(mean.flatten()[n])) for i, n in enumerate(order)]


def lift(
    attention: Float[Tensor, "prompt region"], n_tokens: Float[Tensor, "prompt region"]
) -> Float[Tensor, "prompt region"]:
    """Region attention over its share of uniform attention |R|/T; an empty region has none (NaN)."""
    uniform = n_tokens / n_tokens.sum(dim=1, keepdim=True)
    return torch.where(n_tokens > 0, attention / uniform.clamp(min=1e-9), torch.full_like(attention, torch.nan))


def without_sink(traces: Traces) -> Float[Tensor, "prompt layer head region"]:
    """Attention by region among all tokens but the first: what a head does with the attention that is not parked there.

    The first token is the BOS token where there is one, and the system prompt's or the template's first elsewhere.
    """
    firsts = [next(i for i, name in enumerate(REGIONS) if bool(chat.regions[name][0])) for chat in traces.chats]
    rest = traces.attention.clone()
    rows = torch.arange(len(firsts))
    rest[rows, :, :, torch.tensor(firsts)] -= traces.sink
    return rest / (1 - traces.sink).clamp(min=1e-9)[..., None]


def of_heads(
    values: Float[Tensor, "prompt layer head region"], heads: Sequence[TopHead]
) -> Float[Tensor, "prompt top region"]:
    """The columns of some heads, in their order."""
    return torch.stack([values[:, head.layer, head.head] for head in heads], dim=1)


def region(values: Float[Tensor, "*any region"], name: str) -> Float[Tensor, "*any"]:
    """One region of a table whose last axis is ``REGIONS``."""
    return values[..., REGIONS.index(name)]
