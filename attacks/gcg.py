"""The GCG loop (Zou et al. 2023, algorithm 1 and 2): one suffix for one conversation, or for several at once."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attacks import checkpoint
from attacks.candidates import compat_gradient, draw, forbidden_ids, token_gradient
from attacks.config import AttackError, GCGConfig, GCGResult, Step, resolve_dtype
from attacks.controls import random_suffixes
from attacks.inputs import Conversations, check_config, check_inits, check_model, check_slots, pair_up
from attacks.memory import memory_for
from attacks.nanogcg import INIT_CHARS, compat_slot, isolated_survives, with_template
from attacks.precision import copied
from attacks.scorer import Scorer, rescored_best
from attacks.slot import Messages, Slot, build_slot, split_ids, suffix_string, survives, turns_of
from attacks.terms import Term

Entry = tuple[float, tuple[int, ...]]


class GCG:
    """One attack in progress. ``steps()`` yields a `Step` at a time; the caller decides when to stop.

    No global state is touched: sampling uses a generator of its own. ``state()`` after any step and ``restore()`` on a
    new object with the same arguments continue the attack as if it had not stopped.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        messages: Conversations,
        target: str | list[str],
        config: GCGConfig,
        terms: Sequence[Term] = (),
    ) -> None:
        """Tokenise the conversations, cache their prefixes and score the initial suffix.

        ``terms`` are added to the target's loss (see `attacks.terms`).

        Raises:
            AttackError: bad input (see `attacks.slot.build_slot`), or several conversations in compat mode.
        """
        check_config(config)
        check_model(model)
        tokenizer = with_template(tokenizer) if config.compat else tokenizer
        self.tokenizer, self.config, self.terms = tokenizer, config, tuple(terms)
        conversations, targets = pair_up(messages, target)
        self.conversations: list[Messages] = []
        self.generator = torch.Generator()
        self.generator.manual_seed(config.seed) if config.seed is not None else self.generator.seed()
        inits = [config.optim_str_init] if isinstance(config.optim_str_init, str) else list(config.optim_str_init)
        build = compat_slot if config.compat else build_slot
        if config.compat and self.terms:
            raise AttackError("nanoGCG knows no further terms; leave compat mode to use them.")
        if config.compat and len(conversations) > 1:
            raise AttackError("nanoGCG knows one conversation at a time; leave compat mode for a universal suffix.")
        lead = " " if config.add_space_before_target else ""
        self.slots: list[Slot] = []
        for i, (talk, aim) in enumerate(zip(conversations, targets, strict=True)):
            try:
                self.slots.append(build(tokenizer, talk, lead + aim, inits[0]))
                # nanoGCG puts the suffix right behind the last turn
                self.conversations.append(talk if config.compat else turns_of(talk, spaced=True))
            except AttackError as error:
                if len(conversations) == 1:
                    raise
                raise AttackError(f"Conversation {i}: {error}") from error
        check_slots(self.slots, model, config)
        self.model = model
        self._score_in(resolve_dtype(config.score_dtype, model))
        self.forbidden = forbidden_ids(
            tokenizer,
            model.get_input_embeddings().weight.shape[0],
            allow_non_ascii=config.allow_non_ascii,
            compat=config.compat,
        )
        # nanoGCG's top-k may reach into the forbidden ones
        allowed = model.get_input_embeddings().weight.shape[0] - (0 if config.compat else len(self.forbidden))
        if config.topk > allowed:
            raise AttackError(f"topk is {config.topk}, but only {allowed} tokens are allowed; lower topk.")
        self.step, self.stopped = 0, False
        self._activate(1 if config.progressive_goals else len(self.slots))
        self.velocity: Tensor | None = None
        self.best_step = 0
        self.best: tuple[float, tuple[int, ...], str] = (float("inf"), (), "")
        self.buffer: list[Entry] = self._initial_buffer(inits)

    def _activate(self, n_goals: int) -> None:
        for scorer in self._both:
            scorer.active = n_goals

    def _score_in(self, dtype: torch.dtype) -> None:
        """Search in ``dtype``; where the model's own precision is another, a copy shortlists and the model decides."""
        model, own = self.model, next(self.model.parameters()).dtype
        twin = model
        if dtype != own:
            with memory_for(f"a copy of the model in {dtype}", model):
                twin = copied(model, dtype)
        self.search = Scorer(twin, self.slots, self.config, self.terms)
        self.exact = None if dtype == own else Scorer(model, self.slots, self.config, self.terms)
        self._both = [scorer for scorer in (self.search, self.exact) if scorer is not None]

    def _initial_buffer(self, inits: list[str]) -> list[Entry]:
        first, size, compat = self.slots[0].suffix_ids, self.config.buffer_size, self.config.compat
        rows = [first] if len(inits) == 1 else [build_init(self.tokenizer, self.slots[0], t, compat) for t in inits]
        if len({len(row) for row in rows}) > 1:
            raise AttackError(f"The initial suffixes have {[len(row) for row in rows]} tokens; give equal lengths.")
        if not compat and self.config.filter_ids:
            check_inits(self.tokenizer, self.slots, rows, inits)
        ids = torch.stack(rows)
        if size > 1 and len(inits) == 1 and not compat:
            seed = int(torch.randint(2**31, (1,), generator=self.generator))
            n_rows = self.model.get_input_embeddings().weight.shape[0]
            more = random_suffixes(self.tokenizer, self.slots, size - 1, len(first), seed, n_rows)
            ids = torch.cat([ids, torch.tensor([row for _, row in more])])
        elif size > 1 and len(inits) == 1:
            chars = torch.tensor(self.tokenizer(INIT_CHARS, add_special_tokens=False).input_ids).squeeze()
            picks = torch.randint(0, chars.shape[0], (size - 1, len(first)), generator=self.generator)
            ids = torch.cat([ids, chars[picks]])
        losses, _ = (self.exact or self.search)(ids)
        means = losses.mean(dim=1).tolist()
        entries: list[Entry] = [(loss, tuple(row)) for loss, row in zip(means, ids.tolist(), strict=True)]
        if not compat:
            return sorted(entries, key=lambda pair: pair[0])[: max(1, size)]
        buffer: list[Entry] = []
        for entry in entries:  # nanoGCG without a buffer begins with the last one, whatever its loss
            buffer = _push(buffer, size, entry)
        return buffer

    def steps(self) -> Iterator[Step]:
        """Run step after step until ``num_steps``, or a matched target where ``early_stop`` is set."""
        while self.step < self.config.num_steps and not self.stopped:
            done = self._advance()
            self.stopped = done.matched and self.config.early_stop
            yield done

    def _advance(self) -> Step:
        started, flops = time.perf_counter(), self._flops()
        ids = torch.tensor(self.buffer[0][1])
        gradient = self._gradient(ids)
        plan = at_step(self.config, self.step)
        keep = self._keep()
        candidates, rejected = draw(ids, gradient, self.forbidden, plan, self.generator, keep)
        first = self.step % self.search.active if self.config.halving else None
        won = rescored_best(self.search, self.exact, candidates, ids, first, keep)
        rejected += won.n_refused
        loss, chosen = float(won.per_goal.mean()), tuple(won.ids.tolist())
        if self.config.buffer_size == 0 or loss < self.buffer[-1][0]:
            self.buffer = _push(self.buffer, self.config.buffer_size, (loss, chosen))
        # nanoGCG reports the buffer's best string beside this step's loss, whether or not they belong together
        told = self.buffer[0][1] if self.config.compat else chosen
        string = self._string(told)
        self.step += 1
        if loss < self.best[0]:
            self.best, self.best_step = (loss, told, string), self.step
        done = Step(
            step=self.step,
            loss=loss,
            best_loss=self.best[0],
            ids=told,
            string=string,
            best_string=self.best[2],
            best_ids=self.best[1],
            per_goal=tuple(won.per_goal.tolist()),
            n_candidates=won.n_scored,
            n_rejected=rejected,
            seconds=time.perf_counter() - started,
            flops=self._flops() - flops,
            # nanoGCG stops at a match of any candidate, also one that it does not take
            matched=any(scorer.seen_match for scorer in self._both)
            if self.config.compat
            else bool(won.matched.all()) and self.search.active == len(self.slots),
        )
        if bool(won.matched.all()) and self.search.active < len(self.slots):
            self._take_in_a_goal()
        elif self.config.patience is not None and self.step - self.best_step >= self.config.patience:
            self.buffer, self.best_step = [(self.best[0], self.best[1])], self.step
        return done

    def _take_in_a_goal(self) -> None:
        """One more conversation; losses over fewer of them are not comparable, so what is held is scored again."""
        self._activate(self.search.active + 1)
        ids = torch.tensor([ids for _, ids in self.buffer])
        losses = (self.exact or self.search)(ids)[0].mean(dim=1).tolist()
        self.buffer = sorted(zip(losses, (ids for _, ids in self.buffer), strict=True), key=lambda pair: pair[0])
        loss, best = self.buffer[0]
        self.best, self.best_step = (loss, best, self._string(best)), self.step

    def _flops(self) -> float:
        return sum(scorer.flops for scorer in self._both)

    def _gradient(self, ids: Tensor) -> Tensor:
        with memory_for("the gradient on the suffix", self.model):
            return self._compat_gradient(ids) if self.config.compat else self._own_gradient(ids)

    def _compat_gradient(self, ids: Tensor) -> Tensor:
        slot = self.slots[0]
        n_run = len(slot.before_ids) + len(ids) + len(slot.after_ids) + len(slot.target_ids)
        self.search.flops += 3 * self.search.forward_flops(n_run, n_run)  # the backward costs two more
        return compat_gradient(self.model, slot, ids, self.config)

    def _own_gradient(self, ids: Tensor) -> Tensor:
        # the search precision is good enough to rank tokens, and the scorer already holds its prefixes
        active = slice(self.search.active)
        slots, caches = self.slots[active], self.search.caches[active]
        gradient = token_gradient(self.search.model, slots, caches, ids, self.config, self.terms)
        for slot, cache in zip(slots, caches, strict=True):
            n_run = len(ids) + slot.n_behind + (0 if cache else len(slot.before_ids))
            self.search.flops += 3 * self.search.forward_flops(n_run, len(slot.target_ids))
        if self.config.momentum:
            if self.velocity is not None:
                gradient = gradient + self.config.momentum * self.velocity
            self.velocity = gradient
        return gradient

    def _keep(self) -> Any:
        if not self.config.filter_ids:
            return None
        if self.config.compat:
            return lambda rows: isolated_survives(self.tokenizer, rows)
        return lambda rows: survives(self.tokenizer, self.slots, rows)

    def _string(self, ids: tuple[int, ...]) -> str:
        if self.config.compat:
            return str(self.tokenizer.decode(list(ids)))
        return suffix_string(self.tokenizer, self.slots[0], ids)

    @functools.cached_property
    def digest(self) -> dict[str, str]:
        """What tells this attack from another; once, because it reads all weights and a state is saved every step."""
        return checkpoint.digest(self)

    def state(self) -> dict[str, Any]:
        """Everything that ``restore`` needs, as plain JSON: step, buffer, best and the generator's state."""
        return checkpoint.save(self)

    def restore(self, state: Any) -> None:
        """Continue from ``state``.

        Raises:
            AttackError: the state is damaged, or was written while searching in another precision.
        """
        checkpoint.restore(self, state)


