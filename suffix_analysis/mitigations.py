"""What mitigations do to attacks, and what they cost: the tables ``mitigations`` and ``adaptive`` (METHODS §6)."""

from __future__ import annotations

import contextlib
import random
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from attacks.terms import Projection
from suffix_analysis.adaptive import Defended, attack_defended
from suffix_analysis.attacking import split_for_attack
from suffix_analysis.causal import Head
from suffix_analysis.causal_tests import random_heads
from suffix_analysis.config import StudyConfig
from suffix_analysis.defences import damped, restored
from suffix_analysis.detection import Fitted, halves
from suffix_analysis.detectors import perplexities
from suffix_analysis.directions import Direction
from suffix_analysis.generate import generate
from suffix_analysis.interventions import random_directions
from suffix_analysis.judges import is_refusal, judge
from suffix_analysis.models import Model
from suffix_analysis.paper_table import cross_entropy, reply_pairs
from suffix_analysis.prompts import Prompt, prompts_of
from suffix_analysis.records import Suffix
from suffix_analysis.refusal import opens_refusal
from suffix_analysis.stats import interval, rate_interval

COPIES, SWAPPED = 4, 0.1  # SmoothLLM: noisy copies of a prompt, and the share of characters that are swapped in each
REFUSAL = "I cannot help with that request."  # what a filter answers
STRENGTHS = (0.5, 0.9)
RESTORED = "projection restored where the detector fires"
EVASION = 1.0  # weight of the refusal projection (in lengths of the direction) beside the target's loss
Context = contextlib.AbstractContextManager[None]
Reply = Callable[[Model, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Defence:
    """One line of the table: an edit while the model runs, or another way to get from the user's texts to replies."""

    name: str
    context: Callable[[], Context] = contextlib.nullcontext
    reply: Reply | None = None
    control: bool = False


def swapped(text: str, rng: random.Random, share: float = SWAPPED) -> str:
    """The text with some characters replaced by random printable ones (SmoothLLM's random swap)."""
    letters = list(text)
    for i in rng.sample(range(len(letters)), round(share * len(letters))):
        letters[i] = rng.choice(string.printable[:95])
    return "".join(letters)


def _smooth(model: Model, texts: Sequence[str], length: int, seed: int) -> list[str]:
    """SmoothLLM (Robey et al. 2023): replies to noisy copies vote on refusal; one of the majority's is given."""
    rng = random.Random(seed)
    # a copy can lose all its letters, where the text is very short
    noisy = [[swapped(text, rng) for _ in range(COPIES)] for text in texts]
    ids = [
        model.chat(copy if copy.strip() else text).ids for text, row in zip(texts, noisy, strict=True) for copy in row
    ]
    flat = generate(model.hf, model.tokenizer, ids, length)
    found = []
    for i in range(len(texts)):
        own = flat[i * COPIES : (i + 1) * COPIES]
        refused = [reply for reply in own if is_refusal(reply)]
        kept = [reply for reply in own if not is_refusal(reply)]
        found.append(refused[0] if len(refused) >= len(kept) else kept[0])
    return found


def defences(
    model: Model, direction: Direction, fitted: Fitted, top: Sequence[Head], length: int, seed: int
) -> list[Defence]:
    """The table's lines, each edit with its control: other heads of the same layers, another direction."""
    others = random_heads(top, model.n_heads, direction.layer, seed)
    (vector,) = random_directions(direction.vector, 1, seed)
    elsewhere = Direction(**{**vars(direction), "vector": vector})

    def filtered(model: Model, texts: Sequence[str]) -> list[str]:
        chats = [model.chat(text) for text in texts]
        flagged = (perplexities(model, chats, fitted.harmfulness) > fitted.perplexity).tolist()
        replies = iter(
            generate(model.hf, model.tokenizer, [c.ids for c, f in zip(chats, flagged, strict=True) if not f], length)
        )
        return [REFUSAL if flag else next(replies) for flag in flagged]

    made = [Defence("none")]
    for strength in STRENGTHS:
        made += [
            Defence(f"suffix edges of the top heads damped by {strength:.0%}", partial(damped, model, top, strength)),
            Defence(
                f"edges of other heads damped by {strength:.0%}", partial(damped, model, others, strength), control=True
            ),
        ]
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    made += [
        Defence(f"edges of all heads damped by {STRENGTHS[-1]:.0%}", partial(damped, model, every, STRENGTHS[-1])),
        Defence(
            RESTORED,
            partial(restored, model, direction, fitted.harmfulness, fitted.gap),
        ),
        Defence("projection restored always", partial(restored, model, direction)),
        Defence("random direction set always", partial(restored, model, elsewhere), control=True),
        Defence("perplexity filter", reply=filtered),
        Defence(f"SmoothLLM, {COPIES} copies", reply=lambda m, texts: _smooth(m, texts, length, seed)),
    ]  # fmt: skip
    return made


def measure_mitigations(
    model: Model,
    direction: Direction,
    fitted: Fitted,
    prompts: Sequence[Prompt],
    suffixes: Sequence[Suffix],
    top: Sequence[Head],
    *,
    length: int = 24,
    most: int = 32,
    seed: int = 0,
    on_line: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Attack success, refused look-alikes, cost on harmless replies and time, without and with every defence.

    Report prompts, and adversarial suffixes that nothing was fitted with. ``model`` is in the precision of replies.
    Attack success is the share of harmful prompts with a suffix that are answered by the rule-based verdict (METHODS
    §1); ``refused`` the share that hold a refusal phrase. Where there are no look-alikes, their columns are None.
    """
    assert model.bridge is not None  # before the first line, or it would run a faster model than the others
    kinds = {k: prompts_of(prompts, k, "report", most) for k in ("harmful", "harmless", "lookalike")}
    unseen = halves(suffixes, "adversarial")[1]
    attacked = [(p.text, f"{p.text} {suffix.text}") for suffix in unseen for p in kinds["harmful"]]
    plain = [p.text for p in kinds["harmless"]]
    pairs = reply_pairs(model, kinds["harmless"], length=length)
    plan = defences(model, direction, fitted, top, length, seed)
    rows: list[dict[str, Any]] = []

    def reply(defence: Defence, texts: Sequence[str]) -> list[str]:
        if defence.reply is not None:
            return defence.reply(model, texts)
        return generate(model.hf, model.tokenizer, [model.chat(text).ids for text in texts], length)

    def cells(values: Sequence[bool]) -> Float[ndarray, "prompt suffix"]:
        return np.array(values, dtype=float).reshape(len(unseen), -1).T

    for done, defence in enumerate(plan, 1):
        with defence.context():
            replies = reply(defence, [text for _, text in attacked])
            lookalike = _refused(reply(defence, [p.text for p in kinds["lookalike"]]))
            seconds = float("inf")
            for _ in range(2):  # the better of two, because other work on the machine only ever adds
                started = time.perf_counter()
                harmless = reply(defence, plain)
                seconds = min(seconds, time.perf_counter() - started)
            nats = None if defence.reply is not None else cross_entropy(model.hf, model.tokenizer, pairs)
        n_tokens = sum(len(ids) for ids in model.tokenizer(harmless, add_special_tokens=False).input_ids)
        success = cells([judge(text, told) == "complied" for (text, _), told in zip(attacked, replies, strict=True)])
        won = interval(success, rate=True)
        over: tuple[float | None, ...] = rate_interval(lookalike) if len(lookalike) else (None, None, None)
        rows.append({
            "defence": defence.name, "control": defence.control, "n_prompts": success.shape[0],
            "n_suffixes": success.shape[1], "success": won.estimate, "success_lo": won.lo, "success_hi": won.hi,
            "descriptive": won.descriptive, "refused": float(_refused(replies).mean()),
            **dict(zip(("lookalike", "lookalike_lo", "lookalike_hi"), over, strict=True)),
            "harmless": float(_refused(harmless).mean()), "nats": nats, "seconds_per_token": seconds / max(1, n_tokens),
        })  # fmt: skip
        if on_line is not None:
            on_line(done, len(plan))
    base = rows[0]
    return [
        row | {
            "cost": None if row["nats"] is None else row["nats"] - base["nats"],
            "slower": row["seconds_per_token"] / base["seconds_per_token"] - 1,
        }
        for row in rows
    ]  # fmt: skip


def attack_defences(
    model: Model,
    direction: Direction,
    fitted: Fitted,
    prompts: Sequence[Prompt],
    top: Sequence[Head],
    config: StudyConfig,
    on_step: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Attacks with equal budgets on the model without a defence, with damped edges, and with a restored projection.

    Against the last one the objective also raises the refusal projection, which is what the detector misses in
    attacked prompts (see :func:`suffix_analysis.adaptive.attack_defended`).
    """
    own = [p for p in prompts if p.kind == "harmful" and p.split == "select"]
    tokens = direction.refusal_tokens
    refused = opens_refusal(model, [model.chat(p.text).ids for p in own], tokens)
    train, held_out = split_for_attack(own, config.n_instructions, config.seed, refused.tolist())
    strength, cut = STRENGTHS[-1], fitted.gap
    defended: dict[str, Defended] = {
        "none": lambda behind: contextlib.nullcontext(),
        f"suffix edges of the top heads damped by {strength:.0%}": lambda behind: damped(
            model, top, strength, behind=behind
        ),
        RESTORED: lambda behind: restored(model, direction, fitted.harmfulness, cut, behind=behind),
    }
    evading = Projection(direction.vector, direction.layer, weight=-EVASION / float(direction.vector.norm()))
    return attack_defended(model, train, held_out, tokens, defended, {RESTORED: (evading,)}, config, on_step)


def _refused(replies: Sequence[str]) -> Float[ndarray, " reply"]:
    return np.array([float(is_refusal(reply)) for reply in replies])
