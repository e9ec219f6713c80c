"""A conversation with a suffix slot: its token ids before, in and after the slot, and the target's.

The suffix is tokenised where it stands (``{optim_str}`` in the conversation), so that what is optimised is what the
model will read. Space before the placeholder belongs to the suffix's first token in most vocabularies; it is kept as
the slot's ``joiner``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attacks.config import AttackError

PLACEHOLDER = "{optim_str}"
Messages = str | list[dict[str, str]]


@dataclass(frozen=True)
class Slot:
    """One conversation, split at the suffix. Texts are the rendered template's; ids are 1-D and on the CPU.

    ``opens_turn``: nothing stands before the suffix in its turn.
    """

    before_text: str
    joiner: str
    after_text: str
    before_ids: Int[Tensor, " before"]
    suffix_ids: Int[Tensor, " suffix"]
    after_ids: Int[Tensor, " after"]
    target_ids: Int[Tensor, " target"]
    opens_turn: bool = False

    @property
    def n_behind(self) -> int:
        """Tokens that run behind the suffix: the last target token predicts nothing that is scored."""
        return len(self.after_ids) + len(self.target_ids) - 1


def turns_of(messages: Messages, *, spaced: bool = False) -> list[dict[str, str]]:
    """The conversation as a new list of turns, with the placeholder in it: at the end where it stands nowhere.

    ``spaced``: behind a space there, so that the suffix's first token does not merge with the last word.

    Raises:
        AttackError: no turn, one without role or content, or not exactly one placeholder.
    """
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else copy.deepcopy(messages)
    if not turns:
        raise AttackError("The conversation is empty; give at least one user turn.")
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise AttackError(f"The turn {str(turn)[:60]} has no role and content; both must be text.")
    if not any(PLACEHOLDER in turn["content"] for turn in turns):
        last = turns[-1]["content"]
        turns[-1]["content"] += (" " if spaced and last and not last[-1].isspace() else "") + PLACEHOLDER
    count = sum(turn["content"].count(PLACEHOLDER) for turn in turns)
    if count != 1:
        raise AttackError(f"The conversation holds {PLACEHOLDER} {count} times; it must stand exactly once.")
    return turns


def render(tokenizer: Any, messages: Messages) -> tuple[str, str]:
    """The rendered conversation before and after the suffix.

    Raises:
        AttackError: no chat template, one that refuses the conversation, or not exactly one placeholder.
    """
    turns = turns_of(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise AttackError("The tokenizer has no chat template; set tokenizer.chat_template or use a chat model.")
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever they like, e.g. for turns that do not alternate
        raise AttackError(f"The chat template refuses the conversation: {str(error).partition(chr(10))[0]}") from error
    if text.count(PLACEHOLDER) != 1:
        raise AttackError(
            f"The chat template writes {PLACEHOLDER} {text.count(PLACEHOLDER)} times instead of once; put it into the "
            "last user turn."
        )
    before, after = text.split(PLACEHOLDER)
    return before, after


def build_slot(tokenizer: Any, messages: Messages, target: str, suffix: str) -> Slot:
    """Tokenise a conversation with ``suffix`` in its slot, in context.

    Raises:
        AttackError: an empty target or suffix, a slow tokenizer, or a suffix whose tokens merge with its neighbours.
    """
    if not isinstance(target, str) or not target.strip():
        raise AttackError(f"The target is empty ({target!r}); give the words that the reply is to begin with.")
    if not suffix.strip():
        raise AttackError(f"The initial suffix is {suffix!r}; give at least one visible token.")
    if not tokenizer.is_fast:
        raise AttackError("The tokenizer is a slow one (no offsets); load it with use_fast=True.")
    turns = turns_of(messages, spaced=True)
    before, after = render(tokenizer, turns)
    stripped = before.rstrip(" ")
    joiner, before = before[len(stripped) :], stripped
    before_ids, suffix_ids, after_ids = split_ids(tokenizer, before, joiner + suffix, after)
    target_ids = torch.tensor(tokenizer(target, add_special_tokens=False).input_ids)
    if not len(target_ids):
        raise AttackError(f"The target {target!r} has no tokens in this vocabulary; give visible words.")
    # some templates strip a turn, so the space in front of an opening suffix goes too
    opens = any(turn["content"].lstrip().startswith(PLACEHOLDER) for turn in turns)
    return Slot(before, joiner, after, before_ids, suffix_ids, after_ids, target_ids, opens)


def split_ids(tokenizer: Any, before: str, suffix: str, after: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of the three parts of ``before + suffix + after``, tokenised as one text; a token belongs where it ends.

    Raises:
        AttackError: the suffix has no tokens of its own, or shares one with the text before or behind it.
    """
    encoded = tokenizer(before + suffix + after, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded.offset_mapping]
    first = sum(end <= len(before) for end in ends)
    last = sum(end <= len(before) + len(suffix) for end in ends)
    ids = torch.tensor(encoded.input_ids)
    if last <= first:
        raise AttackError(f"The suffix {suffix!r} leaves no tokens of its own; choose another initial suffix.")
    parts = ids[:first], ids[first:last], ids[last:]
    start, stop = encoded.offset_mapping[first][0], len(before)
    if start < stop and before[start:stop].strip():
        raise AttackError(
            f"The suffix {suffix!r} merges with the text before it ({before[start:]!r}); put a space before "
            f"{PLACEHOLDER} in the conversation."
        )
    end = len(before) + len(suffix)
    if last < len(ends) and encoded.offset_mapping[last][0] < end and after[: ends[last] - end].strip():
        raise AttackError(
            f"The suffix {suffix!r} merges with the text behind it ({after[: ends[last] - end]!r}); put a space behind "
            f"{PLACEHOLDER} in the conversation."
        )
    return parts


def survives(tokenizer: Any, slots: Sequence[Slot], ids: Int[Tensor, "cand suffix"]) -> Bool[Tensor, " cand"]:
    """Which candidate suffixes re-tokenise to their own ids in every conversation (METHODS §0).

    A candidate must also keep the joiner, and not begin or end its turn with white space, which some templates strip.
    """
    texts = decoded(tokenizer, slots[0], ids)
    keep = torch.ones(len(texts), dtype=torch.bool)
    for slot in slots:
        whole = [slot.before_text + text + slot.after_text for text in texts]
        encoded = tokenizer(whole, add_special_tokens=False).input_ids
        before, after = slot.before_ids.tolist(), slot.after_ids.tolist()
        for i, (row, text) in enumerate(zip(ids.tolist(), texts, strict=True)):
            fits = text.startswith(slot.joiner) and text == (text.strip() if slot.opens_turn else text.rstrip())
            keep[i] &= fits and encoded[i] == before + row + after
    return keep


def suffix_string(tokenizer: Any, slot: Slot, ids: Sequence[int]) -> str:
    """The suffix as a user would type it into the slot: decoded, without the joiner."""
    (text,) = decoded(tokenizer, slot, torch.tensor([list(ids)]))
    return text.removeprefix(slot.joiner)


def decoded(tokenizer: Any, slot: Slot, ids: Int[Tensor, "cand suffix"]) -> list[str]:
    """The texts of suffixes behind the slot's last token: alone, some tokenizers would take their first space away."""
    anchor = slot.before_ids[-1:]
    (start,) = tokenizer.batch_decode(anchor[None], clean_up_tokenization_spaces=False)
    whole = torch.cat([anchor.expand(len(ids), -1), ids.cpu()], dim=1)
    return [text[len(start) :] for text in tokenizer.batch_decode(whole, clean_up_tokenization_spaces=False)]