def at_step(config: GCGConfig, step: int) -> GCGConfig:
    """The settings of ``step`` (from 0): what has a start value goes from there to its own until half of the steps."""
    left = max(0.0, 1 - step / max(1, config.num_steps / 2))

    def now(start: int | None, end: int) -> int:
        return end if start is None else round(end + left * (start - end))

    return replace(
        config,
        n_replace=now(config.n_replace_start, config.n_replace),
        search_width=now(config.search_width_start, config.search_width),
    )


def build_init(tokenizer: Any, slot: Slot, text: str, compat: bool) -> Tensor:
    """Ids of another initial suffix in ``slot``'s place; alone in compat mode."""
    if compat:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return split_ids(tokenizer, slot.before_text, slot.joiner + text, slot.after_text)[1]


def _push(buffer: list[Entry], size: int, entry: Entry) -> list[Entry]:
    """The buffer with ``entry`` in it: the only one (size 0), one more, or in place of the worst; best first."""
    if size == 0:
        return [entry]
    kept = buffer if len(buffer) < size else buffer[:-1]
    return sorted([*kept, entry], key=lambda pair: pair[0])


def result(steps: list[Step]) -> GCGResult:
    """The attack's result from its steps: the best is the lowest loss over all goals that took part at last.

    Raises:
        AttackError: there are no steps.
    """
    if not steps:
        raise AttackError("The attack made no step; num_steps must be at least 1.")
    last = steps[-1]
    return GCGResult(
        best_loss=last.best_loss,
        best_string=last.best_string,
        losses=[step.loss for step in steps],
        strings=[step.string for step in steps],
        best_ids=last.best_ids,
        steps=tuple(steps),
    )


def run(
    model: Any,
    tokenizer: Any,
    messages: Conversations,
    target: str | list[str],
    config: GCGConfig | None = None,
    *,
    terms: Sequence[Term] = (),
) -> GCGResult:
    """Optimise one suffix; nanoGCG's four-argument call.

    Args:
        model: a Hugging Face causal language model; its precision decides, ``config.score_dtype`` only searches.
        tokenizer: its fast tokenizer, with a chat template.
        messages: an instruction, a list of turns, or a list of either for one universal suffix. ``{optim_str}`` marks
            the suffix's place, by default the end of the last turn.
        target: the words that the reply should begin with; one for all conversations or one for each.
        config: settings; nanoGCG's defaults if left out.
        terms: further terms of the objective (see `attacks.terms`).

    Raises:
        AttackError: bad input, named with its value.
    """
    attack = GCG(model, tokenizer, messages, target, config or GCGConfig(), terms)
    return result(list(attack.steps()))
