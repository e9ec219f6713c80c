"""Where mitigations act: on whole prompts, whatever runs with them, in any model; what hides a prompt is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attacks.caches import cache_argument
from suffix_analysis.defences import Firings, damped, restored
from suffix_analysis.detectors import Harmfulness
from suffix_analysis.errors import UserError
from suffix_analysis.forward import last_logits
from tests import tiny
from tests.stages.test_defences import SUFFIX, TEXTS, every_head, some_direction, some_levels


def test_a_prompt_that_partly_stands_in_a_cache_is_refused() -> None:
    """Its user's tokens could not be read, and nothing would be edited, without a word."""
    model = tiny.model("llama")
    direction, chat = some_direction(model), model.chat(TEXTS[3], SUFFIX)
    ids, how = chat.ids[None], {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    middle, name = int(chat.regions["suffix"].nonzero()[0]), cache_argument(model.hf)
    for context in (
        lambda: damped(model, every_head(model), 0.5),
        lambda: restored(model, direction, some_levels(model)),
    ):
        for end in (middle, len(chat.ids) - 1):
            before = model.hf(input_ids=ids[:, :end], use_cache=True).past_key_values
            with pytest.raises(UserError, match=f"{end} tokens of this one stand in a cache"), context():
                model.hf(input_ids=ids[:, end:], **{name: before})
        with torch.no_grad(), context():
            whole = model.hf.generate(ids, attention_mask=torch.ones_like(ids), **how)
            # a loop of one's own, whose cache the first forward makes
            found, cache, row = ids, None, ids
            for _ in range(3):
                out = model.hf(input_ids=row, use_cache=True, **{name: cache})
                cache, row = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
                found = torch.cat([found, row], dim=1)
        assert torch.equal(found, whole)


def test_a_defence_acts_on_a_prompt_whatever_else_runs_with_it() -> None:
    """Behind a reply, beside equal prompts, and where one instruction meets several suffixes, which share a prefix."""
    model = tiny.model("llama")
    direction = some_direction(model)
    harm = Harmfulness(
        torch.nn.functional.normalize(torch.arange(1.0, model.d_model + 1), dim=0), 2, 1.0, 0.0, 1.0, 0.0
    )
    ids = model.chat(TEXTS[3], SUFFIX).ids
    others = [model.chat(TEXTS[3], text).ids for text in ("a b c", "x ! y")]
    longer = torch.cat([ids, torch.tensor([7, 8, 9])])
    for context in (
        lambda: damped(model, every_head(model), 0.8),
        lambda: restored(model, direction, some_levels(model)),
        lambda: restored(model, direction, some_levels(model), harm, -1e9),
    ):
        with torch.no_grad(), context():
            wanted = model.hf(input_ids=ids[None]).logits[0, -1].float()
            behind_a_reply = model.hf(input_ids=longer[None]).logits[0, len(ids) - 1].float()
            equals = last_logits(model.hf, model.tokenizer, [ids, ids])
            beside = last_logits(model.hf, model.tokenizer, [ids, *others])
        for found in (behind_a_reply, *equals, beside[0]):
            assert torch.allclose(found, wanted, atol=1e-4)
        assert not torch.allclose(wanted, last_logits(model.hf, model.tokenizer, [ids])[0], atol=1e-3)


def test_an_attackers_forward_meets_the_same_defence() -> None:
    model = tiny.model("llama")
    direction, ids = some_direction(model), model.chat(TEXTS[1], SUFFIX).ids
    target = torch.tensor([7, 8, 9])
    behind = len(target) - 1
    longer = torch.cat([ids, target[:-1]])[None]

    def contexts(behind: int) -> list[Any]:
        return [
            damped(model, every_head(model), 0.7, tail=4, behind=behind),
            restored(model, direction, some_levels(model), behind=behind),
        ]  # fmt: skip

    for plain, attacked in zip(contexts(0), contexts(behind), strict=True):
        with torch.no_grad(), plain:
            wanted = model.hf(input_ids=ids[None]).logits[0, -1]
        with torch.no_grad(), attacked:
            by_ids = model.hf(input_ids=longer).logits[0, len(ids) - 1]
            by_embeddings = model.hf(inputs_embeds=model.hf.get_input_embeddings()(longer)).logits[0, len(ids) - 1]
        assert torch.allclose(by_ids, wanted, atol=1e-4)
        assert torch.allclose(by_embeddings, wanted, atol=1e-4)


def test_a_mask_that_does_not_tell_padding_is_refused_and_all_is_as_before() -> None:
    model = tiny.model("llama")
    direction, ids = some_direction(model), model.chat(TEXTS[0], SUFFIX).ids[None]
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 2, "cache_implementation": "static", "pad_token_id": 0}
    plain = model.hf.generate(ids, **how)
    for context in (damped(model, every_head(model), 0.5), restored(model, direction, some_levels(model))):
        with pytest.raises(UserError, match="an attention mask of rows and tokens"), context:
            model.hf.generate(ids, **how)
    assert torch.equal(model.hf.generate(ids, **how), plain)


def test_blocks_are_found_whatever_their_list_is_called() -> None:
    model = tiny.falcon()
    direction, ids = some_direction(model, 1), model.chat(TEXTS[0], SUFFIX).ids
    plain, fired = last_logits(model.hf, model.tokenizer, [ids]), Firings()
    harmfulness = Harmfulness(direction.unit, 1, 1.0, 0.0, 1.0, 0.0)
    with restored(model, direction, some_levels(model), harmfulness, -1e9, fired=fired):
        assert not torch.allclose(last_logits(model.hf, model.tokenizer, [ids]), plain, atol=1e-3)
    assert fired.take() == 1.0 and fired.take() is None


def test_restoring_needs_no_wrapped_model() -> None:
    model, wrapped = tiny.model("llama"), tiny.model("llama")
    direction = some_direction(wrapped)
    rows = [model.chat(text, SUFFIX).ids for text in TEXTS]
    plain, found = last_logits(model.hf, model.tokenizer, rows), []
    for one in (model, wrapped):
        with restored(one, direction, some_levels(one)):
            found.append(last_logits(one.hf, one.tokenizer, rows))
    assert "bridge" not in model.__dict__ and "bridge" in wrapped.__dict__
    assert torch.allclose(found[0], found[1], atol=1e-4) and not torch.allclose(found[0], plain, atol=1e-3)
