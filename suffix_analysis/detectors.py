"""Detectors of adversarial suffixes, read from a conversation without being told where a suffix begins (METHODS §6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from suffix_analysis.stats import MIN_SUFFIXES, auroc, crossed_auroc, interval
from suffix_analysis.traces import trace

TAIL = 20  # last tokens of the user's text, whose hold on chat[-1] is the hijacking strength, if nothing else is said
WINDOW = 10  # tokens over which surprisal is averaged
PEAK = 3  # tokens whose mean projection is how harmful a text is: one alone is often an outlier
BUDGET = 1024  # tokens of a batch, because logits are needed at every one
RATES = (0.01, 0.05)  # false positives that thresholds are set for
APART = 2.0  # tokens, on average, by which conversations may be longer than those they are told from


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


def harm_without_refusal(
    direction: Direction, harmfulness: Harmfulness, harm: Float[Tensor, " row"], along: Float[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Harmfulness − refusal: of the peak of the user's tokens along the harmfulness direction (``harm``, see `peak`),
    and of the projection on the refusal direction at chat[-1]; each is 0 for the mean harmless prompt, 1 for the
    harmful one.
    """
    at = direction.layer
    low, high = (float(means[at] @ direction.unit) for means in (direction.means_harmless, direction.means_harmful))
    return (harm - harmfulness.harmless) / (harmfulness.harmful - harmfulness.harmless) - (along - low) / (high - low)


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
    span = harmfulness.harmful - harmfulness.harmless
    return Readings(
        tokens=torch.tensor([float(len(along)) for _, along in tokens]),
        perplexity=torch.tensor([windowed(surprisal) for surprisal, _ in tokens]),
        harmfulness=(harm - harmfulness.harmless) / span,
        refusal=projection_measures(traces, direction)["normalised"][:, direction.layer],
        hijacking=traces.dominance[:, :, REGIONS.index("suffix")],
        heads=traces.head_contribution.flatten(1),
        attention=traces.attention[..., REGIONS.index("suffix")].flatten(1),
        before=traces.attention[..., REGIONS.index("instruction")].flatten(1),
        instructed=(instructed - harmfulness.harmless_end) / (harmfulness.harmful_end - harmfulness.harmless_end),
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


def threshold(scores: Float[ndarray, " chat"], rate: float) -> float | None:
    """The lowest of these scores that a further conversation exceeds in at most ``rate`` of all cases.

    Of n like conversations and a further one each is as likely the k-th largest, so k may be (n + 1) · rate; where that
    is less than one, none of the scores will do: fewer than 99 cannot set a threshold for 1 %. Conversations that share
    prompts or texts are alike in these: then the rate is nominal.
    """
    rank = int(np.floor(rate * (len(scores) + 1) + 1e-9))
    return float(np.sort(scores)[::-1][rank - 1]) if rank else None


def largest_or(scores: Float[ndarray, " chat"], rate: float) -> float:
    """`threshold`, and the largest score where these are too few for it."""
    found = threshold(scores, rate)
    return float(np.max(scores)) if found is None else found


ATTACKED = ("harmful", "adversarial")  # the prompts and the suffixes of attacked conversations


def _sets(kind: str) -> tuple[str, str]:
    """What a kind of conversations shares with others: the prompts, and the texts behind them."""
    prompts, _, text = kind.partition(" + ")
    return prompts, text or f"nothing behind {prompts}"


def _mean_tokens(kinds: Sequence[Sequence[Readings]]) -> float:
    return float(torch.cat([readings.tokens for parts in kinds for readings in parts]).mean())


def _at_rate(
    positive: Float[ndarray, "prompt suffix"], negatives: Sequence[Float[ndarray, "_ _"]], marks: ndarray, rate: float
) -> dict[str, float | None]:
    """What the threshold that ``marks`` set for a rate catches, and what the rate became; None where they set none."""
    cut = threshold(marks, rate)
    values: tuple[float | None, ...] = (None,) * 7
    if cut is not None:
        caught = interval((positive > cut).astype(float), rate=True)
        wrong = [interval((part > cut).astype(float), rate=True) for part in negatives]
        became = float(np.mean([x > cut for part in negatives for x in part.flat]))
        bounds = (wrong[0].lo, wrong[0].hi) if len(wrong) == 1 else (None, None)
        values = (cut, caught.estimate, caught.lo, caught.hi, became, *bounds)
    at = f"{100 * rate:.0f}"
    rates = [f"{name}_{at}{end}" for name in ("caught", "false_positives") for end in ("", "_lo", "_hi")]
    return dict(zip([f"threshold_{at}", *rates], values, strict=True))


def detector_rows(
    detectors: Sequence[Detector],
    calibration: Mapping[str, Readings],
    attacked: Sequence[Readings],
    others: Mapping[str, Sequence[Readings]],
    alone: Mapping[str, Sequence[Readings]] | None = None,
) -> list[dict[str, Any]]:
    """How well each detector separates unseen attacked conversations from each kind of others, and from all.

    Args:
        detectors: see `fit_detectors`.
        calibration: select conversations of the same kinds as ``others``, on prompts that nothing was fitted with. The
            threshold against a kind comes from that kind.
        attacked: readings of the same report prompts, with one suffix after the other.
        others: the same of every kind of conversation that is not attacked.
        alone: by name, readings of other lengths (such as of prompts without any text behind); they do not count among
            "all of these", and thresholds against them come from the same names in ``calibration``.

    A row's ``false_positives`` say what became of a rate on unseen conversations; ``n_marks`` conversations set its
    threshold, and where they are too few for a rate (see `threshold`) what belongs to it is None. Intervals take
    the threshold as it is, which is nominal where its conversations share prompts and texts. ``tokens_apart``: mean
    token count of attacked conversations less that of the others. ``descriptive``: one of the two sides has fewer
    suffixes or texts (``n_texts``) than claims need, or the lengths lie more than ``APART`` tokens apart.
    """
    everything = Readings.joined([calibration[name] for name in others])
    against = {name: [readings] for name, readings in others.items()} | {"all of these": list(others.values())}
    alone = alone or {}
    against |= {name: [readings] for name, readings in alone.items()}
    rows = []
    for detector in detectors:

        def cells(parts: Sequence[Readings], score: Any = detector.score) -> Float[ndarray, "prompt suffix"]:
            return np.stack([score(part) for part in parts], axis=1).astype(float)

        positive = cells(attacked)
        for name, kinds in against.items():
            marks = detector.score(calibration.get(name, everything))
            negatives = [cells(parts) for parts in kinds]
            # texts behind the prompts are drawn from others like them, as suffixes are
            texts = [] if name in alone else [part.shape[1] for part in negatives]
            fewest = min([positive.shape[1], *texts])
            names = [name] if len(kinds) == 1 else list(others)
            value, lo, hi = crossed_auroc(
                positive, negatives, n_suffixes=fewest, sets=[ATTACKED, *(_sets(each) for each in names)]
            )
            apart = _mean_tokens([attacked]) - _mean_tokens(kinds)
            row: dict[str, Any] = {
                "detector": detector.name, "likelihood": detector.likelihood, "against": name,
                "n_prompts": positive.shape[0], "n_suffixes": positive.shape[1],
                "n_others": sum(map(np.size, negatives)), "n_texts": min(texts, default=0), "n_marks": len(marks),
                "tokens_apart": apart, "descriptive": fewest < MIN_SUFFIXES or abs(apart) > APART,
                "auroc": value, "lo": lo, "hi": hi,
            }  # fmt: skip
            for rate in RATES:
                row |= _at_rate(positive, negatives, marks, rate)
            rows.append(row)
    return rows
