"""Is refusal one direction in this model? Stability, separation, what is left without it, and harmfulness beside it.

All directions are fitted on *fit* prompts and measured on *select* ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.chat import Chat
from suffix_analysis.directions import Direction
from suffix_analysis.forward import added_logits, block_inputs, last_logits
from suffix_analysis.interventions import ablate
from suffix_analysis.models import Model
from suffix_analysis.refusal import refusal_score
from suffix_analysis.stats import auroc, auroc_interval

HALVES = 200  # random splits of the fit prompts
CASCADE = 8  # directions taken out one after the other
SHRINKAGE = 0.1  # of the mean variance, added to every direction's
SEPARATES = 0.75  # held-out AUROC from which a direction counts as separating


def fitted(
    model: Model, chats: Sequence[Chat], layer: int, places: int
) -> tuple[Float[Tensor, "prompt place d_model"], Float[Tensor, "layer place d_model"]]:
    """One block's input at the last ``places`` tokens of every prompt, and the mean of every block's."""
    states = torch.zeros(len(chats), places, model.d_model)
    total = torch.zeros(model.n_layers + 1, places, model.d_model, dtype=torch.float64)

    def keep(at: int, group: list[int], found: Tensor) -> None:
        total[at] += found.double().sum(dim=0)
        if at == layer:
            states[group] = found.float()

    block_inputs(model, [chat.ids for chat in chats], places, keep)
    return states, total[:-1] / len(chats)


def projected(
    model: Model, chats: Sequence[Chat], layer: int, directions: Float[Tensor, "layer place d_model"]
) -> tuple[Float[Tensor, "prompt place d_model"], Float[Tensor, "prompt layer place"]]:
    """One block's input at the last tokens of every prompt, and every block's along the direction of its place."""
    n_layers, places, width = directions.shape
    states, table = torch.zeros(len(chats), places, width), torch.zeros(len(chats), n_layers, places)

    def keep(at: int, group: list[int], found: Tensor) -> None:
        if at < n_layers:
            table[group, at] = (found.float() * directions[at]).sum(dim=-1)
        if at == layer:
            states[group] = found.float()

    block_inputs(model, [chat.ids for chat in chats], places, keep)
    return states, table


def separation(
    harmful: Float[Tensor, "a layer place"], harmless: Float[Tensor, "b layer place"]
) -> list[dict[str, Any]]:
    """AUROC of held-out projections at every layer and position, the last instruction token included.

    Position −1 is chat[-1]; the lowest one is instruction[-1], the token before the template's first.
    """
    _, n_layers, places = harmful.shape
    return [
        {
            "layer": layer,
            "position": place - places,
            "auroc": auroc(harmful[:, layer, place].numpy(), harmless[:, layer, place].numpy()),
        }
        for place in range(places)
        for layer in range(n_layers)
    ]


def split_half(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"], seed: int = 0
) -> dict[str, float]:
    """Cosine of the differences of means of random halves: how much of the direction is these prompts' own."""
    rng = np.random.default_rng(seed)
    cosines = []
    for _ in range(HALVES):
        bad, good = (rng.permutation(len(x)) for x in (harmful, harmless))
        first, second = (harmful[bad[side::2]].mean(dim=0) - harmless[good[side::2]].mean(dim=0) for side in (0, 1))
        cosines.append(float(torch.cosine_similarity(first, second, dim=0)))
    lo, hi = np.quantile(cosines, [0.025, 0.975])
    return {"value": float(np.mean(cosines)), "lo": float(lo), "hi": float(hi)}


def cascade(
    fit: tuple[Float[Tensor, "a d_model"], Float[Tensor, "b d_model"]],
    held_out: tuple[Float[Tensor, "c d_model"], Float[Tensor, "d d_model"]],
    count: int = CASCADE,
) -> list[dict[str, float]]:
    """What still separates when the best direction is gone: fit one, take it out, fit the next (nullspace projection).

    Each is a linear discriminant (difference of means over the shrunk covariance within classes): without the
    difference of means itself the means are equal and say nothing more. The number of leading directions that separate
    held-out prompts (AUROC ≥ 0.75) is the effective rank of the difference at this place.
    """
    parts = [x.double().clone() for x in (*fit, *held_out)]
    rows: list[dict[str, float]] = []
    for k in range(count):
        unit = discriminant(parts[0], parts[1])
        value, lo, hi = auroc_interval((parts[2] @ unit).numpy(), (parts[3] @ unit).numpy())
        rows.append({"rank": float(k + 1), "auroc": value, "lo": lo, "hi": hi})
        parts = [x - (x @ unit)[:, None] * unit for x in parts]
    return rows


