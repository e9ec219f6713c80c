"""What an attack is given: conversations and targets as lists, refused early where they cannot work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attacks.config import AttackError, GCGConfig
from attacks.slot import Messages, Slot, survives

Conversations = Messages | list[Messages]


def pair_up(messages: Conversations, target: str | list[str]) -> tuple[list[Messages], list[str]]:
    """Conversations and targets as two equally long lists.

    Raises:
        AttackError: no conversation, another number of targets, or anything else than text or turns.
    """
    several = isinstance(messages, (list, tuple)) and not (messages and isinstance(messages[0], dict))
    conversations: list[Any] = list(messages) if several else [messages]
    if not conversations:
        raise AttackError("There is no conversation to attack; give a string, a list of turns, or a list of those.")
    for one in conversations:
        if not isinstance(one, (str, list, tuple)):
            raise AttackError(f"The conversation is {one!r:.60}; give a string, a list of turns, or a list of those.")
    targets = list(target) if isinstance(target, (list, tuple)) else [target] * len(conversations)
    for one in targets:
        if not isinstance(one, str):
            raise AttackError(f"The target is {one!r:.60}; give a string, or a list with one for each conversation.")
    if len(targets) != len(conversations):
        raise AttackError(f"{len(conversations)} conversations but {len(targets)} targets; give one target or as many.")
    return conversations, targets


def check_config(config: Any) -> None:
    """Refuse settings of another package.

    Raises:
        AttackError: they are no `attacks.GCGConfig`.
    """
    if not isinstance(config, GCGConfig):
        raise AttackError(
            f"The settings are a {type(config).__module__}.{type(config).__name__}; give an attacks.GCGConfig "
            "(GCGConfig.nanogcg(...) takes nanoGCG's own)."
        )


def check_model(model: Any) -> None:
    """Refuse a model whose tokens cannot be differentiated, whose logits cannot be taken, or that draws lots.

    Raises:
        AttackError: it gives no embedding or no unembedding with a weight, or is being trained.
    """
    if getattr(model, "training", False):
        raise AttackError("The model is in training mode, where dropout makes losses random; call model.eval().")
    for name, what in (("get_input_embeddings", "input embeddings"), ("get_output_embeddings", "vocabulary head")):
        try:
            found = getattr(model, name)()
        except (AttributeError, NotImplementedError):
            found = None
        if getattr(found, "weight", None) is None:
            raise AttackError(
                f"{type(model).__name__}.{name}() gives no {what} with a weight; an attack needs a causal language "
                "model, loaded with AutoModelForCausalLM."
            )


def check_slots(slots: list[Slot], model: Any, config: GCGConfig) -> None:
    """Refuse what cannot work before any time is spent.

    Raises:
        AttackError: a suffix without tokens or tokenised differently in different conversations, too long a
            conversation, or more tokens to replace than the suffix has.
    """
    if not len(slots[0].suffix_ids):
        raise AttackError(f"The initial suffix {config.optim_str_init!r} has no tokens; give a visible one.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = {tuple(slot.suffix_ids.tolist()) for slot in slots}
    if len(lengths) > 1:
        raise AttackError(
            f"The initial suffix {config.optim_str_init!r} is tokenised differently in different conversations; put a "
            "space before {optim_str} in each of them."
        )
    for i, slot in enumerate(slots):
        talk = len(slot.before_ids) + len(slot.after_ids)
        total = talk + len(slot.suffix_ids) + len(slot.target_ids)
        if limit is not None and total > limit:
            raise AttackError(
                f"Conversation {i} has {total} tokens ({talk} with its template, {len(slot.suffix_ids)} of the suffix, "
                f"{len(slot.target_ids)} of the target), but the model takes {limit}; shorten the longest of them."
            )
    for name in ("n_replace", "n_replace_start"):
        value = getattr(config, name)
        if value is not None and value > len(slots[0].suffix_ids):
            raise AttackError(f"{name} is {value}, but the suffix has {len(slots[0].suffix_ids)} tokens.")


def check_inits(tokenizer: Any, slots: list[Slot], rows: list[Tensor], inits: list[str]) -> None:
    """Refuse initial suffixes that a model would not read as the tokens that the search begins with.

    Raises:
        AttackError: one decodes to a text that is tokenised otherwise in a conversation.
    """
    for text, fits in zip(inits, survives(tokenizer, slots, torch.stack(rows)).tolist(), strict=True):
        if not fits:
            raise AttackError(
                f"The initial suffix {text!r} decodes to a text that is tokenised otherwise where it stands, as those "
                "that end in white space; choose another, e.g. 'x x x'."
            )
