"""Candidates grouped by where they first differ from the current suffix, so that the part before runs only once."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def overhead_tokens(dtype: torch.dtype) -> int:
    """What starting one more forward costs, in tokens that could be run instead.

    Lower precisions have cheaper tokens, so more of them (`benchmarks/gcg.py overhead` measures it).
    """
    return 25 if dtype == torch.float32 else 100


def first_changes(ids: Int[Tensor, "cand suffix"], current: Int[Tensor, " suffix"]) -> Int[Tensor, " cand"]:
    """The first position at which each candidate differs from ``current`` (the last one where it does not)."""
    differs = ids != current
    differs[:, -1] = True
    return differs.int().argmax(dim=1)


def group_by_start(
    starts: Int[Tensor, " cand"], n_suffix: int, n_after: int, overhead: int
) -> list[tuple[int, list[int]]]:
    """Groups of candidates as (position to run from, indices), with the fewest tokens run in all.

    A group runs every candidate from the earliest start in it, ``n_suffix`` − start + ``n_after`` tokens each, and
    costs ``overhead`` tokens. What the last group leaves out is run once for all, unless that group starts at 0; so
    few candidates are run from 0 although they start later. Exact, by dynamic programming over the distinct starts.
    """
    members: dict[int, list[int]] = {0: []}
    for i, start in enumerate(starts.tolist()):
        members.setdefault(start, []).append(i)
    values = sorted(members)
    # best[k]: fewest tokens for the starts from the k-th on, and where the first group ends
    best: list[tuple[float, int]] = [(0.0, 0)] * (len(values) + 1)
    for k in range(len(values) - 1, -1, -1):
        each = n_suffix - values[k] + n_after
        shared = overhead + values[k] if values[k] else 0
        options = []
        count = 0
        for end in range(k + 1, len(values) + 1):
            count += len(members[values[end - 1]])
            cost = overhead + count * each if count else 0
            options.append((cost + (best[end][0] if end < len(values) else shared), end))
        best[k] = min(options)
    groups = []
    k = 0
    while k < len(values):
        end = best[k][1]
        groups.append((values[k], [i for value in values[k:end] for i in members[value]]))
        k = end
    return [group for group in groups if group[1]]
