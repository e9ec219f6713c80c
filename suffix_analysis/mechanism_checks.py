"""What must hold in a run before its causal tests are worth reading; stored and shown with the findings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from suffix_analysis.forward import last_logits
from suffix_analysis.replay import Prepared

REPLAY_BOUND, SUM_BOUND, STATE_BOUND, CONTROL_BOUND = 1e-5, 1e-4, 1e-4, 1e-3


def replay_error(run: Prepared) -> float:
    """Largest difference between a replay's logits and a whole forward's, as a share of the largest logit."""
    whole = last_logits(run.model.hf, run.model.tokenizer, [chat.ids for chat in run.chats])
    return float((run.logits.to(whole) - whole).abs().max() / whole.abs().max())


def state_error(plain: Prepared, attacked: Prepared) -> float:
    """Largest change that the suffix makes to a value at an instruction token, as a share of the largest value.

    Under a causal mask it is 0 but for rounding: padding makes sums of another order.
    """
    worst = []
    for before, after in zip(plain.values, attacked.values, strict=True):
        sides = []
        for run, values in ((plain, before), (attacked, after)):
            mask = run.regions["instruction"][:, : values.shape[2]]
            sides.append(values.transpose(1, 2)[mask].float())
        scale = sides[0].abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        worst.append((sides[0] - sides[1]).abs().max() / scale)
    return float(torch.stack(worst).max())  # a tensor's max is NaN where one value is; Python's may hide it


def check_rows(
    replays: Sequence[float], states: Sequence[float], factors: Sequence[float], paths: Sequence[float],
    logits: Sequence[float], patched_all: float | None, rounding: float = 0.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """The mechanism's identities with their bounds (or the precision's ``rounding`` if larger), as records of
    findings/checks.json."""

    def worst(values: Sequence[float]) -> float:
        return float(torch.tensor(values, dtype=torch.float64).max())

    found: list[tuple[str, float | None, float, str]] = [
        ("replays", worst(replays), REPLAY_BOUND, "Replays of the chat tokens give the logits of whole forwards."),
        ("states", worst(states), STATE_BOUND, "The suffix changes no state at an instruction token."),
        (
            "factors add up", worst(factors), SUM_BOUND,
            "The factors of the instruction's lost contribution begin and end at the two runs they stand between.",
        ),
        ("paths add up", worst(paths), SUM_BOUND, "Two-hop paths sum to what the top heads bring from chat tokens."),
        ("logit attribution adds up", worst(logits), SUM_BOUND, "All writes sum to the model's own logits."),
    ]  # fmt: skip
    sentence = "Positive control: all heads patched from the run without a suffix bring all of the projection back."
    if patched_all is None:
        sentence += " Not defined here, because the projection does not fall."
    error = None if patched_all is None else abs(patched_all - 1)
    found.append(("all heads patched", error, CONTROL_BOUND, sentence))
    return [
        {"name": name, "value": value, "bound": max(bound, rounding),
         "passed": None if value is None else value <= max(bound, rounding), "sentence": sentence}
        for name, value, bound, sentence in found
    ]  # fmt: skip
