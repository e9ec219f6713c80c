"""Rendered chat conversations with a suffix slot, tokenised once, every token in exactly one region (METHODS §0)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from suffix_analysis.errors import UserError
from suffix_analysis.prompts import has_half_pair

REGIONS = ("bos", "system", "instruction", "suffix", "chat")


@dataclass(frozen=True)
class Chat:
    """One rendered conversation up to where the reply starts.

    ``ids`` are the template's own, with nothing prepended. ``regions`` maps each name of ``REGIONS`` to a mask over
    tokens; the masks partition the prompt. ``retokenised``: decoding and encoding the suffix's ids would give others.
    """

    text: str
    ids: Int[Tensor, " token"]
    regions: dict[str, Bool[Tensor, " token"]]
    instruction: str
    suffix: str

    @property
    def region_names(self) -> list[str]:
        """The region of every token, by name."""
        names = [""] * len(self.ids)
        for name, mask in self.regions.items():
            for i in mask.nonzero().flatten().tolist():
                names[i] = name
        return names

    @property
    def n_chat(self) -> int:
        """Number of post-instruction template tokens; the last of them is chat[-1]."""
        return int(self.regions["chat"].sum())


def _around(tokenizer: Any, system: str | None) -> tuple[str, str]:
    """The rendered template before and after the user's text."""
    # private-use characters, which no template treats specially; more of them where the system prompt holds some
    mark = next(m for n in itertools.count(1) if (m := "\ue000" + n * "\ue001" + "\ue000") not in (system or ""))
    try:
        text = tokenizer.apply_chat_template(_turns(mark, system), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise whatever they like, e.g. for system turns they do not take
        raise UserError(f"The chat template refuses the conversation: {error}") from error
    if text.count(mark) != 1:
        raise UserError(
            f"The chat template shows the user's text {text.count(mark)} times; it must show it exactly once."
        )
    before, after = text.split(mark)
    return before, after


def _turns(user: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


def render_chat(tokenizer: Any, instruction: str, suffix: str = "", system: str | None = None) -> Chat:
    """Render ``instruction`` (and ``suffix``, after a space) as a conversation and tokenise it once.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        instruction: the user's request.
        suffix: text after it; empty for the arm without one.
        system: a system prompt; None leaves the template's own.

    Raises:
        UserError: no chat template, a slow tokenizer, an empty instruction, or ids that are not the template's own.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "The tokenizer has no chat template; use an instruction-tuned model or set tokenizer.chat_template."
        )
    if not tokenizer.is_fast:
        raise UserError("The tokenizer is a slow one and gives no offsets; load it with use_fast=True.")
    if not instruction.strip():
        raise UserError("The instruction is empty; give at least one word.")
    for text in (instruction, suffix):
        if has_half_pair(text):
            raise UserError(f"{text[:40]!r} holds half of a surrogate pair, which is no character; remove it.")
    before, after = _around(tokenizer, system)
    user = instruction + (" " + suffix if suffix else "")
    text = tokenizer.apply_chat_template(_turns(user, system), tokenize=False, add_generation_prompt=True)
    if text != before + user + after:
        # some templates strip the user's text; then so do we, and the ids stay the template's own
        user = user.strip()
        if text != before + user + after:
            raise UserError(f"The chat template changes the user's text {instruction[:40]!r}; it cannot be split.")
        instruction = instruction.lstrip() if suffix else instruction.strip()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(encoded.input_ids, dtype=torch.long)
    ends = torch.tensor([end for _, end in encoded.offset_mapping])
    return Chat(text, ids, _regions(tokenizer, ids, ends, before, instruction, user), instruction, suffix)


def _regions(
    tokenizer: Any, ids: Tensor, ends: Tensor, before: str, instruction: str, user: str
) -> dict[str, Bool[Tensor, " token"]]:
    """A token belongs to the region in which its last character stands."""
    start, middle, stop = len(before), len(before) + len(instruction), len(before) + len(user)
    regions = {
        "bos": torch.zeros(len(ids), dtype=torch.bool),
        "system": ends <= start,
        "instruction": (ends > start) & (ends <= middle),
        "suffix": (ends > middle) & (ends <= stop),
        "chat": ends > stop,
    }
    # A BOS token that opens every turn (SmolLM2's <|im_start|>) is part of the template, not something prepended.
    if len(ids) and ids[0] == tokenizer.bos_token_id and int((ids == tokenizer.bos_token_id).sum()) == 1:
        regions["bos"][0], regions["system"][0] = True, False
    covered = torch.stack([regions[name] for name in REGIONS]).sum(dim=0)
    assert bool((covered == 1).all()), "every token lies in exactly one region"
    return regions


def survives_decoding(tokenizer: Any, chat: Chat) -> bool:
    """Whether the prompt's ids come back when they are decoded and encoded again (METHODS §0)."""
    text = tokenizer.decode(chat.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return tokenizer(text, add_special_tokens=False).input_ids == chat.ids.tolist()


def reply_encodings(tokenizer: Any, chat: Chat, reply: str) -> list[Int[Tensor, " token"]]:
    """What the ids of a reply may have been whose text is known, the likeliest first.

    Where tokens hold the space before a word, one that is decoded at the beginning of a text loses it, and one that is
    encoded there gains it; so a reply is encoded behind its prompt, there with a space, and alone.
    """
    found: list[list[int]] = []
    before = chat.ids.tolist()
    for text in (reply, " " + reply):
        ids = tokenizer(chat.text + text, add_special_tokens=False).input_ids
        if ids[: len(before)] == before:
            found.append(ids[len(before) :])
    found.append(tokenizer(reply, add_special_tokens=False).input_ids)
    shown = [tokenizer.decode(ids, skip_special_tokens=True) == reply for ids in found]
    fitting = [ids for ids, is_shown in zip(found, shown, strict=True) if is_shown] or found[-1:]
    return [torch.tensor(ids, dtype=torch.long) for ids in fitting]


def token_strings(tokenizer: Any, ids: Sequence[int] | Tensor) -> list[str]:
    """Each token's text on its own, for display beside its id."""
    rows = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in rows]
