"""Detectors of adversarial suffixes, read from a conversation without being told where a suffix begins (METHODS §6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from attacks.precision import contiguous_head
from attacks.terms import entering
from suffix_analysis.arms import projection_measures
from suffix_analysis.batching import batches, left_pad, pad_token
from suffix_analysis.chat import REGIONS, Chat
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.models import Model
from suffix_analysis.oneness import discriminant, fitted
from suffix_analysis.stats import auroc
from suffix_analysis.traces import trace

TAIL = 20  # last tokens of the user's text, whose hold on chat[-1] is the hijacking strength, if nothing else is said
WINDOW = 10  # tokens over which surprisal is averaged
PEAK = 3  # tokens whose mean projection is how harmful a text is: one alone is often an outlier
BUDGET = 1024  # tokens of a batch, because logits are needed at every one


@dataclass(frozen=True)
class Harmfulness:
    """The difference of means at the last instruction token, and what projections on it are on average.

    ``harmful`` and ``harmless``: the means of these prompts' peaks (see `peak`), ``harmful_end`` and ``harmless_end``
    of their last tokens. A suffix cannot change any state before it, so it can raise the peak of a prompt of three
    tokens or more but never lower it.
    """

    unit: Float[Tensor, " d_model"]
    layer: int
    harmful: float
    harmless: float
    harmful_end: float
    harmless_end: float


def scaled(x: Float[Tensor, " row"], harmless: float, harmful: float) -> Float[Tensor, " row"]:
    """Projections on a scale of 0 for the mean harmless prompt and 1 for the mean harmful one."""
    return (x - harmless) / (harmful - harmless)


def harm_without_refusal(
    direction: Direction, harmfulness: Harmfulness, harm: Float[Tensor, " row"], along: Float[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Harmfulness − refusal: of the peak of the user's tokens along the harmfulness direction (``harm``, see `peak`),
    and of the projection on the refusal direction at chat[-1]; each is 0 for the mean harmless prompt, 1 for the
    harmful one.
    """
    at = direction.layer
    low, high = (float(means[at] @ direction.unit) for means in (direction.means_harmless, direction.means_harmful))
    return scaled(harm, harmfulness.harmless, harmfulness.harmful) - scaled(along, low, high)


@dataclass(frozen=True)
class Readings:
    """What detectors read, one row for each conversation.

    ``tokens`` of the user's text; ``perplexity``: the largest mean surprisal (nats per token) of any ``WINDOW`` of
    them; ``harmfulness``: the peak of their projections (see `peak`; 0 mean harmless prompt, 1 mean harmful one);
    ``refusal``: the normalised projection at chat[-1]; ``hijacking``: dominance of the last of them (``tail``) in every
    layer's attention output at chat[-1]; ``heads``: every head's contribution to the direction; ``attention``: what
    every head pays to those last tokens from chat[-1], ``before`` to the user's tokens before them; ``instructed``: the
    projection at the instruction's last token (0 and 1 likewise), which no detector can know that is not told where the
    suffix begins.
    """

    tokens: Float[Tensor, " chat"]
    perplexity: Float[Tensor, " chat"]
    harmfulness: Float[Tensor, " chat"]
    refusal: Float[Tensor, " chat"]
    hijacking: Float[Tensor, "chat layer"]
    heads: Float[Tensor, "chat head"]
    attention: Float[Tensor, "chat head"]
    before: Float[Tensor, "chat head"]
    instructed: Float[Tensor, " chat"]

    @staticmethod
    def joined(parts: Sequence[Readings]) -> Readings:
        """The rows of all parts, one part after the other."""
        return Readings(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Readings)})


@dataclass(frozen=True)
class Detector:
    """A score that is higher the more a conversation looks attacked. ``likelihood``: it needs token likelihoods."""

    name: str
    score: Callable[[Readings], Float[ndarray, " chat"]]
    likelihood: bool = False


def user_mask(chat: Chat) -> Bool[Tensor, " token"]:
    """The tokens of the user's text: instruction and suffix, if there is one."""
    return chat.regions["instruction"] | chat.regions["suffix"]


