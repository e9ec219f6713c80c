"""Grouping of candidates by their first change."""

from __future__ import annotations

import itertools

import pytest
import torch

from attacks.grouping import first_changes, group_by_start


def test_first_change_is_found_and_an_equal_row_counts_as_changed_last() -> None:
    current = torch.tensor([1, 2, 3])
    ids = torch.tensor([[9, 2, 3], [1, 9, 9], [1, 2, 9], [1, 2, 3]])
    assert first_changes(ids, current).tolist() == [0, 1, 2, 2]


def tokens(groups: list[tuple[int, list[int]]], n_suffix: int, n_after: int, overhead: int) -> int:
    shared = groups[-1][0]
    own = sum(overhead + len(members) * (n_suffix - start + n_after) for start, members in groups)
    return own + (overhead + shared if shared else 0)


@pytest.mark.parametrize("overhead", [0, 5, 40, 10_000])
@pytest.mark.parametrize("late", [[0, 3, 3, 1, 5, 5, 5, 2, 0, 4], [5, 5, 3], [5, 5, 5, 5, 5, 5, 5, 5, 4], [4]])
def test_groups_are_complete_and_no_other_grouping_runs_fewer_tokens(overhead: int, late: list[int]) -> None:
    starts = torch.tensor(late)
    groups = group_by_start(starts, 6, 4, overhead)
    assert sorted(i for _, members in groups for i in members) == list(range(len(starts)))
    assert all(starts[i] >= start for start, members in groups for i in members)

    def grouped(values: list[int], cut: tuple[int, ...], first: int) -> list[tuple[int, list[int]]]:
        parts = [values[a:b] for a, b in itertools.pairwise([0, *cut, len(values)])]
        found = [(part[0], [i for i, s in enumerate(late) if s in part]) for part in parts]
        return [(min(first, found[0][0]), found[0][1]), *found[1:]]

    values = sorted(set(late))
    best = min(
        tokens(grouped(values, cut, first), 6, 4, overhead)
        for n in range(len(values))
        for cut in itertools.combinations(range(1, len(values)), n)
        for first in (0, 6)
    )
    assert tokens(groups, 6, 4, overhead) == best


def test_a_few_candidates_run_from_the_beginning_rather_than_in_two_forwards() -> None:
    assert group_by_start(torch.tensor([5, 5]), 6, 4, 40) == [(0, [0, 1])]
    assert group_by_start(torch.tensor([5] * 20), 6, 4, 40) == [(5, list(range(20)))]
