"""Losses of candidate suffixes: shared prefix, logits at the target only, fast search and exact rescoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attacks.caches import cache_argument, croppable, fresh, keeps_tokens, prefix_cache
from attacks.candidates import combined
from attacks.config import AttackError, GCGConfig
from attacks.grouping import first_changes, group_by_start, overhead_tokens
from attacks.memory import is_out_of_memory, memory_for, most_candidates, out_of_memory, own_bytes
from attacks.objective import target_loss
from attacks.precision import contiguous_head, or_float32
from attacks.slot import Slot
from attacks.terms import Term, watched

SCOUTS = 4  # candidates that are scored completely before any is dropped
ERROR_MEMORY = 0.9  # share of a seen rounding error that is remembered in the next step


def body_weights(model: Any) -> int:
    """Weights that every token meets: all but the embedding and the head."""
    outside = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside)


@dataclass
class Scorer:
    """Scores suffixes on every conversation with one model in one precision."""

    model: Any
    slots: Sequence[Slot]
    config: GCGConfig
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        self.shares = self.config.use_prefix_cache and keeps_tokens(self.model)
        with memory_for("what stands before the suffix", self.model):
            self.caches = [prefix_cache(self.model, slot.before_ids) if self.shares else None for slot in self.slots]
        self.batch_size = self.config.batch_size
        self.memory = own_bytes(self.model.device)  # once: batches must not depend on the moment
        self.active = len(self.slots)
        self.flops = 0.0
        self.seen_match = False  # of any candidate so far
        self.error: float | None = None  # of this scorer's mean losses, where a more exact one checks them
        self.head_weights = self.model.get_output_embeddings().weight.numel()
        self.body_weights = body_weights(self.model)

    def __call__(
        self,
        ids: Int[Tensor, "cand suffix"],
        current: Int[Tensor, " suffix"] | None = None,
        margin: float | None = None,
        first: int | None = None,
    ) -> tuple[Float[Tensor, "cand goal"], Tensor]:
        """Loss of every candidate on every active conversation, and whether greedy decoding would give the target.

        ``current`` is the suffix that the candidates were drawn from: what they have in common with it runs only once.
        With ``margin``, only candidates whose mean loss is at most the best one's + ``margin`` are sure to be scored
        completely. Others are dropped, with infinite losses, once their sum over some conversations is too large.
        With ``first``, conversations are gone through from that one on, each with the better half of the candidates
        that the one before was scored with; at least as many as are rescored or merged are scored completely.

        Raises:
            AttackError: a loss is not finite (the candidate's conversation is named).
        """
        table = torch.full((len(ids), self.active), float("inf"))
        matched = torch.zeros(len(ids), self.active, dtype=torch.bool)
        sums = torch.zeros(len(ids))

        def fill(rows: Tensor, goal: int) -> None:
            if not len(rows):
                return
            table[rows, goal], matched[rows, goal] = self._goal(goal, ids[rows], current)
            sums[rows] += table[rows, goal]
            if not torch.isfinite(sums).all():
                raise AttackError(
                    f"The loss of conversation {goal} is not finite ({float(sums[~sums.isfinite()][0])}) in "
                    f"{self.model.dtype}; {or_float32(self.model, 'what is added to the loss')}."
                )

        rest, bound = torch.arange(len(ids)), float("inf")
        order = [((first or 0) + i) % self.active for i in range(self.active)]
        for n_done, goal in enumerate(order):
            if not len(rest):
                break  # all but the scouts, which are complete, have been dropped
            if first is not None and n_done:
                n_kept = max(self.config.rescore, self.config.merge, math.ceil(len(rest) / 2))
                rest = rest[sums[rest].argsort()[:n_kept]]
            # complete a few once it is likely that others then need not be
            likely = n_done and float(sums[rest].max()) > float(sums[rest].min()) * self.active / n_done
            if margin is not None and self._droppable and bound == float("inf") and likely:
                scouts, rest = rest[sums[rest].argsort()].tensor_split([SCOUTS])
                for other in order[n_done:]:
                    fill(scouts, other)
                bound = float(sums[scouts].min()) + margin * self.active
            rest = rest[sums[rest] <= bound]
            fill(rest, goal)
        self.seen_match |= bool(matched.all(dim=1).any())
        return table, matched

    @property
    def _droppable(self) -> bool:
        """Whether every part of a sum is at least 0: true of cross-entropy alone."""
        return self.active > 1 and not self.config.use_mellowmax and not self.terms

    def forward_flops(self, n_tokens: int, n_logits: int) -> float:
        """Floating-point operations of a forward over ``n_tokens`` with ``n_logits`` rows of logits."""
        return 2.0 * (self.body_weights * n_tokens + self.head_weights * n_logits)

    def _goal(self, goal: int, ids: Tensor, current: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses and matches of all candidates on one conversation, group by group and batch by batch."""
        slot, n_suffix = self.slots[goal], ids.shape[1]
        groups: list[tuple[int, list[int]]] = [(0, list(range(len(ids))))]
        cache, held = self.caches[goal], 0
        if current is not None and croppable(cache, n_suffix):
            overhead = overhead_tokens(self.model.dtype)
            groups = group_by_start(first_changes(ids, current), n_suffix, slot.n_behind, overhead)
            held = groups[-1][0]
            with memory_for("what candidates have in common", self.model):
                cache = prefix_cache(self.model, current[:held], cache)
            self.flops += self.forward_flops(held, min(held, 1))
        losses = torch.empty(len(ids))
        matched = torch.empty(len(ids), dtype=torch.bool)
        for start, members in groups:
            for chunk in self._chunks(goal, torch.tensor(members), n_suffix - start):
                losses[chunk], matched[chunk] = self._score(goal, ids[chunk, start:], cache, held - start)
        return losses, matched

    def _chunks(self, goal: int, members: Tensor, n_run: int) -> Iterator[Tensor]:
        yield from members.split(self.batch_size or self.most(goal, n_run))

    def most(self, goal: int, n_run: int) -> int:
        """Candidates in one forward that runs the last ``n_run`` of the suffix's tokens."""
        slot = self.slots[goal]
        n_target, n_before = len(slot.target_ids), len(slot.before_ids)
        length = n_run + len(slot.after_ids) + n_target
        total = n_before + len(slot.suffix_ids) + len(slot.after_ids) + n_target
        length += 0 if self.shares else n_before
        return most_candidates(self.model, length, total, n_target, self.memory)

    def _score(self, goal: int, ids: Tensor, cache: Any, drop: int) -> tuple[Tensor, Tensor]:
        """One batch on one conversation; halves the batch when memory runs out."""
        try:
            return self._forward(goal, ids, cache, drop)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(ids) == 1:
                raise out_of_memory("one candidate", self.model) from error
        # out here, because a caught error keeps alive what the failed forward had allocated
        self.batch_size = max(1, len(ids) // 2)
        halves = [self._score(goal, half, cache, drop) for half in ids.split(self.batch_size)]
        return torch.cat([loss for loss, _ in halves]), torch.cat([match for _, match in halves])

    @torch.no_grad()
    def _forward(self, goal: int, ids: Tensor, cache: Any, drop: int) -> tuple[Tensor, Tensor]:
        slot, device = self.slots[goal], self.model.device
        n_target = len(slot.target_ids)
        # the last target token predicts nothing that is scored, so it is not run
        tail = torch.cat([slot.after_ids, slot.target_ids[:-1]]).expand(len(ids), -1)
        row = torch.cat([ids, tail], dim=1).to(device)
        if cache is None and not self.shares:
            row = torch.cat([slot.before_ids.expand(len(ids), -1).to(device), row], dim=1)
        self.flops += self.forward_flops(row.numel(), len(ids) * n_target)
        with contiguous_head(self.model), watched(self.terms, self.model, slot) as read:
            out = self.model(
                input_ids=row,
                use_cache=cache is not None,
                logits_to_keep=n_target,
                **{cache_argument(self.model): fresh(cache, len(ids), drop)},
            )
        logits = out.logits.float()
        matched = (logits.argmax(-1) == slot.target_ids.to(device)).all(-1)
        return (target_loss(logits, slot.target_ids, self.config) + read()).cpu(), matched.cpu()


@dataclass(frozen=True)
class Winner:
    """What a step takes: the suffix, its loss per goal and whether targets are matched; how many were scored, and how
    many combinations of candidates were refused."""

    ids: Int[Tensor, " suffix"]
    per_goal: Float[Tensor, " goal"]
    matched: Bool[Tensor, " goal"]
    n_scored: int
    n_refused: int


def rescored_best(
    search: Scorer,
    exact: Scorer | None,
    ids: Int[Tensor, "cand suffix"],
    current: Int[Tensor, " suffix"] | None = None,
    first: int | None = None,
    keep: Callable[[Tensor], Bool[Tensor, " cand"]] | None = None,
) -> Winner:
    """The best of the candidates ``ids``, which were drawn from ``current``.

    With ``exact`` given, ``search`` only shortlists and ``exact`` decides: at most ``config.rescore`` candidates, and
    of those only the ones that the search's error, as seen so far, could have kept from winning. ``first`` halves the
    candidates from conversation to conversation (see `Scorer`). With ``config.merge``, combinations of the
    leaders that ``keep`` accepts take part too; then no candidate is dropped, because any may be among the leaders.
    """
    merge, refused = search.config.merge > 1 and current is not None, 0
    margin = 0.0 if exact is None else None if search.error is None else 2 * search.error
    losses, matched = search(ids, current, None if merge else margin, first)
    if merge:
        assert current is not None
        means = losses.mean(dim=1)
        ranked = means.argsort()[: int(means.isfinite().sum())]  # what was left out has no loss
        more = combined(ids[ranked], current, search.config.merge)
        more = more[
            ~(more[:, None] == ids).all(dim=2).any(dim=1)
        ]  # where several are replaced, some stand there already
        fits = torch.ones(len(more), dtype=torch.bool) if keep is None or not len(more) else keep(more)
        more, refused = more[fits], int((~fits).sum())
        if len(more):
            found = search(more, current)
            ids = torch.cat([ids, more])
            losses, matched = torch.cat([losses, found[0]]), torch.cat([matched, found[1]])
    means = losses.mean(dim=1)
    if exact is None:
        best = int(means.argmin())
        return Winner(ids[best], losses[best], matched[best], len(ids), refused)
    order = means.argsort()[: search.config.rescore]
    if search.error is not None:
        order = order[means[order] <= means[order[0]] + 2 * search.error]
    losses, matched = exact(ids[order], current, 0.0)
    errors = (losses.mean(dim=1) - means[order]).abs()
    seen = float(errors[errors.isfinite()].max())
    # the largest error seen, slowly forgotten: losses and their rounding shrink as the attack goes on
    search.error = seen if search.error is None else max(seen, ERROR_MEMORY * search.error)
    best = int(losses.mean(dim=1).argmin())
    return Winner(ids[order[best]], losses[best], matched[best], len(ids), refused)
