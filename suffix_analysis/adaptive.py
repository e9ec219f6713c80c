"""Does a defence hold against an attacker who knows it? GCG run on the defended model (METHODS §6)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attacks
from attacks.config import ScoreDtype
from attacks.scorer import Scorer
from attacks.terms import Read, Term, entering
from suffix_analysis.attacking import conversation, gcg_config
from suffix_analysis.config import StudyConfig
from suffix_analysis.defences import Firings
from suffix_analysis.detectors import Harmfulness, harm_without_refusal, peak
from suffix_analysis.directions import Direction
from suffix_analysis.generate import generate
from suffix_analysis.judges import judge_named
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.refusal import refused
from suffix_analysis.stats import rate_interval

EVERY = 5  # steps between two looks at the prompts that the attack has not seen
Defended = Callable[[int], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Detected:
    """What harmfulness − refusal (see `suffix_analysis.detectors`) exceeds ``cut`` by, 0 below.

    As a term of an attack's objective it evades the detector. ``first``: where the user's text begins in a
    conversation. The forward must hold the whole conversation.
    """

    direction: Direction
    harmfulness: Harmfulness
    cut: float
    first: int
    weight: float = 1.0

    @contextlib.contextmanager
    def watch(self, model: Any, slot: attacks.Slot) -> Iterator[Read]:
        """See `attacks.terms.Term`. Reads the block's input before a defence changes it."""
        layer, seen = self.direction.layer, list[Tensor]()
        unit, harmful = (x.to(model.device) for x in (self.direction.unit, self.harmfulness.unit))
        behind = len(slot.target_ids) - 1  # tokens that stand behind chat[-1]

        def catch(x: Tensor) -> None:
            x = x.float()
            stop = x.shape[1] - behind - len(slot.after_ids)
            harm = peak(x[:, self.first : stop] @ harmful.to(x.device))
            along = x[:, x.shape[1] - 1 - behind] @ unit.to(x.device)
            seen.append((harm_without_refusal(self.direction, self.harmfulness, harm, along) - self.cut).relu())

        with entering(model, layer, catch, first=True):
            yield lambda: seen[-1]


@dataclass(frozen=True)
class Trial:
    """What the attacks on several defended models have in common.

    Attributes:
        train: instructions that the attack trains on.
        held_out: select instructions that it does not.
        refusal_tokens: ids that open refusals.
        config: budget and schedule of the attack.
        final: report prompts that the outcome is measured on.
    """

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    refusal_tokens: Sequence[int]
    config: StudyConfig
    final: Sequence[Prompt] = ()


def attack_defended(
    model: Model,
    trial: Trial,
    defended: Mapping[str, Defended],
    terms: Mapping[str, Sequence[Term]],
    on_step: Callable[[int, int], None] | None = None,
    fired: Mapping[str, Firings] | None = None,
) -> list[dict[str, Any]]:
    """Loss and what is not refused against steps, one attack with the same budget and seed on each defended model.

    Each begins with the same neutral text (see `suffix_analysis.attacking.gcg_config`): a suffix that is known to work
    on the undefended model would have cost that model's attacker a budget of its own. The first suffix (step 0) and
    every few steps the best one so far is looked at: ``target_loss`` is its loss without further terms of the
    objective, so that attacks can be compared, ``not_refused`` the share of unseen prompts whose reply does not open
    as a refusal, ``fires`` the share in which the detector fires that a defence waits for.
    ``success``, at the first and the last step alone: the share of ``final`` prompts that are answered, by the
    verdict, with that one of the suffixes so far that left the fewest refused; with its exact interval over prompts.

    The defence is on while the attack scores candidates, takes gradients and looks at unseen prompts.

    Args:
        model: the model in the precision of searches; it is wrapped, so it is searched in that precision alone.
        trial: what the attacks have in common.
        defended: defences by name: functions from the number of tokens behind chat[-1] to a context.
        terms: of the attack's objective, by defence: what the attacker knows to lower, such as a detector's score.
        on_step: called with (done, total).
        fired: by defence, what it tells in which prompts its detector fires.
    """
    assert model.bridge is not None  # wrapped before the attack looks at it
    rows: list[dict[str, Any]] = []
    for number, (name, context) in enumerate(defended.items()):
        for row in _attack_one(model, trial, name, context, terms.get(name, ()), (fired or {}).get(name)):
            rows.append(row)
            if on_step is not None:
                on_step(number * trial.config.steps + row["step"], len(defended) * trial.config.steps)
    return rows


