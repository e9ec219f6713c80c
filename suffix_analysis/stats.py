"""Intervals for crossed designs: instructions × suffixes (METHODS §5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

DRAWS = 2000
MIN_SUFFIXES = 8  # fewer, and nothing is claimed beyond these suffixes


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval, and what was resampled to get it."""

    estimate: float
    lo: float
    hi: float
    n_prompts: int
    n_suffixes: int
    resampled: str
    descriptive: bool


def small_sample(n: int) -> float:
    """What a bootstrap over ``n`` draws must be widened by to cover as Student's t does: √(n/(n − 1)) · t(n − 1)/z.

    A resampled mean varies less than a mean does, by (n − 1)/n, and its quantiles are the normal ones: with eight
    suffixes 95 % intervals would cover 88 to 90 %.
    """
    from scipy.stats import norm, t

    return float(np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1) / norm.ppf(0.975))


def _weights(rng: np.random.Generator, n: int, draws: int) -> Float[ndarray, "draw n"]:
    """Weights of ``n`` resampled units, their distance from equal weights widened for a small sample."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    return drawn if n == 1 else 1 / n + small_sample(n) * (drawn - 1 / n)


def resampled_means(
    cells: Float[ndarray, "prompt suffix measure"], seed: int = 0, draws: int = DRAWS, stream: int = 0
) -> Float[ndarray, "draw measure"]:
    """Means over bootstrap draws of prompts and, where there are enough, of suffixes.

    Both factors are drawn with replacement and independently (two-way bootstrap), because cells that share an
    instruction or a suffix are not independent. Of fewer suffixes than a claim needs, the mean is of these and only
    prompts are drawn. The same seed draws the same prompts, so differences between arms over the same prompts are
    paired; ``stream`` draws other suffixes, because those of two arms are not.
    """
    n_prompts, n_suffixes, n_measures = cells.shape
    prompt_weights = _weights(np.random.default_rng(seed), n_prompts, draws)
    if n_suffixes < MIN_SUFFIXES:
        return prompt_weights @ cells.mean(axis=1)
    suffix_weights = _weights(np.random.default_rng([seed, n_suffixes, stream]), n_suffixes, draws)
    out = np.empty((draws, n_measures))
    for start in range(0, draws, 250):  # in blocks: the intermediate is draws × suffixes × measures
        block = slice(start, start + 250)
        by_prompt = np.tensordot(prompt_weights[block], cells, axes=1)
        out[block] = np.einsum("ds,dsm->dm", suffix_weights[block], by_prompt)
    return out


def interval_table(
    cells: Float[ndarray, "prompt suffix measure"], seed: int = 0
) -> tuple[Float[ndarray, " measure"], Float[ndarray, " measure"], Float[ndarray, " measure"]]:
    """Mean, lower and upper bound of every measure.

    Raises:
        ValueError: a cell is not finite, or there is none.
    """
    if cells.size == 0:
        raise ValueError("interval_table needs at least one prompt and one suffix")
    if not np.isfinite(cells).all():
        raise ValueError("interval_table got a value that is not finite")
    means = resampled_means(cells, seed)
    lo, hi = np.quantile(means, [0.025, 0.975], axis=0)
    return cells.mean(axis=(0, 1)), lo, hi


def interval(
    cells: Float[ndarray, "prompt suffix"], seed: int = 0, *, suffix_arm: bool = True, rate: bool = False
) -> Interval:
    """Interval for one measure; ``suffix_arm`` says whether the arm has suffixes at all (else only prompts vary).

    Of a ``rate`` that is 0 or 1 in every cell a bootstrap has no width; the exact interval over what is resampled is
    taken, over the fewer of prompts and suffixes.
    """
    mean, (lo,), (hi,) = interval_table(cells[:, :, None], seed)
    n_prompts, n_suffixes = cells.shape
    if rate:
        lo, hi = max(0.0, lo), min(1.0, hi)
    if rate and _is_certain(cells):
        _, lo, hi = _exact(cells)
    return Interval(
        estimate=float(mean[0]),
        lo=float(lo),
        hi=float(hi),
        n_prompts=n_prompts,
        n_suffixes=n_suffixes if suffix_arm else 0,
        resampled="prompts and suffixes" if n_suffixes >= MIN_SUFFIXES else "prompts",
        descriptive=(suffix_arm and n_suffixes < MIN_SUFFIXES) or n_prompts < 2,
    )


def _is_certain(cells: Float[ndarray, "prompt suffix"]) -> bool:
    """Whether a rate is 0 in every cell, or 1."""
    return bool(cells[0, 0] in (0, 1) and (cells == cells[0, 0]).all())


def _exact(cells: Float[ndarray, "prompt suffix"]) -> tuple[float, float, float]:
    """The exact interval of cells that are all alike: there are as many independent ones as of the fewer factor."""
    n_prompts, n_suffixes = cells.shape
    n = min(n_prompts, n_suffixes) if n_suffixes >= MIN_SUFFIXES else n_prompts
    return rate_interval(cells[:n, 0])


def contrast_table(
    arm: Float[ndarray, "prompt suffix measure"], against: Float[ndarray, "prompt_b suffix_b measure"], seed: int = 0
) -> tuple[Float[ndarray, " measure"], Float[ndarray, " measure"], Float[ndarray, " measure"]]:
    """Differences of two arms' means over the same prompts, with lower and upper bounds; see `contrast`.

    Raises:
        ValueError: the arms have different numbers of prompts.
    """
    if arm.shape[0] != against.shape[0]:
        raise ValueError(f"the arms have {arm.shape[0]} and {against.shape[0]} prompts; a contrast pairs them")
    draws = resampled_means(arm, seed) - resampled_means(against, seed, stream=1)
    lo, hi = np.quantile(draws, [0.025, 0.975], axis=0)
    return arm.mean(axis=(0, 1)) - against.mean(axis=(0, 1)), lo, hi


def contrast(
    arm: Float[ndarray, "prompt suffix"],
    against: Float[ndarray, "prompt_b suffix_b"],
    seed: int = 0,
    *,
    against_suffixes: bool = False,
    rate: bool = False,
) -> Interval:
    """Difference of two arms' means over the same prompts (``arm`` − ``against``), paired by prompt.

    Each arm's own suffixes are resampled where it has several. ``against_suffixes`` says whether ``against`` has
    suffixes at all: a claim needs enough of them in every arm that does. Between two arms whose ``rate`` is 0 or 1 in
    every cell the interval is made from their exact ones.
    """
    (estimate,), (lo,), (hi,) = contrast_table(arm[:, :, None], against[:, :, None], seed)
    if rate:
        lo, hi = max(-1.0, lo), min(1.0, hi)
    if rate and _is_certain(arm) and _is_certain(against):
        (_, a, b), (_, c, d) = _exact(arm), _exact(against)
        lo, hi = a - d, b - c
    fewest = min(arm.shape[1], against.shape[1]) if against_suffixes else arm.shape[1]
    several = max(arm.shape[1], against.shape[1]) >= MIN_SUFFIXES
    return Interval(
        estimate=float(estimate),
        lo=float(lo),
        hi=float(hi),
        n_prompts=arm.shape[0],
        n_suffixes=arm.shape[1],
        resampled="prompts and suffixes" if several else "prompts",
        descriptive=fewest < MIN_SUFFIXES or arm.shape[0] < 2,
    )


def rate_change(
    after: Float[ndarray, "prompt suffix"], before: Float[ndarray, "prompt suffix"]
) -> tuple[float, float, float]:
    """The change of a rate over the same prompts and suffixes, with its 95 % interval; paired cell by cell.

    Where every cell changes alike a bootstrap has no width; that of an exact interval is taken.
    """
    change = after - before
    found = interval(change)
    lo, hi = found.lo, found.hi
    if (change == change[0, 0]).all():
        _, _, width = _exact(np.zeros_like(change))
        lo, hi = found.estimate - width, found.estimate + width
    return found.estimate, max(-1.0, lo), min(1.0, hi)


def ratio_interval(
    part: Float[ndarray, "prompt suffix"], whole: Float[ndarray, "prompt suffix"], seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """Σ part / Σ whole with its 95 % bootstrap interval, both resampled together.

    None where the whole's own interval reaches 0: a share of nothing is no number.
    """
    draws = resampled_means(np.stack([part, whole], axis=2), seed)
    lo, hi = np.quantile(draws[:, 1], [0.025, 0.975])
    if lo <= 0 <= hi:
        return None, None, None
    lo, hi = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    return float(part.mean() / whole.mean()), float(lo), float(hi)


def rate_interval(flags: Float[ndarray, " prompt"]) -> tuple[float, float, float]:
    """A proportion with its exact (Clopper–Pearson) 95 % interval, for rates over prompts alone.

    The bootstrap interval of a rate of exactly 0 or 1 has no width; this one has.
    """
    from scipy.stats import binomtest

    hits, n = int(flags.sum()), len(flags)
    bounds = binomtest(hits, n).proportion_ci(0.95, method="exact")
    return hits / n, float(bounds.low), float(bounds.high)


def auroc(positive: Float[ndarray, " a"], negative: Float[ndarray, " b"]) -> float:
    """Share of (positive, negative) pairs in the right order, ties counted half (Mann–Whitney U / ab)."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def auroc_interval(
    positive: Float[ndarray, " a"], negative: Float[ndarray, " b"], seed: int = 0, draws: int = 1000
) -> tuple[float, float, float]:
    """AUROC with its 95 % bootstrap interval; both classes are resampled."""
    return crossed_auroc(positive[:, None], [negative[:, None]], seed, draws)


