"""The refusal direction: extraction, the candidate table and the paper's choice (METHODS §2; the paper §2.3, §C)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.precision import fast_dtype, or_float32
from suffix_analysis.candidate_table import DirectionConfig, rescore_leaders, score_candidates, select, status
from suffix_analysis.chat import Chat
from suffix_analysis.errors import UserError
from suffix_analysis.forward import block_inputs
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt, same_words, to_prompts
from suffix_analysis.refusal import discover_refusal_tokens, known_tokens, scores_of

LEAST_FIT, LEAST_SELECT = 8, 2  # prompts of a kind

__all__ = ["Direction", "DirectionConfig", "chat_means", "find_direction", "select", "split_prompts"]


@dataclass(frozen=True)
class Direction:
    """A chosen refusal direction.

    ``vector`` is the raw difference of means at ``layer``'s input and ``position`` (negative: −1 is chat[-1]).
    ``scores`` is the candidate table (dicts with position, layer, refusal_score, steering_score, kl_div_score, norm,
    status). ``means_harmful`` and ``means_harmless`` are taken at chat[-1] on the fit prompts, per layer input and,
    last, after the last block. ``n`` counts the prompts used; ``refusal_tokens`` open the model's refusals.
    """

    vector: Float[Tensor, " d_model"]
    position: int
    layer: int
    scores: list[dict[str, Any]]
    means_harmful: Float[Tensor, "depth d_model"]
    means_harmless: Float[Tensor, "depth d_model"]
    refusal_tokens: tuple[int, ...]
    n: dict[str, int]

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        """r̂, the direction at length 1."""
        return self.vector / self.vector.norm()


class NoDirection(UserError):
    """No candidate passes; ``scores`` is the candidate table, with why each is out."""

    def __init__(self, sentence: str, scores: list[dict[str, Any]]) -> None:
        super().__init__(sentence)
        self.scores = scores


@torch.no_grad()
def chat_means(model: Model, chats: Sequence[Chat]) -> tuple[Float[Tensor, "layer chat d_model"], float]:
    """Mean residual at every chat position, of every block's input and after the last; in float64.

    Also returns the mean residual norm, the yardstick for "zero". Every chat must end in equally many chat tokens.

    Raises:
        UserError: a residual is not finite (its layer is named), or the prompts' templates differ.
    """
    if len({chat.n_chat for chat in chats}) != 1:
        raise UserError("The prompts end in different numbers of template tokens; use one template for all of them.")
    n_chat = chats[0].n_chat
    total = torch.zeros(model.n_layers + 1, n_chat, model.d_model, dtype=torch.float64)

    def add_up(layer: int, group: list[int], states: Tensor) -> None:
        total[layer] += states.double().sum(dim=0)

    block_inputs(model, [chat.ids for chat in chats], n_chat, add_up)
    means = total / len(chats)
    if not torch.isfinite(means).all():
        layer = int((~torch.isfinite(means)).flatten(1).any(dim=1).nonzero()[0])
        raise UserError(
            f"The residual stream is not finite at layer {layer} in {model.hf.dtype}; {or_float32(model.hf)}."
        )
    return means, float(means.norm(dim=-1).mean())


def split_prompts(prompts: Sequence[Prompt], config: DirectionConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts for extraction and for selection, disjoint.

    Prompts that carry splits fit and select keep them; others are shuffled with the seed and cut. With fewer than
    ``n_fit + n_select`` of them, four fifths are used for extraction. Those of the report split are never used.

    Raises:
        UserError: fewer than 8 for extraction or 2 for selection, one that stands in two parts (report is one) or
            twice without any, or some with a split and some without.
    """
    rng = random.Random(config.seed)
    _refuse_overlap(prompts)
    prompts = [p for p in prompts if p.split != "report"]
    fit = [p for p in prompts if p.split == "fit"]
    chosen = [p for p in prompts if p.split == "select"]
    if 0 < len(fit) + len(chosen) < len(prompts):
        raise UserError(
            f"{len(fit) + len(chosen)} of {len(prompts)} prompts have a split; give all of them one (fit, select or "
            "report), or none."
        )
    if not (fit and chosen):
        pool = list(prompts)
        rng.shuffle(pool)
        n_fit = min(config.n_fit, int(0.8 * len(pool)))
        fit, chosen = pool[:n_fit], pool[n_fit:]
    else:
        rng.shuffle(fit)
        rng.shuffle(chosen)
    fit, chosen = fit[: config.n_fit], chosen[: config.n_select]
    if len(fit) < LEAST_FIT or len(chosen) < LEAST_SELECT:
        kinds = "/".join(sorted({p.kind for p in prompts if p.kind}))
        raise UserError(
            f"{len(prompts)} {kinds + ' ' if kinds else ''}prompts beside the report split's are too few for a "
            f"direction: {len(fit)} for extraction (at least {LEAST_FIT}) and {len(chosen)} for selection (at least "
            f"{LEAST_SELECT}); the paper uses 128 + 32 of each kind."
        )
    return fit, chosen


