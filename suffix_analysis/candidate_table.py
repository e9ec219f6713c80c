"""The table of candidate directions: what each does when ablated and when added, and the paper's choice (§2.3, §C)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis.chat import Chat
from suffix_analysis.config import require_layer_share
from suffix_analysis.errors import UserError
from suffix_analysis.forward import ablated_logits, added_logits, last_logits
from suffix_analysis.models import Model
from suffix_analysis.refusal import kl_divergence, refusal_score

MARGIN = 0.5  # nats of refusal score by which a quick precision is allowed to be wrong
COLUMNS = ("position", "layer", "refusal_score", "steering_score", "kl_div_score")
ZERO = 1e-6  # a candidate shorter than this share of the mean residual norm is "zero" and is never normalised


@dataclass(frozen=True)
class DirectionConfig:
    """Settings of extraction and selection; defaults are the paper's.

    ``layer_step`` n scores candidates of every n-th layer only, from 0 on: a quicker look at a deep model.
    ``score_excluded`` also scores those that ``layer_share`` rules out, and takes bypass and KL of those that do not
    induce, as the paper's tables do; without it the choice is the same, and most of the time is saved.
    """

    n_fit: int = 128
    n_select: int = 32
    kl_threshold: float = 0.1
    induce_threshold: float = 0.0
    layer_share: float = 0.8
    layer_step: int = 1
    score_excluded: bool = True
    alpha: float = 1.0
    keep_by_score: bool = True
    rescore: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_fit", "n_select", "layer_step", "rescore"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not math.isfinite(self.alpha):
            raise UserError(f"alpha is {self.alpha}; it must be a finite number.")
        _require_rules(**self.rules)

    @property
    def rules(self) -> dict[str, float]:
        """The keyword arguments of `select`."""
        return {name: getattr(self, name) for name in ("kl_threshold", "induce_threshold", "layer_share")}


def _require_rules(kl_threshold: float, induce_threshold: float, layer_share: float) -> None:
    """Bounds may be infinite, which lets everything pass; a bound that is no number would let it pass unseen."""
    for name, value in (("kl_threshold", kl_threshold), ("induce_threshold", induce_threshold)):
        if math.isnan(value):
            raise UserError(f"{name} is {value}; it must be a number.")
    require_layer_share(layer_share)


def first_late(n_layers: int, layer_share: float) -> int:
    """The first layer whose candidates are too late to be chosen."""
    # the small term keeps products such as 0.8 · 35 from falling below the whole number they stand for
    return math.floor(layer_share * n_layers + 1e-9)


def status(
    row: Mapping[str, Any], *, n_layers: int, kl_threshold: float, induce_threshold: float, layer_share: float
) -> str:
    """Why a candidate is out (``too late``, ``not finite``, ``KL too high``, ``does not induce``), or ``kept``."""
    scores = (row["refusal_score"], row["steering_score"], row["kl_div_score"])
    if row["layer"] >= first_late(n_layers, layer_share):
        return "too late"
    known = [value is not None and math.isfinite(value) for value in scores]
    if known[1] and not known[2] and row["steering_score"] < induce_threshold:
        return "does not induce"  # the others need not have been taken then
    if not all(known):
        return "not finite"
    if row["kl_div_score"] > kl_threshold:
        return "KL too high"
    if row["steering_score"] < induce_threshold:
        return "does not induce"
    return "kept"


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _none_passes(
    rows: Sequence[Mapping[str, Any]],
    told: Sequence[tuple[Mapping[str, Any], str]],
    n_layers: int,
    rules: Mapping[str, float],
) -> str:
    """Why none of the rows passes: the nearest of those that have a status (``told``), and all that it missed."""
    if not rows:
        return "The candidate table is empty."
    scored = [(row, why) for row, why in told if _finite(row["steering_score"])]
    if not scored:
        layers = [row["layer"] for row in rows]
        about = f"{len(rows)} candidate directions (layers {min(layers)} to {max(layers)})"
        if not told:
            return f"All of {about} are zero: harmful and harmless prompts have the same mean there; take more layers."
        if all(why == "too late" for _, why in told):
            first = first_late(n_layers, rules["layer_share"])
            return f"All of {about} are zero or too late to be chosen (from layer {first} on); take earlier layers."
        return f"None of {about} has finite scores."
    kl, induce = rules["kl_threshold"], rules["induce_threshold"]
    largest = max(1e-9, *(abs(row["steering_score"] - induce) for row, _ in scored))

    def missed(row: Mapping[str, Any], why: str) -> tuple[bool, bool, bool, float]:
        """How far a row is from passing: late ones and those that are no numbers last, then those whose KL nobody
        knows; KL in units of its bound, induce of its largest miss."""
        over = (row["kl_div_score"] - kl) / max(kl, 1e-9) if _finite(row["kl_div_score"]) else 0.0
        return (
            why == "not finite",
            why == "too late",
            not _finite(row["kl_div_score"]),
            max(0.0, over) + max(0.0, (induce - row["steering_score"]) / largest),
        )

    row, why = min(scored, key=lambda pair: missed(*pair))
    misses = {
        f"too late (from layer {first_late(n_layers, rules['layer_share'])} on)": why == "too late",
        "KL too high": _finite(row["kl_div_score"]) and row["kl_div_score"] > kl,
        "does not induce": row["steering_score"] < induce,
    }
    names = {"bypass": "refusal_score", "induce": "steering_score", "KL": "kl_div_score"}
    scores = ", ".join(f"{name} {row[key]:.3f}" for name, key in names.items() if _finite(row[key]))
    return (
        f"None of {len(rows)} candidate directions passes. The nearest is position {row['position']}, layer "
        f"{row['layer']}: {' and '.join(name for name, is_one in misses.items() if is_one) or why} ({scores}; allowed: "
        f"KL ≤ {kl}, induce ≥ {induce})."
    )


def select(
    rows: Sequence[Mapping[str, Any]],
    n_layers: int,
    *,
    kl_threshold: float = 0.1,
    induce_threshold: float = 0.0,
    layer_share: float = 0.8,
) -> tuple[int, int]:
    """The paper's choice from a candidate table: the smallest bypass score among the candidates that pass (§C).

    Args:
        rows: dicts with position, layer, refusal_score (bypass), steering_score (induce) and kl_div_score.
        n_layers: blocks of the model; candidates at or beyond ``layer_share`` of them are out.

    Returns:
        (position, layer)

    Raises:
        UserError: no candidate passes (the nearest and what it missed are named), a column is missing, or a bound is no
            number.
    """
    for row in rows:
        lacking = [name for name in COLUMNS if name not in row]
        if lacking:
            raise UserError(f"A row of the candidate table has no {', '.join(lacking)}; it needs {', '.join(COLUMNS)}.")
        text = [name for name in COLUMNS if isinstance(row[name], str)]
        if text:
            raise UserError(f"{text[0]} of the candidate table is text ({row[text[0]]!r}); it must be a number.")
    rules = {"kl_threshold": kl_threshold, "induce_threshold": induce_threshold, "layer_share": layer_share}
    _require_rules(**rules)
    told = [(row, status(row, n_layers=n_layers, **rules)) for row in rows if row.get("status") != "zero"]
    kept = [row for row, why in told if why == "kept"]
    if not kept:
        raise UserError(_none_passes(rows, told, n_layers, rules))
    best = min(kept, key=lambda row: (row["refusal_score"], row["position"], row["layer"]))
    return int(best["position"]), int(best["layer"])


def score_candidates(
    model: Model,
    candidates: Float[Tensor, "layer chat d_model"],
    scale: float,
    harmful: Sequence[Chat],
    harmless: Sequence[Chat],
    tokens: Sequence[int],
    config: DirectionConfig,
    on_candidate: Callable[[int, int], None] | None = None,
    only: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, Any]]:
    """The candidate table: bypass, induce and KL of every (position, layer), or of those in ``only``.

    Bypass: mean refusal score on ``harmful`` with the direction ablated. Induce: on ``harmless`` with it added. KL:
    from the unchanged to the ablated next-token distribution on ``harmless``.
    """
    n_layers, n_chat, _ = candidates.shape
    bad, good = [chat.ids for chat in harmful], [chat.ids for chat in harmless]
    baseline = last_logits(model.hf, model.tokenizer, good)
    layers = {layer for _, layer in only} if only else range(n_layers)
    # one pass for both sets, so that the shared prefix runs once
    run_ablated, run_added = ablated_logits(model, [*bad, *good]), added_logits(model, good, config.alpha, layers)
    # lower than the rule's, so that rounding in a quick precision cannot leave a candidate unscored
    least = -math.inf if config.score_excluded else config.induce_threshold - MARGIN
    pairs = only or [(i - n_chat, layer) for i in range(n_chat) for layer in range(0, n_layers, config.layer_step)]
    late = n_layers if config.score_excluded else first_late(n_layers, config.layer_share)
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for layer in sorted({layer for _, layer in pairs}):  # one layer's candidates run together
        positions = [position for position, at in pairs if at == layer]
        vectors = candidates[layer, positions]
        norms = vectors.norm(dim=-1)
        usable = norms >= ZERO * scale
        for position, norm, use in zip(positions, norms.tolist(), usable.tolist(), strict=True):
            found[position, layer] = {
                "position": position, "layer": layer, "norm": norm, "refusal_score": math.nan,
                "steering_score": math.nan, "kl_div_score": math.nan, "status": "" if use else "zero",
                "dtype": str(model.hf.dtype).removeprefix("torch."),
            }  # fmt: skip
        if usable.any() and layer < late:
            places = list(compress(positions, usable.tolist()))
            added = run_added(vectors[usable], layer)
            induced = [float(refusal_score(logits, tokens).mean()) for logits in added]
            for position, score in zip(places, induced, strict=True):
                found[position, layer]["steering_score"] = score
            going_on = torch.tensor([not score < least for score in induced])
            if going_on.any():
                ablated = run_ablated(vectors[usable][going_on])
                for position, after in zip(compress(places, going_on.tolist()), ablated, strict=True):
                    found[position, layer] |= {
                        "refusal_score": float(refusal_score(after[: len(bad)], tokens).mean()),
                        "kl_div_score": float(kl_divergence(baseline, after[len(bad) :]).mean()),
                    }
        if on_candidate is not None:
            on_candidate(len(found), len(pairs))
    return [found[pair] for pair in pairs]


def rescore_leaders(
    model: Model,
    candidates: Tensor,
    scale: float,
    rows: list[dict[str, Any]],
    harmful: Sequence[Chat],
    harmless: Sequence[Chat],
    tokens: Sequence[int],
    config: DirectionConfig,
) -> list[dict[str, Any]]:
    """Score in the model's own precision every row that could decide.

    Those are, of the rows that pass the rules loosely, the ``rescore`` best, and all others that the quick precision
    puts within ``MARGIN`` of the row that is then chosen; all of them where none of these passes.
    """
    exact: dict[tuple[int, int], dict[str, Any]] = {}
    # thresholds are widened a little, so that rounding in the search cannot keep a good candidate out
    loose = {"kl_threshold": 1.5 * config.kl_threshold, "induce_threshold": config.induce_threshold - MARGIN}
    near = [
        row
        for row in rows
        if row["status"] != "zero"
        and status(row, n_layers=model.n_layers, layer_share=config.layer_share, **loose) == "kept"
    ]
    near.sort(key=lambda row: row["refusal_score"])
    waiting = near
    while waiting:
        pairs = [(row["position"], row["layer"]) for row in waiting[: max(1, config.rescore)]]
        for row in score_candidates(model, candidates, scale, harmful, harmless, tokens, config, only=pairs):
            exact[row["position"], row["layer"]] = row
        left = [row for row in near if (row["position"], row["layer"]) not in exact]
        try:
            choice = select([*exact.values()], model.n_layers, **config.rules)
        except UserError:
            waiting = left
        else:
            best = exact[choice]["refusal_score"]
            waiting = [row for row in left if row["refusal_score"] <= best + MARGIN]
    return [exact.get((row["position"], row["layer"]), row) for row in rows]
