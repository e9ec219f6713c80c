"""The paper's tables for one's own model (§3, §4): what interventions on the direction do, and what they cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy import stats
from torch import Tensor

from attacks.caches import prefix_cache
from suffix_analysis.batching import prefix_batches
from suffix_analysis.chat import reply_encodings
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.forward import last_logits, run_batch
from suffix_analysis.generate import answers, generate
from suffix_analysis.interventions import ablate, add, random_directions, set_projection
from suffix_analysis.judges import Judge, is_refusal
from suffix_analysis.judges import judge as rules
from suffix_analysis.models import Model
from suffix_analysis.orthogonalise import NotAvailable, orthogonalised
from suffix_analysis.prompts import Prompt
from suffix_analysis.stats import rate_interval

COST_TOKENS = 48  # of a harmless reply
WINDOW = 512  # tokens of text that are read at once
Context = contextlib.AbstractContextManager[None]


@dataclass(frozen=True)
class Plan:
    """One line of the table: what is done, on prompts of which kind, and the control's number (None: no control)."""

    name: str
    kind: str
    context: Callable[[], Context]
    alpha: float | None = None
    control: int | None = None

    @property
    def key(self) -> str:
        """What tells this line from all others."""
        return f"{self.name}, {self.kind}" + ("" if self.control is None else f", {self.control}")


def plans(model: Model, direction: Direction, alpha: float, n_controls: int, seed: int) -> list[Plan]:
    """The table's lines: interventions on harmful and on harmless prompts, then the same with random directions."""
    vector, layer = direction.vector, direction.layer

    def level(means: Tensor, along: Tensor) -> Tensor:
        return means.to(along) @ (along / along.norm())

    harmless, harmful = level(direction.means_harmless, vector), level(direction.means_harmful, vector)
    lines = [
        Plan("none", "harmful", contextlib.nullcontext),
        Plan("ablated", "harmful", partial(ablate, model, vector)),
        Plan("orthogonalised", "harmful", partial(orthogonalised, model, vector)),
        Plan("set to the harmless mean", "harmful", partial(set_projection, model, vector, harmless)),
        Plan("none", "harmless", contextlib.nullcontext),
        Plan("added", "harmless", partial(add, model, vector, layer, alpha), alpha),
        Plan("set to the harmful mean", "harmless", partial(set_projection, model, vector, harmful)),
    ]
    for i, other in enumerate(random_directions(vector, n_controls, seed), 1):
        levels = [level(means, other) for means in (direction.means_harmless, direction.means_harmful)]
        controls: list[tuple[str, str, Callable[[], Any]]] = [
            ("ablated", "harmful", partial(ablate, model, other)),
            ("added", "harmless", partial(add, model, other, layer, alpha)),
            ("set to the harmless mean", "harmful", partial(set_projection, model, other, levels[0])),
            ("set to the harmful mean", "harmless", partial(set_projection, model, other, levels[1])),
        ]
        lines += [
            Plan(f"random direction {name}", kind, context, alpha if name == "added" else None, i)
            for name, kind, context in controls
        ]
    return lines


