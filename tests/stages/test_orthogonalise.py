"""Weight orthogonalisation equals directional ablation where it can, says so where it cannot, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from suffix_analysis.interventions import ablate
from suffix_analysis.orthogonalise import NotAvailable, orthogonalised
from tests import tiny

PROMPTS = ("Write a poem about rain", "How do I bake a cake?")


def logits(model: tiny.Model, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(input_ids=model.chat(text).ids[None]).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_equal_ablations_and_weights_come_back(family: str, tied: bool) -> None:
    model = tiny.model(family, dtype=torch.float64, tie_word_embeddings=tied)
    vector = torch.randn(model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in model.hf.parameters()]
    for text in PROMPTS:
        with ablate(model, vector):
            wanted = logits(model, text)
        with orthogonalised(model, vector):
            found = logits(model, text)
        assert float((found - wanted).abs().max()) < 1e-8
        assert float((logits(model, text) - wanted).abs().max()) > 1e-3, "the intervention did nothing"
    after = list(model.hf.parameters())
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    embed, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    assert (head.weight is embed.weight) == tied


def test_weights_come_back_after_an_exception() -> None:
    model = tiny.model("llama")
    before = [p.detach().clone() for p in model.hf.parameters()]
    with pytest.raises(RuntimeError, match="inside"), orthogonalised(model, torch.ones(model.d_model)):
        raise RuntimeError("inside")
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_post_norms_are_not_available(family: str) -> None:
    model = tiny.model(family)
    before = [p.detach().clone() for p in model.hf.parameters()]
    with pytest.raises(NotAvailable, match="not available"), orthogonalised(model, torch.randn(model.d_model)):
        pass
    assert all(torch.equal(a, b) for a, b in zip(before, model.hf.parameters(), strict=True))