def blind(chat: Chat, tail: int = TAIL) -> Chat:
    """The conversation with the user's last ``tail`` tokens as its suffix, whatever they are."""
    at = user_mask(chat).nonzero().flatten()
    regions = {name: mask.clone() for name, mask in chat.regions.items()}
    regions["suffix"][at], regions["instruction"][at] = False, True
    last = at[-tail:]
    regions["suffix"][last], regions["instruction"][last] = True, False
    return replace(chat, regions=regions)


def windowed(surprisal: Float[Tensor, " token"], window: int = WINDOW) -> float:
    """The largest mean of ``window`` neighbours; the mean of all where there are fewer."""
    return float(surprisal.unfold(0, min(window, len(surprisal)), 1).mean(dim=1).max())


def peak(along: Float[Tensor, "row token"], user: Bool[Tensor, "row token"] | None = None) -> Float[Tensor, " row"]:
    """The mean of each row's ``PEAK`` largest values (of all where it has fewer), at ``user``'s tokens if it is given.

    Tokens added to at least ``PEAK`` others can raise it but never lower it. NaN where a row has no token.
    """
    user = torch.ones_like(along, dtype=torch.bool) if user is None else user
    count = user.sum(dim=1).clamp(max=PEAK)
    top = along.masked_fill(~user, float("-inf")).topk(min(PEAK, along.shape[1]), dim=1).values
    ranks = torch.arange(top.shape[1], device=top.device)
    return torch.where(ranks < count[:, None], top, 0.0).sum(dim=1) / count


def _each(
    model: Model, chats: Sequence[Chat], layer: int, **forward: Any
) -> Iterator[tuple[int, Float[Tensor, "token d_model"], Float[Tensor, "row vocab"]]]:
    """Every conversation's number, what enters ``layer`` at its tokens, and its logits, those of padding among them."""
    entered: list[Tensor] = []
    for group in batches([len(chat.ids) for chat in chats], BUDGET):
        padded = left_pad([chats[i].ids for i in group], pad_token(model.tokenizer), model.hf.device)
        with contiguous_head(model.hf), entering(model.hf, layer, entered.append):
            logits = model.hf(**padded, **forward).logits
        x = entered.pop()
        for row, i in enumerate(group):
            yield i, x[row, -len(chats[i].ids) :].float(), logits[row]


@torch.no_grad()
def by_user_token(
    model: Model, chats: Sequence[Chat], unit: Float[Tensor, " d_model"], layer: int
) -> list[tuple[Float[Tensor, " token"], Float[Tensor, " token"]]]:
    """Surprisal (nats) and projection on ``unit`` at the input of ``layer``, at every token of the user's texts."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for i, x, logits in _each(model, chats, layer):
        ids, along = chats[i].ids.to(logits.device), x @ unit.to(x.device)
        surprisal = torch.nn.functional.cross_entropy(logits[-len(ids) : -1].float(), ids[1:], reduction="none")
        at = user_mask(chats[i]).nonzero().flatten()
        # the very first token of a prompt has nothing before it
        found[i] = (surprisal[(at[at > 0] - 1).to(logits.device)].cpu(), along[at.to(along.device)].cpu())
    return [found[i] for i in range(len(chats))]


def perplexities(model: Model, chats: Sequence[Chat], harmfulness: Harmfulness) -> Float[Tensor, " chat"]:
    """The windowed perplexity of each user's text alone: what a filter needs, for one forward."""
    tokens = by_user_token(model, chats, harmfulness.unit, harmfulness.layer)
    return torch.tensor([windowed(surprisal) for surprisal, _ in tokens])


@torch.no_grad()
def gaps(model: Model, direction: Direction, harmfulness: Harmfulness, chats: Sequence[Chat]) -> Float[Tensor, " chat"]:
    """Harmfulness − refusal of each conversation, for one forward: what a filter needs that waits for it."""
    harm, along = torch.empty(len(chats)), torch.empty(len(chats))
    for i, x, _ in _each(model, chats, direction.layer, logits_to_keep=1):
        harm[i] = peak((x[user_mask(chats[i]).to(x.device)] @ harmfulness.unit.to(x.device))[None])
        along[i] = x[-1] @ direction.unit.to(x.device)
    return harm_without_refusal(direction, harmfulness, harm, along)


