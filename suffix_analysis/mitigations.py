"""What mitigations do to attacks, and what they cost: the tables ``mitigations`` and ``adaptive`` (METHODS §6)."""

from __future__ import annotations

import contextlib
import random
import statistics
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from suffix_analysis.adaptive import Defended, Detected, Trial, attack_defended
from suffix_analysis.attacking import split_for_attack
from suffix_analysis.causal import Head
from suffix_analysis.causal_tests import random_heads
from suffix_analysis.chat import Chat
from suffix_analysis.config import StudyConfig
from suffix_analysis.defences import Firings, damped, restored
from suffix_analysis.detection import Fitted, parts_of
from suffix_analysis.detectors import gaps, perplexities
from suffix_analysis.directions import Direction
from suffix_analysis.generate import endless, generate
from suffix_analysis.interventions import random_directions
from suffix_analysis.judges import Judge, is_refusal
from suffix_analysis.judges import judge as rules
from suffix_analysis.models import Model
from suffix_analysis.paper_table import nats_change, nats_of_each, reply_pairs
from suffix_analysis.prompts import KINDS, Prompt, prompts_of
from suffix_analysis.records import Suffix
from suffix_analysis.refusal import refused
from suffix_analysis.stats import interval, rate_change, rate_interval

COPIES, SWAPPED = 10, 0.1  # SmoothLLM: noisy copies of a prompt, and the share of characters that are swapped in each
REFUSAL = "I cannot help with that request."  # what a filter answers
STRENGTHS = (0.5, 0.9)
DRAWS = 3  # sets of other heads whose edges are damped as a control
TIMED, ROUNDS = 8, 5  # harmless prompts whose replies are timed, and how often, all lines in turn
RESTORED = "projection restored where the detector fires"
EVASION, MARGIN = 2.0, 0.2  # the detector's excess above its threshold less a margin, beside the target's loss
Context = contextlib.AbstractContextManager[None]
Reply = Callable[[Model, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Defence:
    """One line of the table: an edit while the model runs, or another way to get from the user's texts to replies.

    ``wrapped``: it needs TransformerLens's hooks, which take time by themselves. ``mass``: of damped edges, the mean
    share of chat[-1]'s attention to attacked prompts that they held; ``taken``: what of it an edit of edges takes.
    ``fired``: is told of every prompt whether the detector fires that an edit waits for, or the filter, if it is one.
    """

    name: str
    context: Callable[[], Context] = contextlib.nullcontext
    reply: Reply | None = None
    control: bool = False
    wrapped: bool = False
    mass: float | None = None
    taken: float | None = None
    fired: Firings = field(default_factory=Firings)


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


def defences(model: Model, direction: Direction, fitted: Fitted, n_heads: int, length: int, seed: int) -> list[Defence]:
    """The table's lines, each edit with its control: edges of other heads, the same steps along another direction."""
    top = fitted.strongest(n_heads)
    (elsewhere,) = random_directions(direction.vector, 1, seed)

    def filtering(name: str, score: Callable[[Model, Sequence[Chat]], Float[Tensor, " chat"]], cut: float) -> Defence:
        """Prompts that score above ``cut`` get a fixed refusal."""
        fired = Firings()

        def reply(model: Model, texts: Sequence[str]) -> list[str]:
            chats = [model.chat(text) for text in texts]
            above = score(model, chats) > cut
            fired(above)
            flags = above.tolist()
            left = [chat.ids for chat, flag in zip(chats, flags, strict=True) if not flag]
            replies = iter(generate(model.hf, model.tokenizer, left, length))
            return [REFUSAL if flag else next(replies) for flag in flags]

        return Defence(name, reply=reply, fired=fired)

    def told_apart(model: Model, chats: Sequence[Chat]) -> Float[Tensor, " chat"]:
        return gaps(model, direction, fitted.harmfulness, chats)

    def unlikely(model: Model, chats: Sequence[Chat]) -> Float[Tensor, " chat"]:
        return perplexities(model, chats, fitted.harmfulness)

    def restore(name: str, gated: bool, along: Tensor | None = None) -> Defence:
        gate = (fitted.harmfulness, fitted.gap) if gated else (None, 0.0)
        fired = Firings()
        context = partial(restored, model, direction, fitted.levels, *gate, along=along, fired=fired)
        return Defence(name, context, control=along is not None, fired=fired)

    def edges(
        name: str, heads: Sequence[Head], strength: float, *, control: bool = False, before: bool = False
    ) -> Defence:
        held = None if before else float(torch.stack([fitted.attention[head] for head in heads]).mean())
        context = partial(damped, model, heads, strength, fitted.tail, before=before)
        taken = fitted.taken(heads, strength, before)
        return Defence(name, context, control=control, wrapped=True, mass=held, taken=taken)

    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    most = STRENGTHS[-1]
    drawn = [random_heads(top, model.n_heads, model.n_layers, seed + draw) for draw in range(DRAWS)]
    random_sets = [*{frozenset(heads): heads for heads in drawn}.values()]  # a small model has few others
    return [
        Defence("none"),
        *(edges(damping(strength, fitted.tail), top, strength) for strength in STRENGTHS),
        edges("at most as much taken from the tokens before them", top, most, control=True, before=True),
        *(
            edges(f"{len(heads)} other heads' edges damped by {most:.0%} ({i})", heads, most, control=True)
            for i, heads in enumerate(random_sets, 1)
            if heads
        ),
        edges(f"all heads' edges damped by {most:.0%}", every, most),
        restore(RESTORED, gated=True),
        restore("the same steps along a random direction, where it fires", True, elsewhere),
        restore("projection restored always", gated=False),
        restore("the same steps along a random direction, always", False, elsewhere),
        filtering("refused where the detector fires", told_apart, fitted.gap),
        filtering("perplexity filter", unlikely, fitted.perplexity),
        Defence(f"SmoothLLM, {COPIES} copies", reply=lambda m, texts: _smooth(m, texts, length, seed)),
    ]


def damping(strength: float, tail: int) -> str:
    """The name of the line whose strongest edges are damped so much."""
    return f"strongest edges to the text's last {tail} tokens damped by {strength:.0%}"


def measure_mitigations(
    model: Model,
    direction: Direction,
    fitted: Fitted,
    prompts: Sequence[Prompt],
    suffixes: Sequence[Suffix],
    *,
    n_heads: int = 8,
    length: int = 24,
    most: int = 32,
    judge: Judge = rules,
    seed: int = 0,
    on_line: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Attack success, refused look-alikes, cost on harmless replies and time, without and with every defence.

    Report prompts, adversarial suffixes that nothing was fitted with, and all look-alikes. ``model`` is in the
    precision of replies. Attack success is the share of harmful prompts with a suffix that are answered, by
    ``judge`` (METHODS §1); ``refused`` the share that hold a refusal phrase. Changes are against no defence,
    paired by prompt and suffix. Where there are no look-alikes, their columns are None. ``seconds`` a token of replies
    that all have the same length, ``n_timed`` of them at once, ``slower`` beside the model as it was loaded, or as
    TransformerLens has wrapped it, where another stage has had that done (``wrapped``). ``mass`` and ``taken``: see
    `Defence`. ``fires_attacked``, ``fires_lookalike`` and ``fires_harmless``: in which share of the prompts the
    detector fires that an edit waits for, or the filter.
    """
    unseen = parts_of(suffixes, "adversarial")[1]
    kinds = {k: prompts_of(prompts, k, "report", None if k == "lookalike" else most) for k in (*KINDS, "lookalike")}
    attacked = [(p.text, f"{p.text} {suffix.text}") for suffix in unseen for p in kinds["harmful"]]
    plain = [p.text for p in kinds["harmless"]]
    asked = {
        "attacked": [text for _, text in attacked],
        "lookalike": [p.text for p in kinds["lookalike"]],
        "harmless": plain,
    }
    pairs = reply_pairs(model, kinds["harmless"], length=length)
    plan = defences(model, direction, fitted, n_heads, length, seed)
    wrapped = "bridge" in model.__dict__
    seconds = _times(model, plan, plain[:TIMED], length)
    rows: list[dict[str, Any]] = []
    base: dict[str, Any] = {}

    def cells(values: Sequence[bool]) -> Float[ndarray, "prompt suffix"]:
        return np.array(values, dtype=float).reshape(len(unseen), -1).T

    for done, defence in enumerate(plan, 1):
        replies: dict[str, list[str]] = {}
        fires: dict[str, float | None] = {}
        with defence.context():
            for kind, texts in asked.items():
                defence.fired.take()  # what other prompts have left
                replies[kind] = _reply(model, defence, texts, length)
                fires[f"fires_{kind}"] = defence.fired.take()
            measured = defence.reply is None and len(pairs) > 0
            nats = nats_of_each(model.hf, model.tokenizer, pairs) if measured else None
        told = zip(attacked, replies["attacked"], strict=True)
        lookalike = _refused(replies["lookalike"])[:, None]
        success = cells([judge(text, reply) == "complied" for (text, _), reply in told])
        base = base or {"success": success, "lookalike": lookalike, "nats": nats}
        won, fewer = interval(success, rate=True), rate_change(success, base["success"])
        nothing: tuple[float | None, ...] = (None, None, None)
        over = more = nothing
        if len(lookalike):
            over, more = rate_interval(lookalike[:, 0]), rate_change(lookalike, base["lookalike"])
        cost = nothing if nats is None else nats_change(base["nats"], nats)
        row: dict[str, Any] = {
            "defence": defence.name, "control": defence.control, "n_prompts": success.shape[0],
            "n_suffixes": success.shape[1], "success": won.estimate, "success_lo": won.lo, "success_hi": won.hi,
            "descriptive": won.descriptive, "refused": float(_refused(replies["attacked"]).mean()),
            "harmless": float(_refused(replies["harmless"]).mean()), "seconds": seconds[defence.name],
            "mass": defence.mass, "taken": defence.taken, "slower": seconds[defence.name] / seconds[plan[0].name] - 1,
            "n_timed": len(plain[:TIMED]), "wrapped": wrapped, **fires,
        }  # fmt: skip
        named = {"success_change": fewer, "lookalike": over, "lookalike_change": more, "cost": cost}
        for name, values in named.items():
            row |= dict(zip((name, f"{name}_lo", f"{name}_hi"), values, strict=True))
        rows.append(row)
        if on_line is not None:
            on_line(done, len(plan))
    return rows


def _reply(model: Model, defence: Defence, texts: Sequence[str], length: int) -> list[str]:
    if defence.reply is not None:
        return defence.reply(model, texts)
    return generate(model.hf, model.tokenizer, [model.chat(text).ids for text in texts], length)


def _times(model: Model, plan: Sequence[Defence], texts: Sequence[str], length: int) -> dict[str, float]:
    """Seconds a token of replies of ``length`` tokens each: all lines in turn, every round from another one on.

    A line is compared with none in the same round, because a machine is not equally fast all the time.
    """

    def seconds(defence: Defence) -> float:
        with endless(model.hf), defence.context():
            started = time.perf_counter()
            replies = _reply(model, defence, texts, length)
            took = time.perf_counter() - started
            made = sum(reply != REFUSAL for reply in replies)  # a filter answers without the model
            return took / (max(1, made) * length)

    none, found = plan[0], dict[str, float]()
    for wrapped in (False, True):  # wrapping cannot be undone
        lines = [none, *(defence for defence in plan[1:] if defence.wrapped == wrapped)]
        if wrapped:
            assert model.bridge is not None
        seconds(none)  # the first forward allocates
        rounds = []
        for first in range(ROUNDS):
            turn = [lines[(i + first) % len(lines)] for i in range(len(lines))]
            rounds.append({line.name: seconds(line) for line in turn})
        base = statistics.median(own[none.name] for own in rounds)
        for line in lines[1:] if wrapped else lines:
            found[line.name] = base * statistics.median(own[line.name] / own[none.name] for own in rounds)
    return found


def adaptive_split(
    model: Model, direction: Direction, prompts: Sequence[Prompt], config: StudyConfig
) -> tuple[list[Prompt], list[Prompt]]:
    """The select prompts that adaptive attacks train on, and those that they are looked at with.

    Raises:
        UserError: there are too few.
    """
    own = [p for p in prompts if p.kind == "harmful" and p.split == "select"]
    flags = refused(model, own, direction.refusal_tokens).tolist()
    return split_for_attack(own, config.n_instructions, config.seed, flags)


def attack_defences(
    model: Model,
    direction: Direction,
    fitted: Fitted,
    prompts: Sequence[Prompt],
    config: StudyConfig,
    split: tuple[Sequence[Prompt], Sequence[Prompt]],
    on_step: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Attacks with equal budgets on the model without a defence, with damped edges, and with a restored projection.

    Against the last one the objective also holds the detector's score,
    as far as it lies above its threshold (see `suffix_analysis.adaptive.attack_defended`). ``split``: select
    prompts to train on, and others to look at (see `adaptive_split`).
    """
    train, held_out = split
    strength, cut, top, tail = STRENGTHS[-1], fitted.gap, fitted.strongest(config.n_top_heads), fitted.tail
    fired = Firings()
    defended: dict[str, Defended] = {
        "none": lambda behind: contextlib.nullcontext(),
        damping(strength, tail): lambda behind: damped(model, top, strength, tail, behind=behind),
        RESTORED: lambda behind: restored(
            model, direction, fitted.levels, fitted.harmfulness, cut, behind=behind, fired=fired
        ),
    }
    example = model.chat("x")
    evading = Detected(
        direction, fitted.harmfulness, cut - MARGIN, int(example.regions["instruction"].nonzero()[0]), EVASION
    )
    unseen = prompts_of(prompts, "harmful", "report", config.n_traced)
    trial = Trial(train, held_out, direction.refusal_tokens, config, unseen)
    return attack_defended(model, trial, defended, {RESTORED: (evading,)}, on_step, {RESTORED: fired})


def _refused(replies: Sequence[str]) -> Float[ndarray, " reply"]:
    return np.array([float(is_refusal(reply)) for reply in replies])
