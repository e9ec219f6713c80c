"""Is it one direction: planted clouds with a known number of separating directions, and tiny models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from suffix_analysis import oneness
from suffix_analysis.directions import Direction
from suffix_analysis.interventions import ablate, add
from suffix_analysis.oneness import (
    CONTROLS,
    SHRINKAGE,
    cascade,
    effective_rank,
    effects,
    fitted,
    measure_oneness,
    projected,
    separation,
    split_half,
    whitened,
)
from suffix_analysis.refusal import scores_of
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


def planted(
    steps: list[float], dims: int, n: int, *, decay: float = 0.0, seed: int = 0
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Fit and held-out sets in which harmful prompts of topic k are moved by ``steps[k]`` along axis k.

    ``decay``: the variance of the j-th axis falls as j to the power of −decay (turned, so that no axis is special).
    """
    rng = torch.Generator().manual_seed(seed)
    spread = (torch.arange(dims) + 1.0) ** (-decay / 2)
    turned = torch.linalg.qr(torch.randn(dims, dims, generator=rng)).Q
    axes = torch.linalg.qr(torch.randn(dims, max(1, len(steps)), generator=rng)).Q.T

    def cloud(moved: bool) -> torch.Tensor:
        x = (torch.randn(n, dims, generator=rng) * spread) @ turned
        for k, step in enumerate(steps if moved else []):
            x[k :: len(steps)] += step * axes[k]
        return x

    return (cloud(True), cloud(False)), (cloud(True), cloud(False))


@pytest.mark.parametrize(
    ("dims", "n", "decay", "step"),
    [(24, 300, 0, 5), (64, 128, 0, 6), (64, 128, 1, 4), (576, 128, 0, 15), (576, 128, 1, 6)],
)
def test_one_planted_direction_has_effective_rank_one(dims: int, n: int, decay: float, step: float) -> None:
    """Also where features are correlated or there are more of them than prompts: there a cascade counts up to seven."""
    found = effective_rank(*planted([step], dims, n, decay=decay))
    assert found["lo"] <= found["value"] <= found["hi"]
    assert found["value"] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("n_topics", [2, 3])
def test_topics_that_move_along_directions_of_their_own_are_counted(n_topics: int) -> None:
    assert effective_rank(*planted([12.0] * n_topics, 64, 300))["value"] == pytest.approx(n_topics, rel=0.2)


def test_no_difference_has_no_rank() -> None:
    values = [effective_rank(*planted([], 64, 128, seed=seed))["value"] for seed in range(10)]
    assert np.mean([value == 0 for value in values]) >= 0.5 and max(values) < 4


def test_the_woodbury_form_is_the_same_inverse() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 12, generator=rng, dtype=torch.float64) for n in (8, 3))
    covariance = x.T @ x / 8
    shrunk = covariance + SHRINKAGE * covariance.trace() / 12 * torch.eye(12)
    assert torch.allclose(whitened(x, y), torch.linalg.solve(shrunk, y.T).T)


def test_a_cascade_begins_with_what_separates() -> None:
    one = cascade(clouds(5.0, 300, 0), clouds(5.0, 300, 1))
    assert one[0]["auroc"] > 0.99 and one[1]["auroc"] < 0.75
    assert cascade(clouds(0.0, 300, 2), clouds(0.0, 300, 3))[0]["lo"] < 0.5


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
    chosen, refusal, harmfulness, *controls = found["two_directions"]
    assert [row["direction"] for row in (chosen, refusal, harmfulness)] == ["chosen", "refusal", "harmfulness"]
    assert chosen["cosine_with_refusal"] == pytest.approx(1) == refusal["cosine_with_chat_end"]
    assert chosen["cosine_with_chat_end"] == pytest.approx(refusal["cosine_with_refusal"], abs=1e-6)
    assert -1 <= harmfulness["cosine_with_refusal"] < 1
    assert -1 <= harmfulness["cosine_with_chat_end"] < 1
    assert chosen["harmful"] == harmfulness["harmful"] != chosen["harmful_ablated"]
    for row in found["two_directions"]:
        assert row["ablated_change"] == pytest.approx(row["harmful_ablated"] - row["harmful"], abs=1e-4)
        assert row["added_lo"] <= row["added_change"] <= row["added_hi"]
    assert len(controls) == 2 * CONTROLS
    assert all(abs(row["cosine_with_refusal"]) < 1e-5 for row in controls if row["direction"].startswith("orthogonal"))


def test_effects_are_those_of_directions_of_the_refusal_directions_length() -> None:
    model = tiny.model("llama")
    bad, good = ([model.chat(text) for text in texts] for texts in (HARMFUL, HARMLESS))
    zeros = torch.zeros(model.n_layers + 1, model.d_model)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction(vector, -1, 1, [], zeros, zeros, (5,), {})
    (row,) = effects(model, direction, {"longer": 7 * vector}, (bad, good), alpha=0.5)
    with ablate(model, vector):
        wanted = scores_of(model, [chat.ids for chat in bad], (5,)).mean()
    assert row["harmful_ablated"] == pytest.approx(float(wanted), abs=1e-4)
    with add(model, vector, 1, 0.5):
        wanted = scores_of(model, [chat.ids for chat in good], (5,)).mean()
    assert row["harmless_added"] == pytest.approx(float(wanted), abs=1e-4)


def test_effects_are_counted_on_the_cpu_whatever_the_model_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a GPU have no numpy()."""

    class Elsewhere(torch.Tensor):
        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return self.as_subclass(torch.Tensor)

        def numpy(self) -> None:  # type: ignore[override]
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    here = oneness.refusal_score
    monkeypatch.setattr(oneness, "refusal_score", lambda *args: here(*args).as_subclass(Elsewhere))
    model = tiny.model("llama")
    bad, good = ([model.chat(text) for text in texts] for texts in (HARMFUL, HARMLESS))
    zeros = torch.zeros(model.n_layers + 1, model.d_model)
    direction = Direction(tiny.unit(model.d_model), -1, 1, [], zeros, zeros, (5,), {})
    assert len(effects(model, direction, {"chosen": direction.vector}, (bad, good))) == 1