def _refuse_overlap(prompts: Sequence[Prompt]) -> None:
    """Refuse a text that stands in two splits, the report split among them, or twice where there are none."""
    seen: dict[str, str] = {}
    for prompt in prompts:
        words = same_words(prompt.text)
        before = seen.get(words)
        seen[words] = prompt.split
        if before is not None and (before != prompt.split or not before):
            where = (
                f"is in both the {before} and the {prompt.split} part" if before and prompt.split else "stands twice"
            )
            raise UserError(f"The prompt {prompt.text[:60]!r} {where}; give each of them once.")


def find_direction(
    model: Model,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    config: DirectionConfig | None = None,
    *,
    refusal_tokens: Sequence[int] | None = None,
    search_dtype: torch.dtype | None = None,
    on_candidate: Callable[[int, int], None] | None = None,
) -> Direction:
    """Extract candidate directions, score them and choose one by the paper's rule.

    All candidates are scored in a fast precision; the ``rescore`` best and every row that could decide are
    scored again in the model's own (see `suffix_analysis.candidate_table.rescore_leaders`).

    Args:
        model: a chat model that refuses.
        harmful: harmful instructions (see `split_prompts`).
        harmless: harmless ones.
        config: settings; the paper's if left out.
        refusal_tokens: token ids that open refusals; discovered from the model if left out.
        search_dtype: that precision; measured if left out.
        on_candidate: called with (done, total) as candidates are scored.

    Raises:
        UserError: too few prompts, overlapping kinds or parts, or a model that does not refuse.
        NoDirection: no candidate passes.
    """
    config = config or DirectionConfig()
    bad, good = to_prompts(harmful), to_prompts(harmless)
    answered = {same_words(p.text) for p in good}
    overlap = [p.text for p in bad if same_words(p.text) in answered]
    if overlap:
        raise UserError(f"{len(overlap)} prompts are both harmful and harmless, e.g. {min(overlap)!r}; remove them.")
    (fit_bad, sel_bad), (fit_good, sel_good) = split_prompts(bad, config), split_prompts(good, config)
    # the fast twin is copied before the bridge wraps the weights in place
    fast = model if "bridge" in model.__dict__ else model.twin(search_dtype or _search_dtype(model))

    def chats(prompts: Sequence[Prompt]) -> list[Chat]:
        return [model.chat(p.text) for p in prompts]

    if refusal_tokens:
        tokens = known_tokens(model, refusal_tokens)
    else:
        tokens = discover_refusal_tokens(model, chats(sel_bad), chats(sel_good))
    sets = [chats(part) for part in (fit_bad, fit_good, sel_bad, sel_good)]
    if config.keep_by_score:
        least = (LEAST_FIT, LEAST_FIT, LEAST_SELECT, LEAST_SELECT)
        sets = [keep_by_score(model, part, tokens, i % 2 == 0, least[i]) for i, part in enumerate(sets)]
    means_bad, scale = chat_means(model, sets[0])
    means_good, _ = chat_means(model, sets[1])
    candidates = (means_bad - means_good)[:-1].float()
    rows = score_candidates(fast, candidates, scale, sets[2], sets[3], tokens, config, on_candidate)
    if fast is not model:
        rows = rescore_leaders(model, candidates, scale, rows, sets[2], sets[3], tokens, config)
    rules = config.rules
    try:
        position, layer = select(rows, model.n_layers, **rules)
    except UserError as error:  # the table says more than the sentence
        raise NoDirection(str(error), [_with_status(row, None, model.n_layers, rules) for row in rows]) from error
    rows = [_with_status(row, (position, layer), model.n_layers, rules) for row in rows]
    n_chat = candidates.shape[1]
    return Direction(
        vector=candidates[layer, n_chat + position],
        position=position,
        layer=layer,
        scores=rows,
        means_harmful=means_bad[:, -1].float(),
        means_harmless=means_good[:, -1].float(),
        refusal_tokens=tuple(tokens),
        n=dict(zip(("fit_harmful", "fit_harmless", "select_harmful", "select_harmless"), map(len, sets), strict=True)),
    )


def _search_dtype(model: Model) -> torch.dtype:
    own: torch.dtype = next(model.hf.parameters()).dtype
    return fast_dtype(model.hf.device) if own == torch.float32 else own


def keep_by_score(
    model: Model, chats: Sequence[Chat], tokens: Sequence[int], refused: bool, least: int = 1
) -> list[Chat]:
    """Harmful prompts with a refusal score above 0, harmless ones with one below (the paper, §C).

    Raises:
        UserError: fewer than ``least`` are left.
    """
    scores = scores_of(model, [chat.ids for chat in chats], tokens).tolist()
    kept = [chat for chat, score in zip(chats, scores, strict=True) if (score > 0 if refused else score < 0)]
    if len(kept) < least:
        kind = "harmful prompts are refused" if refused else "harmless prompts are answered"
        raise UserError(
            f"Only {len(kept)} of {len(chats)} {kind} (by the tokens {tokens} that open refusals); the direction needs "
            f"at least {least} of them."
        )
    return kept


def _with_status(
    row: dict[str, Any], choice: tuple[int, int] | None, n_layers: int, rules: dict[str, float]
) -> dict[str, Any]:
    if row["status"] == "zero":
        return row
    if (row["position"], row["layer"]) == choice:
        return row | {"status": "chosen"}
    return row | {"status": status(row, n_layers=n_layers, **rules)}