def crossed_auroc(
    positive: Float[ndarray, "prompt suffix"],
    negatives: Sequence[Float[ndarray, "_ _"]],
    seed: int = 0,
    draws: int = 500,
    *,
    n_suffixes: int | None = None,
    sets: Sequence[tuple[str, str]] = (),
) -> tuple[float, float, float]:
    """AUROC over all cells of crossed designs, with its 95 % two-way bootstrap interval.

    Prompts and suffixes are drawn with replacement, also where there are few. ``sets`` names those of ``positive`` and
    of each of ``negatives``: what has the same name is the same in both, and is drawn once (each table's own if left
    out). The interval is widened about the estimate for the fewer of prompts and of ``n_suffixes``, the fewest of a
    side that has any (``positive``'s if left out). Where every draw separates alike the bootstrap has no width: the
    exact interval of that rate over the fewer of prompts and suffixes is taken.

    Raises:
        ValueError: sets of one name have different sizes.
    """
    rng = np.random.default_rng(seed)
    names = sets or [(f"prompts {i}", f"suffixes {i}") for i in range(1 + len(negatives))]
    drawn: dict[str, ndarray] = {}

    def weights(cells: ndarray, own: tuple[str, str]) -> ndarray:
        """How often each draw takes each cell: its prompt's count times its suffix's."""
        for name, n in zip(own, cells.shape, strict=True):
            if name not in drawn:
                drawn[name] = rng.multinomial(n, np.full(n, 1 / n), size=draws)
            if drawn[name].shape[1] != n:
                raise ValueError(f"{name} has {drawn[name].shape[1]} members in one table and {n} in another")
        prompts, suffixes = (drawn[name] for name in own)
        return (prompts[:, :, None] * suffixes[:, None]).reshape(draws, -1)

    others = np.concatenate([cells.ravel() for cells in negatives])
    higher = (positive.reshape(-1, 1) > others) + 0.5 * (positive.reshape(-1, 1) == others)
    taken = weights(positive, names[0])
    against = np.concatenate([weights(cells, own) for cells, own in zip(negatives, names[1:], strict=True)], axis=1)
    found = ((taken @ higher) * against).sum(axis=1) / (taken.sum(axis=1) * against.sum(axis=1))
    lo, hi = np.quantile(found, [0.025, 0.975])
    value = float(higher.mean())
    fewest = positive.shape[1] if n_suffixes is None else n_suffixes
    if min(found) == max(found) == value and value in (0.0, 1.0):
        return _exact(np.full((positive.shape[0], fewest), value))
    units = [n for n in (fewest, positive.shape[0], *(len(cells) for cells in negatives)) if n > 1]
    wider = small_sample(min(units)) if units else 1.0
    return value, max(0.0, value + wider * (float(lo) - value)), min(1.0, value + wider * (float(hi) - value))


EQUIVALENT = 0.1  # differences of rates, and of projections between harmless (0) and harmful (1), that count as none


def in_words(found: Interval, bound: float = EQUIVALENT) -> str:
    """What an interval allows to say: an effect, none larger than ``bound``, or nothing (METHODS §5)."""
    if found.descriptive:
        return "descriptive"
    if not found.lo <= 0 <= found.hi:
        return "differs from 0"
    # an interval without width comes from values that do not vary, and says nothing of others
    return "within the bound" if max(-found.lo, found.hi) <= bound and found.lo < found.hi else "not powered"


def contrast_row(measure: str, arm: str, against: str, found: Interval, bound: float = EQUIVALENT) -> dict[str, Any]:
    """A contrast as a row of findings, with what it allows to say; differences up to ``bound`` count as none."""
    return {
        "measure": measure, "arm": arm, "against": against, **vars(found),
        "verdict": in_words(found, bound), "equivalent": bound,
    }  # fmt: skip
