"""Is it one direction: planted clouds with a known number of separating directions, and tiny models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from suffix_analysis.directions import Direction
from suffix_analysis.oneness import (
    cascade,
    effective_rank,
    fitted,
    measure_oneness,
    projected,
    separation,
    split_half,
)
from suffix_analysis.stats import auroc, auroc_interval
from tests import tiny

HARMFUL = ["Pick a lock", "Break a window now", "Steal a car", "Hit a man"]
HARMLESS = ["Bake a cake", "Sing about the sea", "Name a tall tree", "Draw a cat"]


def clouds(gap: float, n: int, seed: int, dims: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Two Gaussian clouds that differ by ``gap`` along the first axis."""
    rng = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, dims, generator=rng), torch.randn(n, dims, generator=rng)
    a[:, 0] += gap
    return a, b


def test_auroc_is_its_definition() -> None:
    a, b = np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0])
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert auroc(a, b) == pytest.approx(np.mean(pairs))
    value, lo, hi = auroc_interval(a, b)
    assert lo <= value <= hi


def test_one_separating_direction_is_counted_as_one_and_none_as_none() -> None:
    one = cascade(clouds(5.0, 300, 0), clouds(5.0, 300, 1))
    assert one[0]["auroc"] > 0.99
    assert effective_rank(one) == 1
    assert effective_rank(cascade(clouds(0.0, 300, 2), clouds(0.0, 300, 3))) == 0


def test_copies_of_the_difference_are_counted_each() -> None:
    """Three noisy copies of one hidden label: taking one out leaves the others."""
    rng = torch.Generator().manual_seed(4)

    def make(label: float, n: int) -> torch.Tensor:
        x = torch.randn(n, 12, generator=rng)
        x[:, :3] = 0.2 * x[:, :3] + 3 * label + torch.randn(n, 3, generator=rng)
        return x

    rows = cascade((make(1, 400), make(0, 400)), (make(1, 400), make(0, 400)), count=4)
    assert 1 <= effective_rank(rows) <= 3


def test_split_halves_agree_where_there_is_a_direction_and_not_where_there_is_none() -> None:
    clear, nothing = split_half(*clouds(5.0, 100, 0)), split_half(*clouds(0.0, 100, 1))
    assert clear["lo"] > 0.9
    assert abs(nothing["value"]) < 0.3


def test_separation_is_projection_on_the_fitted_difference() -> None:
    model = tiny.model("llama")
    sets = [[model.chat(text) for text in texts] for texts in (HARMFUL, HARMLESS)]
    places, layer, position = sets[0][0].n_chat + 1, 2, -2
    (bad, bad_means), (good, good_means) = (fitted(model, chats[:2], layer, places) for chats in sets)
    differences = (bad_means - good_means).float()
    assert torch.allclose(differences[layer], bad.mean(0) - good.mean(0), atol=1e-5)
    states, tables = zip(*(projected(model, chats[2:], layer, differences) for chats in sets), strict=True)
    rows = separation(*tables)
    assert len(rows) == model.n_layers * places
    r = differences[layer, position]
    wanted = auroc((states[0][:, position] @ r).numpy(), (states[1][:, position] @ r).numpy())
    (row,) = [row for row in rows if (row["layer"], row["position"]) == (layer, position)]
    assert row["auroc"] == pytest.approx(wanted)


def test_all_tables_are_made(family: str) -> None:
    model = tiny.model(family)
    sets = [[model.chat(text) for text in texts] for texts in (HARMFUL, HARMLESS)]
    zeros = torch.zeros(model.n_layers + 1, model.d_model)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, -1, 1, [], zeros, zeros, (5,), {})
    found = measure_oneness(model, direction, (sets[0][:2], sets[1][:2]), (sets[0][2:], sets[1][2:]))
    assert set(found) == {"separation", "cascade", "stability", "two_directions"}
    harmfulness, refusal = found["two_directions"]
    assert refusal["cosine_with_refusal"] == pytest.approx(1)
    assert -1 <= harmfulness["cosine_with_refusal"] < 1
    assert refusal["harmful"] == harmfulness["harmful"] != refusal["harmful_ablated"]
