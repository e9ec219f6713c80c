"""Control suffixes of the same token count (METHODS §5): random tokens, the suffix shuffled, natural text.

Every one survives re-tokenisation in context, so that a control has exactly as many tokens as the suffix it controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from attacks.candidates import forbidden_ids
from attacks.config import AttackError
from attacks.slot import Slot, split_ids, suffix_string, survives

# Ordinary sentences with nothing to do with any instruction; cut to the token count that is asked for.
BENIGN_TEXT = (
    "The weather was mild this morning and the market square filled slowly with people looking for fresh bread.",
    "My uncle keeps an old wooden boat by the lake and paints it blue every spring before the first trip.",
    "After lunch we walked along the river, counted the ducks and talked about the books we had read.",
    "The train arrived a few minutes late, but everybody found a seat and the journey was quiet and pleasant.",
    "In the evening the children played cards on the carpet while the soup was cooking in the big pot.",
    "There is a small museum behind the town hall where one can see clocks from the last two centuries.",
    "Our neighbours planted a cherry tree in their garden, and this year it carried fruit for the first time.",
    "The library opens at nine, and on Saturdays a retired teacher reads stories to anyone who wants to listen.",
    "We bought new curtains for the kitchen because the old ones had faded in the sun over many summers.",
    "The path through the forest is marked with yellow signs and leads past a clear spring and two benches.",
    "My sister learned to play the clarinet last winter and now joins the village band for its summer concerts.",
    "On the way home we stopped at a farm, tasted three kinds of honey and took two jars with us.",
    "The ferry crosses the bay six times a day, and gulls follow it from one shore to the other.",
    "Grandfather repairs watches at the kitchen table and tells the same stories about the harbour every time.",
    "A new bakery has opened next to the post office, and its window is full of seeded rolls and plum cake.",
    "The hotel garden was quiet after the rain, and small snails were crossing the paved path in a row.",
    "For the school play the older pupils built a castle of cardboard and painted every single stone grey.",
    "We spent Sunday sorting photographs, laughing at our old haircuts and guessing the names of distant cousins.",
    "The café on the corner serves tea in green cups and lends umbrellas to guests when it pours.",
    "From the hill one can see the whole valley, with its orchards, the slow canal and the railway bridge.",
)
ROUNDS = 400


def _require_some(count: int, length: int) -> None:
    if count < 1 or length < 1:
        raise AttackError(f"{count} suffixes of {length} tokens are asked for; give at least one of each.")


def random_suffixes(
    tokenizer: Any, slots: Sequence[Slot], count: int, length: int, seed: int, n_rows: int
) -> list[tuple[str, tuple[int, ...]]]:
    """``count`` suffixes of ``length`` tokens, uniform over printable ASCII tokens, built token by token.

    A token that would merge with its neighbour is drawn again, so the distribution is uniform given that it survives.

    Returns:
        (string, ids) pairs.

    Raises:
        AttackError: no token fits after many draws, or there is to be no suffix or no token.
    """
    _require_some(count, length)
    generator = torch.Generator()
    generator.manual_seed(seed)
    banned = set(forbidden_ids(tokenizer, n_rows, allow_non_ascii=False, compat=False).tolist())
    allowed = torch.tensor([i for i in range(len(tokenizer)) if i not in banned])
    found = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < length:
            picks = allowed[torch.randint(0, len(allowed), (64,), generator=generator)]
            rows = torch.cat([torch.tensor(ids, dtype=torch.long).expand(64, -1), picks[:, None]], dim=1)
            fits = survives(tokenizer, slots, rows).nonzero().flatten()
            if len(fits) == 0:
                if not ids:
                    raise AttackError("No random token survives re-tokenisation after the instruction.")
                ids.pop()  # a dead end: take another way
                continue
            ids = rows[fits[0]].tolist()
        found.append((suffix_string(tokenizer, slots[0], ids), tuple(ids)))
    return found


def shuffled_suffixes(
    tokenizer: Any, slots: Sequence[Slot], ids: Int[Tensor, " suffix"], count: int, seed: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Up to ``count`` different permutations of ``ids`` that survive re-tokenisation; fewer if few do.

    Raises:
        AttackError: there is to be no suffix or no token.
    """
    _require_some(count, len(ids))
    generator = torch.Generator()
    generator.manual_seed(seed)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(ROUNDS):
        rows = torch.stack([ids[torch.randperm(len(ids), generator=generator)] for _ in range(64)])
        for row in rows[survives(tokenizer, slots, rows)].tolist():
            if row != ids.tolist():
                found.setdefault(tuple(row))
        if len(found) >= count:
            break
    return [(suffix_string(tokenizer, slots[0], row), row) for row in list(found)[:count]]


def benign_suffixes(
    tokenizer: Any, slots: Sequence[Slot], count: int, length: int
) -> list[tuple[str, tuple[int, ...]]]:
    """Up to ``count`` natural sentences cut to ``length`` tokens; those that do not survive the cut are left out.

    Longer ones run on into the next sentences, and no two share more than the last of them: there are fewer.

    Raises:
        AttackError: there is to be no suffix or no token.
    """
    _require_some(count, length)
    found = []
    for i in range(0, len(BENIGN_TEXT), max(1, length // 16)):
        text = " ".join(BENIGN_TEXT[(i + k) % len(BENIGN_TEXT)] for k in range(1 + length // 12))
        slot = slots[0]
        row = split_ids(tokenizer, slot.before_text, slot.joiner + text, slot.after_text)[1].tolist()[:length]
        if len(row) == length and bool(survives(tokenizer, slots, torch.tensor([row]))[0]):
            found.append((suffix_string(tokenizer, slots[0], row), tuple(row)))
        if len(found) == count:
            break
    return found
