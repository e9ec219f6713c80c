"""Is refusal one direction in this model? Stability, separation, what is left without it, and harmfulness beside it.

All directions are fitted on *fit* prompts and measured on held-out ones: in a study those of the *report* split.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.chat import Chat
from suffix_analysis.directions import Direction
from suffix_analysis.forward import ablated_logits, added_logits, block_inputs, last_logits
from suffix_analysis.interventions import random_directions
from suffix_analysis.models import Model
from suffix_analysis.prompts import spread
from suffix_analysis.refusal import refusal_score
from suffix_analysis.stats import auroc, auroc_interval, interval

HALVES = 200  # random splits of the fit prompts
CASCADE = 8  # directions taken out one after the other, and leading ones that the effective rank looks at
EFFECT_PROMPTS = 32  # of each kind, for the effects of directions
CONTROLS = 4  # random directions, and as many orthogonal ones
DRAWS = 500  # bootstrap draws of the effective rank
SHRINKAGE = 0.1  # of the mean variance, added to every direction's


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
    difference of means itself the means are equal and say nothing more. This shows how redundant the difference is,
    not how many directions there are: a single one separates again and again where features are correlated.
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
    vector = whitened(centred, (harmful.mean(dim=0) - harmless.mean(dim=0))[None])[0]
    return vector / vector.norm()


def whitened(centred: Float[Tensor, "prompt d_model"], x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """The inverse of the prompts' shrunk covariance applied to each row of ``x``.

    Where there are fewer prompts than dimensions by the Woodbury identity, which solves a system of the prompts' size.
    """
    n, size = centred.shape
    ridge = SHRINKAGE * float(centred.square().sum()) / n / size
    if n >= size:
        eye = torch.eye(size, dtype=centred.dtype)
        return torch.linalg.solve(centred.T @ centred / n + ridge * eye, x.T).T
    inner = centred @ centred.T + n * ridge * torch.eye(n, dtype=centred.dtype)
    return (x - torch.linalg.solve(inner, centred @ x.T).T @ centred) / ridge


def effective_rank(
    fit: tuple[Float[Tensor, "a d_model"], Float[Tensor, "b d_model"]],
    held_out: tuple[Float[Tensor, "c d_model"], Float[Tensor, "d d_model"]],
    seed: int = 0,
    count: int = CASCADE,
) -> dict[str, float]:
    """In how many directions harmful prompts lie away from harmless ones, further than these from each other.

    The directions are those along which the harmful *fit* prompts' mean square distance from the mean harmless one is
    largest, in units of the harmless prompts' (shrunk) variance. Along each, the excess is that ratio among held-out
    prompts, less 1; excesses that resampling the prompts does not set apart from 0 count as 0. Their participation
    ratio (Σe)² / Σe² is 1 if one direction holds all of it, 2 if two hold a half each, 0 if there is no excess.
    """
    bad, good, unseen_bad, unseen_good = (x.double() for x in (*fit, *held_out))
    middle = good.mean(dim=0)
    away = bad - middle
    inverse = whitened(good - middle, away)
    _, vectors = torch.linalg.eigh(away @ inverse.T)
    units = vectors.flip(1)[:, : min(count, len(bad))].T @ inverse
    squares = [((x - middle) @ units.T).square().numpy() for x in (unseen_bad, unseen_good)]
    rng = np.random.default_rng(seed)
    draws = np.stack(
        [np.divide(*(x[rng.integers(len(x), size=len(x))].mean(axis=0) for x in squares)) - 1 for _ in range(DRAWS)]
    )
    there = np.quantile(draws, 0.025, axis=0) > 0

    def ratio(excess: Float[np.ndarray, " direction"]) -> float:
        kept = np.where(there, np.maximum(excess, 0), 0)
        return float(kept.sum() ** 2 / (kept**2).sum()) if kept.any() else 0.0

    lo, hi = np.quantile([ratio(draw) for draw in draws], [0.025, 0.975])
    return {"value": ratio(squares[0].mean(axis=0) / squares[1].mean(axis=0) - 1), "lo": float(lo), "hi": float(hi)}


def effects(
    model: Model,
    direction: Direction,
    vectors: Mapping[str, Float[Tensor, " d_model"]],
    held_out: tuple[Sequence[Chat], Sequence[Chat]],
    alpha: float = 1.0,
    controls: Collection[str] = (),
) -> list[dict[str, Any]]:
    """What each vector does, all at the refusal direction's layer and length.

    Effects are mean refusal scores: of harmful prompts with the vector ablated, of harmless ones with it added, and the
    paired changes with their intervals over prompts. Harmfulness and refusal need not agree: a model may know that a
    request is harmful and yet not refuse it (Zhao et al. 2025, "LLMs Encode Harmfulness and Refusal Separately").
    Cosines are with the direction, and with the vector named "refusal" (fitted at chat[-1], where the chosen one need
    not have been taken).
    """
    tokens, length = direction.refusal_tokens, direction.vector.norm()
    last = vectors.get("refusal", direction.vector)
    bad, good = ([chat.ids for chat in spread(chats, EFFECT_PROMPTS)] for chats in held_out)
    plain = [refusal_score(last_logits(model.hf, model.tokenizer, rows), tokens).cpu() for rows in (bad, good)]
    stacked = torch.stack([vector / vector.norm() * length for vector in vectors.values()])
    ablated, added = (
        ablated_logits(model, bad)(stacked),
        added_logits(model, good, alpha, [direction.layer])(stacked, direction.layer),
    )
    rows = []
    for name, vector, *changed in zip(vectors, stacked, ablated, added, strict=True):
        scores = [refusal_score(logits, tokens).cpu() for logits in changed]
        row = {
            "direction": name, "control": name in controls,
            "cosine_with_refusal": float(torch.cosine_similarity(vector, direction.vector, dim=0)),
            "cosine_with_chat_end": float(torch.cosine_similarity(vector, last, dim=0)),
            "harmful": float(plain[0].mean()), "harmful_ablated": float(scores[0].mean()),
            "harmless": float(plain[1].mean()), "harmless_added": float(scores[1].mean()),
        }  # fmt: skip
        for what, before, after in zip(("ablated", "added"), plain, scores, strict=True):
            change = interval((after - before).numpy()[:, None], suffix_arm=False)
            row |= {f"{what}_change": change.estimate, f"{what}_lo": change.lo, f"{what}_hi": change.hi}
        rows.append(row | {"n_harmful": len(bad), "n_harmless": len(good)})
    return rows


def control_vectors(vector: Float[Tensor, " d_model"], seed: int = 0) -> dict[str, Float[Tensor, " d_model"]]:
    """Random directions, and random ones made orthogonal to ``vector``: of its length, they must flip no answer."""
    generator = torch.Generator().manual_seed(seed)
    made = {f"random {i + 1}": torch.randn(len(vector), generator=generator).to(vector) for i in range(CONTROLS)}
    across = random_directions(vector, CONTROLS, seed + 1)
    return made | {f"orthogonal {i + 1}": other for i, other in enumerate(across)}


def measure_oneness(
    model: Model,
    direction: Direction,
    fit: tuple[Sequence[Chat], Sequence[Chat]],
    held_out: tuple[Sequence[Chat], Sequence[Chat]],
    alpha: float = 1.0,
    seed: int = 0,
) -> dict[str, list[dict[str, Any]]]:
    """Everything above at the direction's own layer and position, as tables. Sets are (harmful, harmless)."""
    places = fit[0][0].n_chat + 1
    (bad, bad_means), (good, good_means) = (fitted(model, chats, direction.layer, places) for chats in fit)
    differences = (bad_means - good_means).float()
    unseen = [projected(model, chats, direction.layer, differences) for chats in held_out]
    at = [x[:, direction.position] for x in (bad, good, *(states for states, _ in unseen))]
    here, controls = differences[direction.layer], control_vectors(direction.vector, seed)
    vectors = {"chosen": direction.vector, "refusal": here[-1], "harmfulness": here[0]}
    return {
        "separation": separation(*(table for _, table in unseen)),
        "cascade": cascade((at[0], at[1]), (at[2], at[3])),
        "stability": [
            {"measure": "split-half cosine", **split_half(at[0], at[1], seed)},
            {"measure": "effective rank", **effective_rank((at[0], at[1]), (at[2], at[3]), seed)},
        ],
        "two_directions": effects(model, direction, vectors | controls, held_out, alpha, controls),
    }
