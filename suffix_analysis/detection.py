"""What detectors are fitted, calibrated and measured on: the table ``detectors`` (METHODS §6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from suffix_analysis.causal import Head
from suffix_analysis.chat import Chat
from suffix_analysis.defences import harmful_levels
from suffix_analysis.detector_table import detector_rows, largest_or
from suffix_analysis.detectors import Detector, Harmfulness, Readings, fit_detectors, harmfulness_of, read
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt, prompts_of, spread
from suffix_analysis.records import Suffix

GAP, GAP_RATE = "harmfulness − refusal", 0.02  # the detector that restoring waits for, and its false positives
BENIGN, FILTER_RATE = "harmless + benign text", 0.01  # what a perplexity filter is calibrated on, and for which rate
CALIBRATED = 256  # conversations of each kind that thresholds come from, at most
FITTING = 3  # every third suffix of an arm fits, the others measure: claims need eight
NEAR, FEWEST = 2, 8  # tokens between the two prompts of a pair; pairs that are taken however far apart they are
LONG = 4  # benign texts behind a harmless prompt that make it long: a longer text has more tokens to look harmful


@dataclass(frozen=True)
class Fitted:
    """What is learnt before anything is measured: directions, detectors, and the readings that thresholds come from.

    ``calibration`` holds conversations with a text behind the prompt, by kind; ``plain`` what a model meets otherwise:
    harmless prompts alone, look-alikes alone, and long harmless texts. ``levels``: the harmful prompts' mean projection
    at every chat position; ``attacked``: what was read of the attacked conversations that detectors were fitted with;
    ``tail``: how many of the user's last tokens count as the end that may be a suffix, as many as the longest suffix
    has that anything was fitted with.
    """

    harmfulness: Harmfulness
    detectors: list[Detector]
    calibration: dict[str, Readings]
    plain: dict[str, Readings]
    levels: Float[Tensor, " chat"]
    attacked: Readings
    tail: int
    n_heads: int

    @property
    def attention(self) -> Float[Tensor, "layer head"]:
        """What every head pays to the last tokens of attacked prompts."""
        return self.attacked.attention.mean(dim=0).unflatten(0, (-1, self.n_heads))

    def taken(self, heads: Sequence[Head], strength: float, before: bool = False) -> float:
        """The mean share of chat[-1]'s attention to attacked prompts that damping takes from each head.

        With ``before`` from the tokens before the text's end: as much, but no more than is there.
        """
        at = [layer * self.n_heads + head for layer, head in heads]
        mass = strength * self.attacked.attention[:, at]
        return float((torch.minimum(mass, self.attacked.before[:, at]) if before else mass).mean())

    def strongest(self, count: int) -> list[Head]:
        """The ``count`` heads with the strongest edges from the suffix to chat[-1]."""
        return [divmod(int(i), self.n_heads) for i in self.attention.flatten().argsort(descending=True)[:count]]

    @property
    def gap(self) -> float:
        """What harmfulness − refusal must exceed for the projection to be restored: rare in harmless conversations.

        With a text behind them, without one, and in look-alikes. Harmful ones do not count: to refuse them is no
        mistake, whatever stands behind them.
        """
        behind = [readings for kind, readings in self.calibration.items() if kind.startswith("harmless")]
        kinds = (Readings.joined(behind), *self.plain.values())
        return max(largest_or(self.of(GAP).score(kind), GAP_RATE) for kind in kinds)

    @property
    def perplexity(self) -> float:
        """What windowed perplexity must exceed for a filter to fire: rare with benign text behind, and without."""
        kinds = (self.calibration[BENIGN], *self.plain.values())
        return max(largest_or(self.of("windowed perplexity").score(kind), FILTER_RATE) for kind in kinds)

    def of(self, name: str) -> Detector:
        """The detector whose name begins so."""
        return next(detector for detector in self.detectors if detector.name.startswith(name))


def parts_of(suffixes: Sequence[Suffix], arm: str) -> tuple[list[Suffix], list[Suffix]]:
    """An arm's suffixes to fit with, and others to measure with.

    Raises:
        UserError: there are fewer than two.
    """
    own = [suffix for suffix in suffixes if suffix.arm == arm]
    if len(own) < 2:
        raise UserError(
            f"The run has {len(own)} suffixes of the {arm} arm; detectors are fitted with some and measured with "
            "others, so run a pool (--n-attacks 16, --n-controls 12), or give a file of suffixes."
        )
    return own[::FITTING], [suffix for i, suffix in enumerate(own) if i % FITTING]


def matched(model: Model, prompts: Sequence[Prompt], split: str, most: int) -> dict[str, list[Prompt]]:
    """Harmful and harmless prompts of a split in pairs of nearly the same token count, at most ``most`` of them.

    Without this the count alone tells them apart. The pairs are those that differ least in all; the nearest are taken.
    """
    kinds = {kind: prompts_of(prompts, kind, split, None) for kind in ("harmful", "harmless")}
    sizes = [np.array([len(model.chat(p.text).ids) for p in own]) for own in kinds.values()]
    apart = np.abs(sizes[0][:, None] - sizes[1][None])
    pairs = sorted(zip(*linear_sum_assignment(apart), strict=True), key=lambda pair: (apart[pair], pair))
    kept = sorted(pairs[: min(most, max(FEWEST, int((apart[tuple(np.array(pairs).T)] <= NEAR).sum())))])
    return {
        "harmful": [kinds["harmful"][i] for i, _ in kept],
        "harmless": [kinds["harmless"][j] for _, j in kept],
    }


def conversations(
    model: Model, prompts: Mapping[str, Sequence[Prompt]], suffixes: Sequence[Suffix], part: int
) -> tuple[list[list[Chat]], dict[str, list[list[Chat]]]]:
    """Attacked conversations suffix by suffix, and those of every other kind, with one part of the suffixes."""

    def chats(kind: str, arm: str) -> list[list[Chat]]:
        return [[model.chat(p.text, suffix.text) for p in prompts[kind]] for suffix in parts_of(suffixes, arm)[part]]

    return chats("harmful", "adversarial"), {
        BENIGN: chats("harmless", "benign"),
        "harmless + random text": chats("harmless", "random"),
        "harmless + adversarial": chats("harmless", "adversarial"),
        "harmful + random text": chats("harmful", "random"),
        "harmful + benign text": chats("harmful", "benign"),
    }


def unattacked_chats(
    model: Model, prompts: Mapping[str, Sequence[Prompt]], suffixes: Sequence[Suffix], part: int
) -> dict[str, list[Chat]]:
    """What a model meets most of the time: harmless prompts and look-alikes alone, and harmless ones in long texts."""
    texts = [suffix.text for suffix in parts_of(suffixes, "benign")[part]]
    several = [" ".join([*texts[i:], *texts[:i]][:LONG]) for i in range(len(texts))]
    found = {f"{kind} alone": [model.chat(p.text) for p in own] for kind, own in prompts.items()}
    found["long harmless text"] = [
        model.chat(p.text, several[i % len(several)]) for i, p in enumerate(prompts["harmless"])
    ]
    return {name: chats for name, chats in found.items() if chats}


def fit(model: Model, direction: Direction, prompts: Sequence[Prompt], suffixes: Sequence[Suffix], most: int) -> Fitted:
    """Fit everything on the fit and select splits, with the first part of the suffixes.

    One half of the paired select prompts fits detectors, the other calibrates them: what a probe has learnt from scores
    too low to set its threshold, and prompts of other lengths than those that are measured set it elsewhere. The texts
    behind them are the same in both halves, because claims need all others to measure with; the false positives in the
    table say what becomes of that.

    Raises:
        UserError: an arm has fewer than two suffixes, or there are fewer than two pairs of select prompts.
    """
    for arm in ("adversarial", "random", "benign"):
        parts_of(suffixes, arm)  # says at once where there are too few
    sides = [
        [model.chat(p.text) for p in prompts_of(prompts, kind, "fit", 4 * most)] for kind in ("harmful", "harmless")
    ]
    harmfulness = harmfulness_of(model, direction, sides[0], sides[1])
    pairs = matched(model, prompts, "select", 2 * most)
    if len(pairs["harmful"]) < 2:
        raise UserError(
            f"There are {len(pairs['harmful'])} pairs of harmful and harmless select prompts; detectors need two, one "
            "to be fitted with and one for their thresholds."
        )
    known = [model.chat("x", suffix.text) for suffix in parts_of(suffixes, "adversarial")[0]]
    tail = max(int(chat.regions["suffix"].sum()) for chat in known)
    fitting = {kind: own[::2] for kind, own in pairs.items()}

    def readings(parts: Sequence[Sequence[Chat]]) -> Readings:
        return Readings.joined([read(model, part, direction, harmfulness, tail) for part in parts])

    attacked, others = conversations(model, fitting, suffixes, 0)
    found = readings(attacked)
    detectors = fit_detectors(found, readings([part for parts in others.values() for part in parts]))
    used = {p.id for own in fitting.values() for p in own}
    plain = {
        kind: spread([p for p in prompts_of(prompts, kind, "select", None) if p.id not in used], 2 * most)
        for kind in ("harmless", "lookalike")
    }
    _, unattacked = conversations(model, {kind: own[1::2] for kind, own in pairs.items()}, suffixes, 0)
    calibration = {
        name: readings([spread(part, max(1, CALIBRATED // len(parts))) for part in parts])
        for name, parts in unattacked.items()
    }
    return Fitted(
        harmfulness,
        detectors,
        calibration,
        {name: readings([chats]) for name, chats in unattacked_chats(model, plain, suffixes, 0).items()},
        harmful_levels(model, direction, sides[0]),
        found,
        tail,
        model.n_heads,
    )


def measure_detectors(
    model: Model,
    direction: Direction,
    prompts: Sequence[Prompt],
    suffixes: Sequence[Suffix],
    most: int = 32,
) -> tuple[Fitted, list[dict[str, Any]]]:
    """Fit detectors on select prompts with a third of the suffixes; measure them on report prompts with the others.

    Args:
        model: the model.
        direction: its refusal direction.
        prompts: of all splits and kinds.
        suffixes: of the arms adversarial, random and benign, at least two of each.
        most: prompts of each kind at most; fewer where the two kinds have too few of the same length.

    Raises:
        UserError: an arm has fewer than two suffixes.
    """
    fitted = fit(model, direction, prompts, suffixes, most)
    attacked, others = conversations(model, matched(model, prompts, "report", most), suffixes, 1)

    def readings(parts: Sequence[Sequence[Chat]]) -> list[Readings]:
        return [read(model, part, direction, fitted.harmfulness, fitted.tail) for part in parts]

    plain = {kind: prompts_of(prompts, kind, "report", None) for kind in ("harmless", "lookalike")}
    chats = unattacked_chats(model, plain, suffixes, 1)
    alone = {name: readings([own]) for name, own in chats.items()}
    rows = detector_rows(
        fitted.detectors,
        fitted.calibration | fitted.plain,
        readings(attacked),
        {name: readings(p) for name, p in others.items()},
        alone,
    )
    return fitted, rows
