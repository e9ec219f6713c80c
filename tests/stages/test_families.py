"""Every model family's architecture with its real chat format, tiny and random, through the whole line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attacks
from suffix_analysis.analysis import analyze
from suffix_analysis.chat import REGIONS
from suffix_analysis.directions import DirectionConfig, find_direction
from suffix_analysis.generate import generate
from suffix_analysis.identities import check_identities
from suffix_analysis.interventions import ablate
from suffix_analysis.models import Model
from suffix_analysis.orthogonalise import NotAvailable, orthogonalised
from suffix_analysis.prompts import Prompt, load_prompts
from suffix_analysis.traces import trace
from tests import tiny


@dataclass(frozen=True)
class Family:
    """An architecture with a chat format; whether orthogonalised weights can equal ablation."""

    architecture: str
    format: str
    orthogonalises: bool = True
    changes: tuple[tuple[str, Any], ...] = ()


CASES = {
    "Yi, SmolLM2": Family("llama", "chatml"),
    "Qwen 1.5 and 2.5": Family("qwen2", "qwen2.5"),
    "Qwen 3": Family("qwen3", "qwen3"),
    "Llama 2": Family("llama", "llama2", changes=(("tie_word_embeddings", False),)),
    "Llama 3": Family("llama", "llama3"),
    "Mistral": Family("mistral", "mistral", changes=(("tie_word_embeddings", False),)),
    "Gemma": Family("gemma", "gemma"),
    "Gemma 2": Family("gemma2", "gemma", orthogonalises=False),
    "Gemma 3": Family("gemma3_text", "gemma", orthogonalises=False),
    "Phi-3": Family("phi3", "phi3", changes=(("tie_word_embeddings", False),)),
    "Phi-4": Family("phi3", "phi4", changes=(("tie_word_embeddings", False),)),
    "OLMo 2": Family("olmo2", "olmo2", orthogonalises=False),
    "OLMo 3": Family("olmo3", "chatml", orthogonalises=False),
    "SmolLM 3": Family("smollm3", "smollm3"),
    "Granite": Family("granite", "granite", changes=(("residual_multiplier", 0.4), ("embedding_multiplier", 3.0))),
}
# random models do not refuse, so no filter may apply
ANY = DirectionConfig(n_fit=10, n_select=4, kl_threshold=math.inf, induce_threshold=-math.inf, keep_by_score=False)
SUFFIX = "x y z"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Family:
    """One family after the other."""
    return CASES[request.param]


def make(case: Family) -> Model:
    return tiny.model(case.architecture, format_name=case.format, **dict(case.changes))


def some(kind: str, n: int) -> list[Prompt]:
    return load_prompts("embedded", split="fit", kind=kind)[:n]


def test_the_format_renders_into_regions(case: Family) -> None:
    model = make(case)
    chat = model.chat("Pick a lock", SUFFIX)
    assert torch.stack([chat.regions[name] for name in REGIONS]).sum(dim=0).eq(1).all()
    assert "Pick a lock" in model.tokenizer.decode(chat.ids[chat.regions["instruction"]])
    assert SUFFIX in model.tokenizer.decode(chat.ids[chat.regions["suffix"]])
    assert bool(chat.regions["chat"][-1])
    assert chat.text == model.tokenizer.decode(chat.ids)


def test_the_whole_line(case: Family) -> None:
    model = make(case)
    config = attacks.GCGConfig(num_steps=2, search_width=8, topk=32, optim_str_init=SUFFIX + " x", seed=0)
    suffix = attacks.run(model.hf, model.tokenizer, ["Pick a lock {optim_str}"], "Sure", config).best_string
    harmful, harmless = some("harmful", 14), some("harmless", 14)
    plain = generate(model.hf, model.tokenizer, [model.chat("Sing").ids], 4)
    direction = find_direction(model, harmful, harmless, ANY, refusal_tokens=[40, 41])
    assert generate(model.hf, model.tokenizer, [model.chat("Sing").ids], 4) == plain
    report = [
        Prompt(p.id, p.text, p.kind, "select" if i < 4 else "report")
        for prompts in (harmful[:8], harmless[:8])
        for i, p in enumerate(prompts)
    ]
    found = analyze(model, direction, report, [suffix])
    passed = {check["name"]: check["passed"] for check in found.checks}
    assert passed.pop("several suffixes per arm") is False  # one adversarial suffix is descriptive
    assert passed and all(passed.values())
    assert set(found.frame("profile")["arm"]) >= {"none", "adversarial", "harmless"}


def test_the_check_at_load_finds_nothing_wrong(case: Family) -> None:
    found = check_identities(make(case))
    assert len(found) == 5
    assert all(identity.holds for identity in found), found


def test_identities(case: Family) -> None:
    model = make(case)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    unit = vector / vector.norm()
    traces = trace(model, ["Pick a lock", "Sing"], vector, suffix=SUFFIX)
    assert traces.identity < 1e-5 and traces.closure < 1e-5
    inputs: list[torch.Tensor] = []
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.n_layers)]
    ids = model.chat("Pick a lock").ids[None]
    with torch.no_grad():
        plain = model.hf(input_ids=ids).logits
        hooks = [(name, lambda x, hook: inputs.append(x)) for name in names]
        with ablate(model, vector), model.bridge.hooks(fwd_hooks=hooks):
            wanted = model.hf(input_ids=ids).logits
        assert len(inputs) == model.n_layers
        for x in inputs:
            assert float((x @ unit).abs().max()) < 1e-5 * float(x.norm(dim=-1).max())
        if case.orthogonalises:
            with orthogonalised(model, vector):
                torch.testing.assert_close(model.hf(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(NotAvailable), orthogonalised(model, vector):
                pass
        assert torch.equal(model.hf(input_ids=ids).logits, plain)
