"""How well detectors tell attacked conversations from others, and what becomes of their thresholds (METHODS §6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from suffix_analysis.detectors import Detector, Readings
from suffix_analysis.stats import MIN_SUFFIXES, crossed_auroc, interval

RATES = (0.01, 0.05)  # false positives that thresholds are set for
APART = 2.0  # tokens, on average, by which conversations may be longer than those they are told from
ATTACKED = ("harmful", "adversarial")  # the prompts and the suffixes of attacked conversations


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