def measure_interventions(
    model: Model,
    direction: Direction,
    prompts: Sequence[Prompt],
    length: int,
    *,
    alpha: float = 1.0,
    n_controls: int = 1,
    seed: int = 0,
    plain: Mapping[str, str] | None = None,
    made: Callable[[str, int, Callable[[], list[str]]], list[str]] = lambda name, number, make: make(),
    judge: Judge = rules,
    on_line: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Refusals and verdicts on report prompts under every plan, with exact intervals; and all replies.

    A plan that the model does not allow (orthogonalisation with post-norms) has rates of None and says why.

    Args:
        model: the model, in the precision that replies are to be made in.
        direction: its refusal direction.
        prompts: those of the report split are used.
        length: tokens of a reply.
        alpha: strength of addition.
        n_controls: random directions.
        seed: of the random directions.
        plain: replies without an intervention by prompt id, where they are there already; made if left out.
        made: is asked for the replies of each other plan, by its name, their number and what makes them.
        judge: gives the verdicts.
        on_line: called with (done, total).

    Raises:
        UserError: the report split has no prompts of a kind.
    """
    for kind in ("harmful", "harmless"):
        if not any(p.kind == kind and p.split == "report" for p in prompts):
            raise UserError(f"There are no {kind} prompts in the report split to measure interventions on.")
    rows, replies = [], []
    lines = plans(model, direction, alpha, n_controls, seed)
    for done, plan in enumerate(lines, 1):
        some = [p for p in prompts if p.kind == plan.kind and p.split == "report"]
        row: dict[str, Any] = {
            "intervention": plan.name, "kind": plan.kind, "split": "report", "alpha": plan.alpha,
            "control": plan.control, "n_prompts": len(some), "note": None,
        }  # fmt: skip
        values: dict[str, Any] = {"refusal": None, "complied": None}
        try:
            if plan.name == "none" and plain is not None:
                texts = [plain[p.id] for p in some]
            else:
                texts = made(plan.key, len(some), partial(_replies, model, plan, some, length))
        except NotAvailable as reason:
            row["note"] = str(reason)
        else:
            verdicts = [judge(p.text, reply) for p, reply in zip(some, texts, strict=True)]
            values["refusal"] = np.array([float(is_refusal(reply)) for reply in texts])
            values["complied"] = np.array([float(verdict == "complied") for verdict in verdicts])
            replies += [
                {"intervention": plan.name, "kind": plan.kind, "control": plan.control, "prompt_id": p.id,
                 "refused": is_refusal(reply), "verdict": verdict, "reply": reply}
                for p, reply, verdict in zip(some, texts, verdicts, strict=True)
            ]  # fmt: skip
        for name, found in values.items():
            rate, lo, hi = (None, None, None) if found is None else rate_interval(found)
            row |= {f"{name}_rate": rate, f"{name}_lo": lo, f"{name}_hi": hi}
        rows.append(row)
        if on_line is not None:
            on_line(done, len(lines))
    return rows, replies


def _replies(model: Model, plan: Plan, prompts: Sequence[Prompt], length: int) -> list[str]:
    with plan.context():
        return generate(model.hf, model.tokenizer, [model.chat(p.text).ids for p in prompts], length)


@torch.no_grad()
def nats_of_each(
    hf: Any, tokenizer: Any, pairs: Sequence[tuple[Tensor, Tensor]]
) -> Float[ndarray, "pair nats_and_tokens"]:
    """Nats of the second part of each pair after the first, and how many tokens that is; no part may be empty."""
    found = np.zeros((len(pairs), 2))
    whole = [torch.cat(pair) for pair in pairs]
    n_longest = max(len(part) for _, part in pairs)
    n_prefix, groups = prefix_batches(hf, tokenizer, whole, leave=n_longest + 1, logits=True)
    prefix = prefix_cache(hf, whole[0][:n_prefix])
    for batch in groups:
        kept = max(len(pairs[i][1]) for i in batch.members) + 1
        logits = run_batch(hf, batch, prefix, kept)
        for row, i in enumerate(batch.members):
            part = pairs[i][1]
            scores = logits[row, -len(part) - 1 : -1].float()
            nats = torch.nn.functional.cross_entropy(scores, part.to(scores.device), reduction="sum")
            found[i] = float(nats), len(part)
    return found


def nats_change(
    before: Float[ndarray, "pair nats_and_tokens"], after: Float[ndarray, "pair nats_and_tokens"]
) -> tuple[float, float | None, float | None]:
    """The change of cross-entropy (nats per token) with its 95 % bootstrap interval over pairs (None of one pair)."""
    change = after[:, 0] - before[:, 0]
    value = float(change.sum() / before[:, 1].sum())
    if len(change) < 2:
        return value, None, None
    found = stats.bootstrap(
        (change, before[:, 1]), lambda nats, tokens, axis: nats.sum(axis=axis) / tokens.sum(axis=axis),
        n_resamples=2000, paired=True, method="percentile", rng=0,
    ).confidence_interval  # fmt: skip
    return value, float(found.low), float(found.high)


def cross_entropy(hf: Any, tokenizer: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean cross-entropy (nats per token) of the second part of each pair after the first; no part may be empty."""
    nats, tokens = nats_of_each(hf, tokenizer, pairs).sum(axis=0)
    return float(nats / tokens)


def reply_pairs(
    model: Model, prompts: Sequence[Prompt], plain: Mapping[str, str] | None = None, length: int = COST_TOKENS
) -> list[tuple[Tensor, Tensor]]:
    """Prompts with the model's own greedy replies, as ids: those in ``plain`` by prompt id, or new ones.

    Replies are kept as text. Of what their ids may have been those are taken that open with the model's next token.
    """
    chats = [model.chat(p.text) for p in prompts]
    ids = [chat.ids for chat in chats]
    if not ids:
        return []
    if plain:
        replies, logits = [plain[p.id] for p in prompts], last_logits(model.hf, model.tokenizer, ids)
    else:
        replies, logits = answers(model.hf, model.tokenizer, ids, length)
    pairs = []
    for chat, reply, token in zip(chats, replies, logits.argmax(dim=-1).tolist(), strict=True):
        found = reply_encodings(model.tokenizer, chat, reply)
        own = next((some for some in found if some[:1].tolist() == [token]), found[0])
        if len(own):
            pairs.append((chat.ids, own))
    return pairs


def text_pairs(model: Model, text: str) -> list[tuple[Tensor, Tensor]]:
    """A text in windows: every token but each window's first is predicted from those before it in the window.

    Where the model's conversations begin with a BOS token, so does every window, and all of its tokens are predicted.

    Raises:
        UserError: the text has fewer than two tokens.
    """
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
    chat = model.chat("x")
    begin = chat.ids[chat.regions["bos"]]
    windows = [torch.cat([begin, window]) for window in ids.split(WINDOW)]
    pairs = [(window[:1], window[1:]) for window in windows if len(window) > 1]
    if not pairs:
        raise UserError(f"The text to measure the cost on has {len(ids)} tokens; give a longer one.")
    return pairs


def measure_cost(
    model: Model,
    direction: Direction,
    prompts: Sequence[Prompt],
    text: str | None = None,
    plain: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Cross-entropy (nats per token) with and without ablation: on harmless replies and on a text of the user's.

    The change comes with its 95 % interval over replies (or windows of the text), and beside it that of orthogonalised
    weights (None where they are not available). ``plain`` holds the model's replies by prompt id, where they are there
    already.
    """
    harmless = [p for p in prompts if p.kind == "harmless" and p.split == "report"]
    material = {"the model's own replies to harmless prompts": reply_pairs(model, harmless, plain)}
    if text is not None:
        material["the text given"] = text_pairs(model, text)
    rows = []
    for name, pairs in material.items():
        if not pairs:
            continue
        before = nats_of_each(model.hf, model.tokenizer, pairs)
        with ablate(model, direction.vector):
            after = nats_of_each(model.hf, model.tokenizer, pairs)
        (nats, n_tokens), ablated = before.sum(axis=0).tolist(), float(after[:, 0].sum())
        change, lo, hi = nats_change(before, after)
        edited: tuple[float | None, float | None, float | None] = (None, None, None)
        with contextlib.suppress(NotAvailable), orthogonalised(model, direction.vector):
            edited = nats_change(before, nats_of_each(model.hf, model.tokenizer, pairs))
        rows.append({
            "material": name, "n_tokens": int(n_tokens), "none": nats / n_tokens, "ablated": ablated / n_tokens,
            "change": change, "lo": lo, "hi": hi, "orthogonalised_change": edited[0], "orthogonalised_lo": edited[1],
            "orthogonalised_hi": edited[2],
        })  # fmt: skip
    return rows
