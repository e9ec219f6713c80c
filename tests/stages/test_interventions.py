"""Interventions on tiny models, against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import suffix_analysis.forward as forward_module
from suffix_analysis.batching import Batch
from suffix_analysis.forward import ablated_logits, added_logits, last_logits
from suffix_analysis.interventions import ablate, add, set_projection, writes
from tests import tiny
from tests.tiny import TEXTS, unit


def test_after_ablation_no_block_sees_the_direction(family: str) -> None:
    model, vector = tiny.model(family), unit(32)
    seen: dict[str, float] = {}

    def look(x: torch.Tensor, hook: object) -> None:
        seen[hook.name] = float((x @ (vector / vector.norm())).abs().max())  # type: ignore[attr-defined]

    names = [f"blocks.{i}.hook_resid_pre" for i in range(3)] + ["blocks.2.hook_resid_post"]
    ids = model.chat(TEXTS[0]).ids[None]
    with torch.no_grad():
        with model.bridge.hooks(fwd_hooks=[(n, look) for n in names]):
            model.hf(input_ids=ids)
        before = max(seen.values())
        with ablate(model, vector), model.bridge.hooks(fwd_hooks=[(n, look) for n in names]):
            model.hf(input_ids=ids)
    assert len(seen) == 4
    assert max(seen.values()) < 1e-5 * before


def test_a_set_projection_is_what_every_block_sees(family: str) -> None:
    model, vector = tiny.model(family), unit(32)
    levels = torch.linspace(-2, 3, model.n_layers + 1)
    r, seen = vector / vector.norm(), {}
    rows = [model.chat(text).ids for text in TEXTS]
    names = [f"blocks.{i}.hook_resid_pre" for i in range(3)] + ["blocks.2.hook_resid_post"]
    with set_projection(model, vector, levels):
        hooks = [(name, lambda x, hook, name=name: seen.update({name: x @ r})) for name in names]
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
            model.hf(input_ids=rows[0][None])
    for name, level in zip(names, levels, strict=True):
        torch.testing.assert_close(seen[name], level.expand_as(seen[name]), atol=1e-4, rtol=1e-4)
    with set_projection(model, vector, torch.zeros(4)):
        zeroed = last_logits(model.hf, model.tokenizer, rows)
    with ablate(model, vector):
        torch.testing.assert_close(zeroed, last_logits(model.hf, model.tokenizer, rows), atol=1e-4, rtol=1e-4)
    for wrong, levels in ((torch.zeros(32), torch.zeros(4)), (vector, torch.zeros(3))):
        with pytest.raises(ValueError), set_projection(model, wrong, levels):
            pass


def test_ablation_is_its_definition_by_hand() -> None:
    """The same edit made with plain PyTorch hooks on an unwrapped copy of the model."""
    vector = unit(32)
    r = vector / vector.norm()
    plain = tiny.hf_model("llama")

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ r)[..., None] * r

    for block in plain.model.layers:
        block.register_forward_pre_hook(lambda _, args: (cut(args[0]), *args[1:]))
        block.self_attn.register_forward_hook(lambda _, __, out: (cut(out[0]), *out[1:]))
        block.mlp.register_forward_hook(lambda _, __, out: cut(out))
    model = tiny.model("llama")
    rows = [model.chat(text).ids for text in TEXTS]
    with torch.no_grad():
        expected = torch.stack([plain(input_ids=row[None]).logits[0, -1] for row in rows])
    with ablate(model, vector):
        torch.testing.assert_close(last_logits(model.hf, model.tokenizer, rows), expected, atol=1e-4, rtol=0)


def test_addition_moves_one_layer_by_alpha_r(family: str) -> None:
    model, vector = tiny.model(family), unit(32)
    ids = model.chat(TEXTS[1]).ids[None]
    seen: list[torch.Tensor] = []
    hook = [("blocks.1.hook_resid_pre", lambda x, hook: seen.append(x.clone()))]
    with torch.no_grad():
        for context in (add(model, vector, 1, 0.0), add(model, vector, 1, 2.0)):
            with context, model.bridge.hooks(fwd_hooks=hook):
                model.hf(input_ids=ids)
    torch.testing.assert_close(seen[1] - seen[0], (2 * vector).expand_as(seen[0]), atol=1e-5, rtol=1e-5)


def test_strength_zero_changes_nothing_and_hooks_go_after_an_error() -> None:
    model = tiny.model("llama")
    rows = [model.chat(text).ids for text in TEXTS]
    assert model.bridge is not None  # the bridge's attention rounds differently, so it must be there from the start
    plain = last_logits(model.hf, model.tokenizer, rows)
    with add(model, unit(32), 1, 0.0):
        assert torch.equal(last_logits(model.hf, model.tokenizer, rows), plain)
    with pytest.raises(RuntimeError, match="on purpose"), ablate(model, unit(32)):
        raise RuntimeError("on purpose")
    assert torch.equal(last_logits(model.hf, model.tokenizer, rows), plain)
    assert all(not model.bridge.hook_dict[name].fwd_hooks for name in model.bridge.hook_dict)
    assert len(writes(3)) == 7


@pytest.mark.parametrize("bad", [torch.zeros(32), torch.full((32,), math.nan)], ids=["zero", "nan"])
def test_a_direction_without_length_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot be ablated"), ablate(tiny.model("llama"), bad):
        pass


@pytest.mark.parametrize("at_once", [1, 2, 10])
def test_many_vectors_together_change_what_each_alone_does(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the blocks below an addition, which are skipped, change nothing."""
    monkeypatch.setattr(forward_module, "_at_once", lambda hf, n_prefix, groups: at_once)
    model = tiny.model(family)
    rows = [model.chat(text).ids for text in ("Write a poem", "Name a very tall tree in the north", "Sing")]
    ablated, added = ablated_logits(model, rows), added_logits(model, rows, 2.0)
    vectors = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(0))

    def alone(context: Any) -> torch.Tensor:
        with context:
            return last_logits(model.hf, model.tokenizer, rows)

    wanted = torch.stack([alone(ablate(model, vector)) for vector in vectors])
    torch.testing.assert_close(ablated(vectors), wanted, atol=1e-4, rtol=1e-5)
    for layer in range(model.n_layers):
        wanted = torch.stack([alone(add(model, vector, layer, 2.0)) for vector in vectors])
        torch.testing.assert_close(added(vectors, layer), wanted, atol=1e-4, rtol=1e-5)
    assert all("forward" not in block.__dict__ for block in model.bridge.blocks)


def test_vectors_run_together_as_far_as_memory_allows() -> None:
    batch = Batch(list(range(10)), {"input_ids": torch.zeros(10, 20)})
    hf = tiny.hf_model("llama")
    assert forward_module._at_once(hf, 0, [batch]) == forward_module.TOKEN_BUDGET // 200
    assert forward_module._at_once(hf, 1000, [batch]) == forward_module.REPLY_BUDGET // 10200
    assert forward_module._at_once(hf, 10**6, [batch]) == 1
