"""Maps over layers × heads, tested against no change at all their places together (family-wise; METHODS §5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from suffix_analysis.stats import DRAWS


@dataclass(frozen=True)
class MaxT:
    """A map's t values and p values that are adjusted for all of its places (family-wise)."""

    t: Float[ndarray, " *place"]
    p: Float[ndarray, " *place"]


def sign_flip_max_t(differences: Float[ndarray, "prompt *place"], seed: int = 0, draws: int = DRAWS) -> MaxT:
    """Paired test of every place of a map against 0, at the level of instructions (Westfall & Young's max-T).

    Under the null a prompt's whole map is as likely as its negative; the largest |t| over the map in each draw of signs
    is what every place is held against. Of several suffixes' mean the claim is about these; see `crossed_max_t`.

    Raises:
        ValueError: fewer than two prompts, or a value that is not finite.
    """
    if len(differences) < 2 or not np.isfinite(differences).all():
        raise ValueError("sign_flip_max_t needs at least two prompts, and values that are finite")
    flat = differences.reshape(len(differences), -1).astype(float)
    observed = _t(flat.mean(axis=0), _spread(flat))
    return _held_against(observed, _flipped(flat, seed, draws), differences.shape[1:])


def crossed_max_t(
    arm: Float[ndarray, "prompt suffix *place"],
    against: Float[ndarray, "prompt_b suffix_b *place"],
    seed: int = 0,
    draws: int = DRAWS,
) -> MaxT:
    """Test of every place's difference between two arms, for other prompts and other suffixes than these (family-wise).

    Suffixes differ in what they do, and every prompt sees the same ones: signs flipped by prompt alone would take what
    these suffixes happen to share for an effect of the arm. So t is the mean difference over the spread of prompts'
    *and* suffixes' means. It is held against the largest t that suffixes' means alone reach when their labels are
    exchanged (their signs, where ``against`` has no suffixes), and against that which prompts' means reach when their
    signs are flipped; the larger p counts, because either may be few, or alike in fewer places.

    Raises:
        ValueError: other prompts in one arm, fewer than two prompts or suffixes, or a value that is not finite.
    """
    if len(arm) != len(against) or len(arm) < 2 or arm.shape[1] < 2:
        raise ValueError("crossed_max_t needs at least two suffixes, and in both arms the same two prompts or more")
    if not (np.isfinite(arm).all() and np.isfinite(against).all()):
        raise ValueError("crossed_max_t needs values that are finite")
    place = arm.shape[2:]
    ours, theirs = (x.reshape(*x.shape[:2], -1).astype(float) for x in (arm, against))
    by_prompt = ours.mean(axis=1) - theirs.mean(axis=1)
    by_suffix, others = ours.mean(axis=0), theirs.mean(axis=0)
    alone = len(others) == 1
    square = _spread(by_prompt) ** 2 + _spread(by_suffix) ** 2 + (0 if alone else _spread(others) ** 2)
    observed = _t(by_prompt.mean(axis=0), np.sqrt(square))
    largest = _flipped(by_suffix - others, seed, draws) if alone else _exchanged(by_suffix, others, seed, draws)
    found = _held_against(observed, largest, place)
    return MaxT(found.t, np.maximum(found.p, _held_against(observed, _flipped(by_prompt, seed, draws), place).p))


def _spread(values: Float[ndarray, "unit place"]) -> Float[ndarray, " place"]:
    """The standard error of the mean."""
    return _error(values.mean(axis=0), (values**2).sum(axis=0), len(values))


def _error(
    means: Float[ndarray, "*row place"], squares: Float[ndarray, "*row place"], n: int
) -> Float[ndarray, "*row place"]:
    """Standard errors from means and sums of squares; below a floor they are rounding: where all ``n`` move alike, t is
    large and finite."""
    return np.maximum(np.sqrt(np.maximum(squares - n * means**2, 0) / (n - 1) / n), 1e-7 * np.sqrt(squares / n))


def _t(means: Float[ndarray, "*row place"], spread: Float[ndarray, "*row place"]) -> Float[ndarray, "*row place"]:
    return np.divide(means, spread, out=np.zeros_like(means), where=spread > 0)


def _flipped(values: Float[ndarray, "unit place"], seed: int, draws: int) -> Float[ndarray, " draw"]:
    """The largest |t| over the places when every unit's sign is drawn."""
    rng, n = np.random.default_rng(seed), len(values)
    squares = (values**2).sum(axis=0)  # does not change when signs do

    def largest(count: int) -> ndarray:
        means = rng.choice([-1.0, 1.0], size=(count, n)) @ values / n
        return np.abs(_t(means, _error(means, np.broadcast_to(squares, means.shape), n))).max(axis=1)

    return _in_blocks(largest, draws)


def _exchanged(
    ours: Float[ndarray, "unit place"], theirs: Float[ndarray, "unit_b place"], seed: int, draws: int
) -> Float[ndarray, " draw"]:
    """The largest |t| (Welch's) over the places when units are drawn to belong to either side."""
    rng, pooled, sizes = np.random.default_rng(seed), np.concatenate([ours, theirs]), (len(ours), len(theirs))
    sides = np.repeat([1.0, 0.0], sizes)

    def largest(count: int) -> ndarray:
        first = rng.permuted(np.tile(sides, (count, 1)), axis=1)
        parts = []
        for taken, n in zip((first, 1 - first), sizes, strict=True):
            means = taken @ pooled / n
            parts.append((means, _error(means, taken @ pooled**2, n)))
        (a, spread_a), (b, spread_b) = parts
        return np.abs(_t(a - b, np.hypot(spread_a, spread_b))).max(axis=1)

    return _in_blocks(largest, draws)


def _in_blocks(largest: Callable[[int], ndarray], draws: int, block: int = 250) -> Float[ndarray, " draw"]:
    """``draws`` values, made in blocks, because the intermediates are draws × places."""
    return np.concatenate([largest(min(block, draws - start)) for start in range(0, draws, block)])


def _held_against(observed: Float[ndarray, " place"], largest: Float[ndarray, " draw"], shape: tuple[int, ...]) -> MaxT:
    at_least = (largest[:, None] >= np.abs(observed)[None] * (1 - 1e-9)).sum(axis=0)
    return MaxT(observed.reshape(shape), ((1 + at_least) / (len(largest) + 1)).reshape(shape))
