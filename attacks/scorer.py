"""Losses of candidate suffixes: shared prefix, logits at the target only, fast search and exact rescoring."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.config import AttackError, GCGConfig
from attacks.objective import target_loss
from attacks.slot import Slot

LOGIT_BUDGET = 2**27  # logits held at once (512 MB in float32); candidates are scored in batches below it
TOKEN_BUDGET = 8192  # tokens in one forward: larger batches gain nothing on two cores and cost memory


@contextlib.contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Make the vocabulary product see contiguous rows while it runs.

    A bfloat16 product with a non-contiguous slice of hidden states becomes a batched one, about 100× slower.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def prefix_cache(model: Any, ids: Int[Tensor, " before"]) -> Any:
    """Keys and values of the conversation before the suffix (None when nothing stands before it)."""
    if len(ids) == 0:
        return None
    with torch.no_grad():
        out = model(input_ids=ids[None].to(model.device), use_cache=True, logits_to_keep=1)
    return out[cache_argument(model)]


def cache_argument(model: Any) -> str:
    """The forward's name for the key-value cache: transformers renamed ``past_key_values`` to ``cache`` in 5.2x."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def fresh(cache: Any, batch: int) -> Any:
    """A copy of ``cache`` for ``batch`` sequences. A forward appends to the cache it is given, so never share one."""
    if cache is None:
        return None
    copied = copy.deepcopy(cache)
    if batch > 1:
        copied.batch_repeat_interleave(batch)
    return copied


@dataclass
class Scorer:
    """Scores suffixes on every conversation with one model in one precision."""

    model: Any
    slots: Sequence[Slot]
    config: GCGConfig

    def __post_init__(self) -> None:
        keep = self.config.use_prefix_cache
        self.caches = [prefix_cache(self.model, slot.before_ids) if keep else None for slot in self.slots]
        self.batch_size = self.config.batch_size

    def __call__(self, ids: Int[Tensor, "cand suffix"]) -> tuple[Float[Tensor, "cand goal"], Tensor]:
        """Loss of every candidate on every conversation, and whether greedy decoding would give the target.

        Raises:
            AttackError: a loss is not finite (the candidate's conversation is named).
        """
        losses, matched = [], []
        for goal in range(len(self.slots)):
            parts = [self._score(goal, chunk) for chunk in self._chunks(goal, ids)]
            losses.append(torch.cat([loss for loss, _ in parts]))
            matched.append(torch.cat([match for _, match in parts]))
        table = torch.stack(losses, dim=1)
        if not torch.isfinite(table).all():
            goal = int((~torch.isfinite(table)).any(dim=0).nonzero()[0])
            raise AttackError(f"The loss of conversation {goal} is not finite in {self.model.dtype}; try float32.")
        return table, torch.stack(matched, dim=1)

    def _chunks(self, goal: int, ids: Tensor) -> Iterator[Tensor]:
        slot = self.slots[goal]
        length = ids.shape[1] + len(slot.after_ids) + len(slot.target_ids)
        length += 0 if self.config.use_prefix_cache else len(slot.before_ids)
        vocab = self.model.get_output_embeddings().weight.shape[0]
        most = min(LOGIT_BUDGET // (vocab * len(slot.target_ids)), TOKEN_BUDGET // length)
        yield from ids.split(max(1, self.batch_size or most))

    def _score(self, goal: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """One batch on one conversation; halves the batch when memory runs out."""
        try:
            return self._forward(goal, ids)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower() or len(ids) == 1:
                raise
            self.batch_size = max(1, len(ids) // 2)
            halves = [self._score(goal, half) for half in ids.split(self.batch_size)]
            return torch.cat([loss for loss, _ in halves]), torch.cat([match for _, match in halves])

    @torch.no_grad()
    def _forward(self, goal: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        slot, device = self.slots[goal], self.model.device
        n_target = len(slot.target_ids)
        # the last target token predicts nothing that is scored, so it is not run
        tail = torch.cat([slot.after_ids, slot.target_ids[:-1]]).expand(len(ids), -1)
        row = torch.cat([ids, tail], dim=1).to(device)
        cache = fresh(self.caches[goal], len(ids))
        if cache is None:
            row = torch.cat([slot.before_ids.expand(len(ids), -1).to(device), row], dim=1)
        with contiguous_head(self.model):
            out = self.model(
                input_ids=row,
                use_cache=cache is not None,
                logits_to_keep=n_target,
                **{cache_argument(self.model): cache},
            )
        logits = out.logits.float()
        matched = (logits.argmax(-1) == slot.target_ids.to(device)).all(-1)
        return target_loss(logits, slot.target_ids, self.config).cpu(), matched.cpu()


def rescored_best(search: Scorer, exact: Scorer | None, ids: Tensor) -> tuple[int, Tensor, Tensor]:
    """The best candidate's index, its loss per goal and whether each target is matched.

    With ``exact`` given, ``search`` only shortlists ``config.rescore`` candidates and ``exact`` decides.
    """
    losses, matched = search(ids)
    if exact is not None:
        order = losses.mean(dim=1).argsort()[: search.config.rescore]
        losses, matched = exact(ids[order])
        winner = int(losses.mean(dim=1).argmin())
        return int(order[winner]), losses[winner], matched[winner]
    winner = int(losses.mean(dim=1).argmin())
    return winner, losses[winner], matched[winner]