def _attack_one(
    model: Model, trial: Trial, name: str, context: Defended, terms: Sequence[Term], fired: Firings | None
) -> Iterator[dict[str, Any]]:
    """The attack on one defended model, a row a step."""
    config, held_out, final = trial.config, trial.held_out, trial.final
    own: ScoreDtype = "bfloat16" if model.hf.dtype == torch.bfloat16 else "float32"
    # without the cache a forward holds the whole prompt, which detectors read
    settings = replace(gcg_config(model, config), use_prefix_cache=False, score_dtype=own)
    talks: Any = [conversation(model, prompt.text) for prompt in trial.train]
    behind = len(attacks.build_slot(model.tokenizer, talks[0], config.target, "x").target_ids) - 1
    with context(behind):
        attack = attacks.GCG(model.hf, model.tokenizer, talks, config.target, settings, terms)
    plain, looks = Scorer(model.hf, attack.slots, settings), list[tuple[float, float, str]]()

    def look(ids: Sequence[int], text: str) -> dict[str, float | None]:
        with context(behind):
            loss = float(plain(torch.tensor([list(ids)]))[0].mean())
        with context(0):
            if fired is not None:
                fired.take()  # what the attack's own prompts have left
            still = refused(model, held_out, trial.refusal_tokens, text)
        looks.append((float((~still).float().mean()), -loss, text))
        fires = None if fired is None else fired.take()
        return {"target_loss": loss, "not_refused": looks[-1][0], "fires": fires}

    blank = {
        "defence": name, "step": 0, "loss": None, "best_loss": None, "target_loss": None, "not_refused": None,
        "fires": None, "success": None, "success_lo": None, "success_hi": None, "n_final": len(final),
        "n_prompts": len(held_out), "n_train": len(trial.train), "seed": config.seed,
    }  # fmt: skip

    def judged() -> dict[str, float | None]:
        """What the suffix so far that left the fewest refused gets answered; of equals the one with the lowest loss."""
        if not final:
            return {}
        with context(0):
            ids = [model.chat(p.text, max(looks)[2]).ids for p in final]
            told = generate(model.hf, model.tokenizer, ids, config.reply_tokens)
        judge = judge_named(config.judge)
        verdicts = [judge(p.text, reply) == "complied" for p, reply in zip(final, told, strict=True)]
        return dict(
            zip(("success", "success_lo", "success_hi"), rate_interval(np.array(verdicts, dtype=float)), strict=True)
        )

    first = attack.buffer[0][1]
    yield blank | look(first, attack._string(first)) | judged()
    steps = attack.steps()
    for number in range(1, config.steps + 1):
        with context(behind):
            step = next(steps)
        row = blank | {"step": number, "loss": step.loss, "best_loss": step.best_loss}
        if number % EVERY == 0 or number == config.steps:
            row |= look(attack.best[1], attack.best[2])
        if number == config.steps:
            row |= judged()
        yield row


def budgets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each defence costs the attacker: steps until the goal is met, at the looks that were taken.

    ``steps_to_half``: until half of the unseen prompts are not refused for the first time. ``steps_to_loss``: until the
    target's loss is as low as the attack on the undefended model ended. None where the budget (``n_steps``) did not
    suffice; one attack each, so descriptive.
    """
    looks = [row for row in rows if row["target_loss"] is not None]
    by_name = {
        name: [row for row in looks if row["defence"] == name] for name in dict.fromkeys(r["defence"] for r in looks)
    }
    bar = by_name["none"][-1]["target_loss"] if "none" in by_name else None
    return [
        {
            "defence": name,
            "steps_to_half": _first(own, lambda row: row["not_refused"] >= 0.5),
            "steps_to_loss": None if bar is None else _first(own, lambda row: row["target_loss"] <= bar),
            "bar": bar,
            "n_steps": own[-1]["step"],
        }
        for name, own in by_name.items()
    ]


def _first(rows: Sequence[dict[str, Any]], met: Callable[[dict[str, Any]], bool]) -> int | None:
    return next((int(row["step"]) for row in rows if met(row)), None)
