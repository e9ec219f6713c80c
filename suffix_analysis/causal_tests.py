"""The causal tests of a study: what is changed, in which heads, and the controls beside each (METHODS §4)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from suffix_analysis import causal
from suffix_analysis.causal import Head, Readout
from suffix_analysis.replay import Hook, Prepared

DOSES = (0.25, 0.5, 0.75, 1.0)
SIZES = (1, 2, 4)
MEAN, RESAMPLED, ZERO = "mean-ablated", "resample-ablated", "zero-ablated"
PATCHED = "patched from the run without suffix"
UNCHANGED = "nothing changed"
CUT, DESTROYED = "suffix edges cut, mass renormalised", "suffix edges cut, mass destroyed"
CUT_LAST, CUT_INSTRUCTION = "suffix edges cut at chat[-1] only", "instruction edges cut, mass renormalised"
RESTORED, RESTORED_MEAN = "projection restored", "projection set to the harmful mean"
ELSEWHERE = "random direction moved as far"
ATTENTION = "attention as with a shuffled suffix"


@dataclass(frozen=True)
class Runs:
    """The same prompts without a suffix, with it, and with a control suffix of the same length (where there is one)."""

    none: Prepared
    attacked: Prepared
    control: Prepared | None = None


@dataclass(frozen=True)
class Reference:
    """What heads mix from values at the chat tokens of other prompts: their mean, and some prompts' own.

    Of harmless prompts: the mean of harmful ones is what a head that carries refusal gives each of them anyway.
    """

    mean: Float[Tensor, "layer chat head d_head"]
    own: Float[Tensor, "prompt layer chat head d_head"]

    def partners(self, count: int) -> Float[Tensor, "count layer chat head d_head"]:
        """One of the prompts for each of ``count`` others, in turn."""
        return self.own[torch.arange(count) % len(self.own)]


@dataclass(frozen=True)
class Test:
    """One causal test: hooks on one of the runs. Its effect is held against the way from that run to the other.

    ``once``: on the run without a suffix and with nothing from the other, so one measurement holds for every suffix.
    """

    name: str
    heads: str
    on: Literal["attacked", "none"]
    hooks: Callable[[Runs], list[Hook]]
    n_heads: int = 0
    replies: bool = False
    dose: float | None = None
    needs_control: bool = False
    once: bool = False


def random_heads(heads: Sequence[Head], n_heads: int, below: int, seed: int) -> list[Head]:
    """As many other heads of the same layers, or of the nearest ones before layer ``below`` where a layer has no more.

    Fewer, where there are no more at all.
    """
    rng = random.Random(seed)
    taken, found = set(heads), []
    for layer, _ in heads:
        free = [(at, h) for at in range(max(below, layer + 1)) for h in range(n_heads) if (at, h) not in taken]
        near = min((abs(at - layer) for at, _ in free), default=0)
        free = [(at, h) for at, h in free if abs(at - layer) == near]
        if free:
            found.append(rng.choice(free))
            taken.add(found[-1])
    return found


def shortfalls(rows: Sequence[Mapping[str, Any]], n_top: int) -> list[str]:
    """Sentences on what the table of causal tests lacks: the attention transplant, and random sets as large."""
    told = []
    if not any(row["test"] == ATTENTION for row in rows):
        told.append("The first shuffled suffix has not the attack's token count everywhere: no attention transplanted.")
    if max((row["n_heads"] for row in rows if row["heads"] == "random"), default=0) < n_top:
        told.append(f"There are no {n_top} other heads before the direction's layer: no random set is as large.")
    return told


def tests(
    readout: Readout,
    top: Sequence[Head],
    others: Sequence[Sequence[Head]],
    reference: Reference,
    n_layers: int,
    n_heads: int,
    level: float,
    seed: int = 0,
) -> list[Test]:
    """The causal tests of a study, each with its controls: random heads of the same layers, and a random direction.

    ``level`` is the projection of the harmful prompts' mean at chat[-1] (fit split), at the readout's layer.
    """
    others = [some for some in others if some]  # a set of no heads changes nothing and controls nothing
    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    made = [
        Test(UNCHANGED, "none", "attacked", lambda runs: [], replies=True),
        Test(UNCHANGED, "none", "none", lambda runs: [], replies=True, once=True),
    ]
    for i, (label, heads) in enumerate([("top", top), *(("random", some) for some in others), ("all", every)]):
        # replies take the longest, so of random heads the first set only
        made += _of_heads(label, list(heads), reference, replies=label != "random" or i == 1)
    for size in SIZES:  # the set-size curve
        for label, heads in (("top", top), *(("random", some) for some in others)):
            if size < len(heads):
                made += [t for t in _of_heads(label, list(heads[:size]), reference) if t.name in (MEAN, PATCHED)]
    for dose in DOSES:

        def restore(runs: Runs, dose: float = dose) -> list[Hook]:
            return causal.shifted(readout, causal.base(runs.none, readout).projection, dose)

        made.append(Test(RESTORED, "none", "attacked", restore, replies=dose == 1.0, dose=dose))
    return [
        *made,
        Test(RESTORED_MEAN, "none", "attacked", lambda runs: causal.shifted(readout, level), replies=True, dose=1.0),
        Test(
            ELSEWHERE, "none", "attacked", lambda runs: _elsewhere(runs, readout, seed), replies=True, dose=1.0,
        ),
    ]  # fmt: skip


def _of_heads(label: str, heads: list[Head], reference: Reference, replies: bool = False) -> list[Test]:
    """The tests of one set of heads."""
    plans: list[tuple[str, Literal["attacked", "none"], Callable[[Runs], list[Hook]]]] = [
        (CUT, "attacked", lambda runs: causal.cut(runs.attacked, "suffix", heads)),
        (CUT_LAST, "attacked", lambda runs: causal.cut(runs.attacked, "suffix", heads, at=-1)),
        (DESTROYED, "attacked", lambda runs: causal.cut(runs.attacked, "suffix", heads, renormalise=False)),
        (PATCHED, "attacked", lambda runs: causal.replaced(heads, runs.none.z)),
        ("patched from the attacked run", "none", lambda runs: causal.replaced(heads, runs.attacked.z)),
        (ATTENTION, "attacked", lambda runs: causal.transplanted(runs.attacked, _known(runs.control), heads)),
        (MEAN, "none", lambda runs: causal.replaced(heads, reference.mean)),
        (RESAMPLED, "none", lambda runs: causal.replaced(heads, reference.partners(len(runs.none)))),
        (ZERO, "none", lambda runs: causal.replaced(heads, torch.zeros_like(reference.mean))),
        # what a suffix that took all attention from the instruction would do
        (CUT_INSTRUCTION, "none", lambda runs: causal.cut(runs.none, "instruction", heads)),
    ]  # fmt: skip
    talking, alone = (CUT, PATCHED), (MEAN, RESAMPLED, ZERO, CUT_INSTRUCTION)
    return [
        Test(
            name, label, on, hooks, len(heads), replies and name in talking,
            needs_control=name == ATTENTION, once=name in alone,
        )
        for name, on, hooks in plans
    ]  # fmt: skip


def _known(run: Prepared | None) -> Prepared:
    assert run is not None
    return run


def _elsewhere(runs: Runs, readout: Readout, seed: int) -> list[Hook]:
    """The control of a restored projection: the same step along a random direction orthogonal to it."""
    noise = torch.randn(len(readout.unit), generator=torch.Generator().manual_seed(seed))
    noise = noise - (noise @ readout.unit) * readout.unit
    apart = Readout(noise / noise.norm(), readout.layer, readout.tokens)
    step = causal.base(runs.none, readout).projection - causal.base(runs.attacked, readout).projection
    return causal.shifted(apart, causal.base(runs.attacked, apart).projection + step)
