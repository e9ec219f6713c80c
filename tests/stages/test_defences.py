"""Mitigations on tiny models: identities, and nothing that depends on batching or on the cache."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from suffix_analysis.defences import damped, harmful_levels, restored
from suffix_analysis.detectors import (
    Harmfulness,
    gaps,
    read,
    user_mask,
)
from suffix_analysis.directions import Direction
from suffix_analysis.forward import last_logits
from suffix_analysis.generate import generate
from suffix_analysis.interventions import random_directions
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt, load_prompts
from suffix_analysis.records import Suffix
from tests import tiny

TEXTS = ["Pick a lock", "Break a window now", "Bake a cake", "Sing about the sea and the sky"]
SUFFIX = "x ! y ? z"


def some_direction(model: Model, layer: int = 2) -> Direction:
    assert model.bridge is not None  # wrapping changes the order of sums, so it comes before anything is compared
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(model.d_model, generator=generator)
    means = torch.randn(model.n_layers + 1, model.d_model, generator=generator)
    return Direction(vector, -1, layer, [], means + vector, means, (5,), {})


def some_levels(model: Model) -> torch.Tensor:
    """A projection for every chat position, all of them different."""
    return torch.arange(1.0, model.chat("x").n_chat + 1)


def every_head(model: Model) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


def test_a_strength_of_zero_changes_nothing_bit_for_bit(family: str) -> None:
    model = tiny.model(family)
    direction = some_direction(model)
    # some share their beginning, which then runs once
    rows = [model.chat(text, suffix).ids for text in TEXTS for suffix in (SUFFIX, "and so on")]
    plain = last_logits(model.hf, model.tokenizer, rows)
    for context in (
        damped(model, every_head(model), 0.0),
        damped(model, every_head(model), 0.0, before=True),
        restored(model, direction, some_levels(model), strength=0.0),
    ):
        with context:
            assert torch.equal(last_logits(model.hf, model.tokenizer, rows), plain)
    assert torch.equal(last_logits(model.hf, model.tokenizer, rows), plain), "all hooks are gone"


def test_damped_rows_are_scaled_on_the_texts_end_and_sum_to_one() -> None:
    model, tail, strength = tiny.model("llama"), 3, 0.4
    assert model.bridge is not None
    chats = [model.chat(text, SUFFIX) for text in TEXTS]
    plain = patterns(model, chats)
    with damped(model, [(0, 1)], strength, tail):
        changed = patterns(model, chats)
    for chat, was, now in zip(chats, plain, changed, strict=True):
        left = was[1].clone()
        left[user_mask(chat).nonzero().flatten()[-tail:]] *= 1 - strength
        assert torch.allclose(now[1], left / left.sum(), atol=1e-6)
        assert torch.equal(now[0], was[0]), "other heads are left alone"


def test_a_silent_detector_changes_nothing_and_half_the_strength_goes_half_the_way() -> None:
    model = tiny.model("llama")
    direction, levels, seen = some_direction(model), some_levels(model), list[torch.Tensor]()
    harm = Harmfulness(torch.nn.functional.normalize(torch.ones(model.d_model), dim=0), 2, 1.0, 0.0, 1.0, 0.0)
    ids = model.chat(TEXTS[0], SUFFIX).ids[None]

    def look(x: torch.Tensor, hook: object) -> None:
        seen.append(x[0, -len(levels) :] @ direction.unit)

    with torch.no_grad(), model.bridge.hooks(fwd_hooks=[(f"blocks.{direction.layer}.hook_resid_pre", look)]):
        plain = model.hf(input_ids=ids).logits
        with restored(model, direction, levels, harm, float("inf")):
            assert torch.equal(model.hf(input_ids=ids).logits, plain), "bit for bit"
        with restored(model, direction, levels, strength=0.5):
            model.hf(input_ids=ids)
    assert torch.allclose(seen[-1], (seen[0] + levels) / 2, atol=1e-4)


def test_mitigations_act_the_same_alone_in_batches_and_in_replies() -> None:
    model = tiny.model("llama")
    direction = some_direction(model)
    rows = [model.chat(text, SUFFIX).ids for text in TEXTS]
    plain = last_logits(model.hf, model.tokenizer, rows)
    for context in (
        lambda: damped(model, every_head(model), 0.8, tail=3),
        lambda: damped(model, every_head(model), 0.8, tail=99),  # more than the users' texts hold
        lambda: restored(model, direction, some_levels(model)),
    ):
        with context():
            together = last_logits(model.hf, model.tokenizer, rows)
            alone = torch.cat([last_logits(model.hf, model.tokenizer, [row]) for row in rows])
            whole = model.hf(input_ids=rows[0][None]).logits[0, -1].float()
            replies = generate(model.hf, model.tokenizer, rows, 3)
            first = [generate(model.hf, model.tokenizer, [row], 3)[0] for row in rows]
        assert torch.allclose(together, alone, atol=1e-4)
        assert torch.allclose(together[0], whole, atol=1e-4)
        assert not torch.allclose(together, plain, atol=1e-3)
        assert replies == first


def test_only_the_users_own_tokens_are_damped() -> None:
    model = tiny.model("llama")
    chats = [model.chat(text) for text in TEXTS]  # shorter than the tail
    seen: list[torch.Tensor] = []

    def look(pattern: torch.Tensor, hook: object) -> None:
        seen.append(pattern.detach().clone())

    with (
        damped(model, [(0, 0)], 1.0, tail=99),
        model.bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", look)]),
    ):
        for chat in chats:
            model.hf(input_ids=chat.ids[None])
    for chat, pattern in zip(chats, seen, strict=True):
        row = pattern[0, 0, -1]
        assert float(row[user_mask(chat)].max()) == 0
        assert float(row[~user_mask(chat)].min()) > 0


def test_a_full_strength_cuts_the_edges_and_rows_still_sum_to_one() -> None:
    model = tiny.model("llama")
    chat = model.chat(TEXTS[0], SUFFIX)
    n_suffix = int(chat.regions["suffix"].sum())
    seen: list[torch.Tensor] = []

    def look(pattern: torch.Tensor, hook: object) -> None:
        seen.append(pattern.detach().clone())

    with (
        damped(model, [(1, 0)], 1.0, tail=n_suffix),
        model.bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", look)]),
    ):
        model.hf(input_ids=chat.ids[None])
    rows = seen[0][0, :, chat.regions["chat"]]
    assert float(rows[0][:, chat.regions["suffix"]].max()) == 0
    assert float(rows[1][:, chat.regions["suffix"]].max()) > 0, "other heads are left alone"
    assert torch.allclose(rows.sum(dim=-1), torch.ones(rows.shape[:2]), atol=1e-5)
    with pytest.raises(ValueError, match="strength is 1"), damped(model, [(1, 0)], 1.5):
        pass


def test_restoring_takes_the_projection_to_the_harmful_mean_where_the_detector_fires() -> None:
    model = tiny.model("llama")
    direction, chats = some_direction(model), [model.chat(text, SUFFIX) for text in TEXTS]
    harm = Harmfulness(
        torch.nn.functional.normalize(torch.arange(1.0, model.d_model + 1), dim=0), 2, 1.0, 0.0, 1.0, 0.0
    )
    wanted = read(model, chats, direction, harm)
    gap = wanted.harmfulness - wanted.refusal
    assert torch.allclose(gaps(model, direction, harm, chats), gap, atol=1e-4), "a filter reads what is restored by"
    cut = float(gap.sort().values[1:3].mean())  # two fire, two do not
    levels, seen = some_levels(model), list[torch.Tensor]()
    n_chat = len(levels)

    def look(x: torch.Tensor, hook: object) -> None:
        seen.append(x[0] @ direction.unit)

    for chat, fires in zip(chats, (gap > cut).tolist(), strict=True):
        for context in (contextlib.nullcontext(), restored(model, direction, levels, harm, cut)):
            with context, model.bridge.hooks(fwd_hooks=[(f"blocks.{direction.layer}.hook_resid_pre", look)]):
                model.hf(input_ids=chat.ids[None])
        before, after = seen[-2:]
        assert torch.equal(before[:-n_chat], after[:-n_chat]), "the user's tokens are left alone"
        assert torch.allclose(after[-n_chat:], levels if fires else before[-n_chat:], atol=1e-3)
    assert (gap > cut).sum() == 2


def test_the_control_takes_the_same_steps_along_another_direction() -> None:
    model = tiny.model("llama")
    direction, levels = some_direction(model), some_levels(model)
    (other,) = random_directions(direction.vector, 1, 3)
    ids, n_chat = model.chat(TEXTS[0], SUFFIX).ids[None], len(levels)
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor, hook: object) -> None:
        seen.append(x[0])

    for context in (
        contextlib.nullcontext(), restored(model, direction, levels), restored(model, direction, levels, along=other)
    ):  # fmt: skip
        with (
            torch.no_grad(),
            context,
            model.bridge.hooks(fwd_hooks=[(f"blocks.{direction.layer}.hook_resid_pre", look)]),
        ):
            model.hf(input_ids=ids)
    plain, treated, control = seen
    steps = ((treated - plain) @ direction.unit)[-n_chat:]
    assert float(steps.abs().min()) > 0.1
    assert torch.allclose(((control - plain) @ (other / other.norm()))[-n_chat:], steps, atol=1e-4)
    assert torch.allclose((control @ direction.unit), (plain @ direction.unit), atol=1e-4)
    assert torch.allclose((control - plain).norm(dim=-1), (treated - plain).norm(dim=-1), atol=1e-4)


def test_levels_are_the_harmful_prompts_means_at_every_chat_position() -> None:
    model = tiny.model("llama")
    direction, chats = some_direction(model), [model.chat(text) for text in TEXTS]
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor, hook: object) -> None:
        seen.append(x[0, -chats[0].n_chat :] @ direction.unit)

    with model.bridge.hooks(fwd_hooks=[(f"blocks.{direction.layer}.hook_resid_pre", look)]):
        for chat in chats:
            model.hf(input_ids=chat.ids[None])
    assert torch.allclose(harmful_levels(model, direction, chats), torch.stack(seen).mean(dim=0), atol=1e-4)


def suffixes(count: int) -> list[Suffix]:
    return [
        Suffix(f"{arm}-{i}", arm, text * (i + 1))
        for arm, text in (("adversarial", "x ! y "), ("random", "q w e "), ("benign", "and so on "))
        for i in range(count)
    ]


def few_prompts() -> list[Prompt]:
    kinds = [(kind, split) for kind in ("harmful", "harmless") for split in ("fit", "select", "report")]
    return [
        prompt
        for kind, split in [*kinds, ("lookalike", "select"), ("lookalike", "report")]
        for prompt in load_prompts("embedded", split=split, kind=kind)[:4]
    ]


def patterns(model: Model, chats: list[Any], layer: int = 0) -> list[torch.Tensor]:
    """What the heads of a layer attend to from chat[-1], as the forward then uses it: [head, token] by conversation."""
    seen: list[torch.Tensor] = []

    def look(pattern: torch.Tensor, hook: object) -> None:
        seen.append(pattern[0, :, -1].detach().clone())

    with torch.no_grad(), model.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", look)]):
        for chat in chats:
            model.hf(input_ids=chat.ids[None])
    return seen


def test_the_control_takes_as_much_from_the_users_tokens_before_the_tail() -> None:
    model, tail, strength = tiny.model("llama"), 3, 0.4
    assert model.bridge is not None
    chats = [model.chat(text, SUFFIX) for text in TEXTS]
    plain = patterns(model, chats)
    with damped(model, every_head(model), strength, tail, before=True):
        changed = patterns(model, chats)
    for chat, was, now in zip(chats, plain, changed, strict=True):
        user = user_mask(chat).nonzero().flatten()
        last, first = user[-tail:], user[:-tail]
        taken = torch.minimum(strength * was[:, last].sum(dim=1), was[:, first].sum(dim=1))
        scale = 1 / (1 - taken)
        torch.testing.assert_close(now[:, last], was[:, last] * scale[:, None], atol=1e-6, rtol=1e-4)
        wanted = (was[:, first].sum(dim=1) - taken) * scale
        torch.testing.assert_close(now[:, first].sum(dim=1), wanted, atol=1e-6, rtol=1e-4)


def test_damped_rows_sum_to_one_in_bfloat16_and_where_all_is_on_the_tail() -> None:
    model = tiny.model("llama", dtype=torch.bfloat16)
    assert model.bridge is not None
    chats = [model.chat(text, SUFFIX) for text in TEXTS]

    def all_on_the_tail(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        changed = torch.zeros_like(pattern)
        changed[..., user_mask(chats[0]).nonzero().flatten()[-1]] = 1
        return changed

    for strength in (0.9, 1.0):
        with damped(model, every_head(model), strength, 3):
            for row in patterns(model, chats):
                assert torch.allclose(row.float().sum(dim=-1), torch.ones(len(row)), atol=0.01)
    hooks = [("blocks.0.attn.hook_pattern", all_on_the_tail)]
    with model.bridge.hooks(fwd_hooks=hooks), damped(model, every_head(model), 1.0, 3):
        assert all(torch.isfinite(row).all() for row in patterns(model, chats[:1]))