def harmfulness_of(
    model: Model, direction: Direction, harmful: Sequence[Chat], harmless: Sequence[Chat]
) -> Harmfulness:
    """Fit the harmfulness direction at the refusal direction's layer, on fit prompts without a suffix.

    Raises:
        UserError: harmful prompts do not look more harmful than harmless ones.
    """
    places = harmful[0].n_chat + 1
    means = [fitted(model, chats, direction.layer, places)[0][:, 0].mean(dim=0) for chats in (harmful, harmless)]
    vector = means[0] - means[1]
    unit = vector / vector.norm()
    ends = [float(mean @ unit) for mean in means]
    peaks = [
        float(np.mean([float(peak(along[None])) for _, along in by_user_token(model, chats, unit, direction.layer)]))
        for chats in (harmful, harmless)
    ]
    if not peaks[0] > peaks[1]:
        raise UserError(
            f"Harmful fit prompts do not look more harmful than harmless ones at the input of layer {direction.layer} "
            f"({peaks[0]:.2f} against {peaks[1]:.2f}); detectors cannot be fitted with these prompts and direction."
        )
    return Harmfulness(unit, direction.layer, peaks[0], peaks[1], ends[0], ends[1])


def read(
    model: Model, chats: Sequence[Chat], direction: Direction, harmfulness: Harmfulness, tail: int = TAIL
) -> Readings:
    """Read conversations: one trace, and one forward for what is needed at every token of the user's text."""
    traces = trace(model, [blind(chat, tail) for chat in chats], direction)
    tokens = by_user_token(model, chats, harmfulness.unit, harmfulness.layer)
    harm = torch.tensor([float(peak(along[None])) for _, along in tokens])
    ends = [int(chat.regions["instruction"][user_mask(chat)].sum()) - 1 for chat in chats]
    instructed = torch.tensor([float(along[end]) for (_, along), end in zip(tokens, ends, strict=True)])
    return Readings(
        tokens=torch.tensor([float(len(along)) for _, along in tokens]),
        perplexity=torch.tensor([windowed(surprisal) for surprisal, _ in tokens]),
        harmfulness=scaled(harm, harmfulness.harmless, harmfulness.harmful),
        refusal=projection_measures(traces, direction)["normalised"][:, direction.layer],
        hijacking=traces.dominance[:, :, REGIONS.index("suffix")],
        heads=traces.head_contribution.flatten(1),
        attention=traces.attention[..., REGIONS.index("suffix")].flatten(1),
        before=traces.attention[..., REGIONS.index("instruction")].flatten(1),
        instructed=scaled(instructed, harmfulness.harmless_end, harmfulness.harmful_end),
    )


def fit_detectors(attacked: Readings, others: Readings) -> list[Detector]:
    """The detectors, with what they have to choose or learn (a layer, a probe) taken from these conversations."""
    sides = [side.hijacking.double().numpy() for side in (attacked, others)]
    layer = int(np.argmax([auroc(sides[0][:, n], sides[1][:, n]) for n in range(sides[0].shape[1])]))
    both = torch.cat([attacked.heads, others.heads]).double()
    centre, spread = both.mean(dim=0), both.std(dim=0).clamp(min=1e-9)

    def standard(readings: Readings) -> Tensor:
        return (readings.heads.double() - centre) / spread

    probe = discriminant(standard(attacked), standard(others))
    return [
        Detector("token count", lambda r: r.tokens.numpy()),
        Detector("windowed perplexity", lambda r: r.perplexity.numpy(), likelihood=True),
        Detector(f"hijacking strength (layer {layer})", lambda r: r.hijacking[:, layer].numpy()),
        Detector("low refusal projection", lambda r: -r.refusal.numpy()),
        Detector("harmfulness − refusal", lambda r: (r.harmfulness - r.refusal).numpy()),
        Detector("the same, told where the suffix begins", lambda r: (r.instructed - r.refusal).numpy()),
        Detector("probe on head contributions", lambda r: (standard(r) @ probe).numpy()),
    ]