def discriminant(
    harmful: Float[Tensor, "a d_model"], harmless: Float[Tensor, "b d_model"]
) -> Float[Tensor, " d_model"]:
    """Fisher's linear discriminant of two classes at length 1, the covariance within them shrunk towards a sphere."""
    centred = torch.cat([harmful - harmful.mean(dim=0), harmless - harmless.mean(dim=0)])
    covariance = centred.T @ centred / len(centred)
    size = len(covariance)
    ridge = SHRINKAGE * covariance.trace() / size * torch.eye(size, dtype=covariance.dtype)
    vector = torch.linalg.solve(covariance + ridge, harmful.mean(dim=0) - harmless.mean(dim=0))
    return vector / vector.norm()


def effective_rank(rows: Sequence[dict[str, float]]) -> int:
    """Leading directions of a cascade that separate held-out prompts."""
    for row in rows:
        if row["auroc"] < SEPARATES:
            return int(row["rank"]) - 1
    return len(rows)


def harmfulness_and_refusal(
    model: Model,
    direction: Direction,
    harmfulness: Float[Tensor, " d_model"],
    held_out: tuple[Sequence[Chat], Sequence[Chat]],
) -> list[dict[str, Any]]:
    """Two directions at the refusal direction's layer: harmfulness (instruction[-1]) and refusal; cosine and effects.

    Effects are mean refusal scores: of harmful prompts with a direction ablated, of harmless ones with it added. They
    need not agree: a model may know that a request is harmful and yet not refuse it (Zhao et al. 2025, "LLMs Encode
    Harmfulness and Refusal Separately").
    """
    tokens = direction.refusal_tokens
    bad, good = ([chat.ids for chat in chats] for chats in held_out)
    run_added = added_logits(model, good)
    plain = [float(refusal_score(last_logits(model.hf, model.tokenizer, rows), tokens).mean()) for rows in (bad, good)]
    rows = []
    for name, vector in (("harmfulness", harmfulness), ("refusal", direction.vector)):
        with ablate(model, vector):
            ablated = float(refusal_score(last_logits(model.hf, model.tokenizer, bad), tokens).mean())
        added = float(refusal_score(run_added(vector[None], direction.layer)[0], tokens).mean())
        rows.append(
            {
                "direction": name,
                "cosine_with_refusal": float(torch.cosine_similarity(vector, direction.vector, dim=0)),
                "harmful": plain[0],
                "harmful_ablated": ablated,
                "harmless": plain[1],
                "harmless_added": added,
            }
        )
    return rows


def measure_oneness(
    model: Model,
    direction: Direction,
    fit: tuple[Sequence[Chat], Sequence[Chat]],
    held_out: tuple[Sequence[Chat], Sequence[Chat]],
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Everything above at the direction's own layer and position, as tables."""
    places = fit[0][0].n_chat + 1
    (bad, bad_means), (good, good_means) = (fitted(model, chats, direction.layer, places) for chats in fit)
    differences = (bad_means - good_means).float()
    unseen = [projected(model, chats, direction.layer, differences) for chats in held_out]
    at = [x[:, direction.position] for x in (bad, good, *(states for states, _ in unseen))]
    ranks = cascade((at[0], at[1]), (at[2], at[3]))
    return {
        "separation": separation(*(table for _, table in unseen)),
        "cascade": ranks,
        "stability": [
            {"measure": "split-half cosine", **split_half(at[0], at[1], seed)},
            {"measure": "effective rank", "value": float(effective_rank(ranks)), "lo": None, "hi": None},
        ],
        "two_directions": harmfulness_and_refusal(model, direction, differences[direction.layer, 0], held_out),
    }
