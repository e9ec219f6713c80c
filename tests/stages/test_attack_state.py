"""What a saved attack is held to when it goes on, and models and conversations that are unusual."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

import attacks
from attacks.checkpoint import digest
from attacks.memory import is_out_of_memory, share_memory
from attacks.terms import Projection
from tests import tiny
from tests.small_attacks import SMALL, TALKS


def begun(model: Any, steps: int = 2, terms: Any = (), **changes: Any) -> tuple[attacks.GCG, dict[str, Any]]:
    """An attack of a few steps and its state as JSON carries it."""
    attack = attacks.GCG(model, tiny.tokenizer(), TALKS, "Sure", attacks.GCGConfig(**{**SMALL, **changes}), terms)
    rest = attack.steps()
    for _ in range(steps):
        next(rest)
    return attack, json.loads(json.dumps(attack.state()))


def test_a_state_of_another_model_is_refused() -> None:
    _, state = begun(tiny.hf_model("llama"))
    other = tiny.hf_model("llama")
    with torch.no_grad():
        other.get_decoder().layers[1].mlp.down_proj.weight.add_(0.01)  # as a fine-tuned one differs
    for model in (other, tiny.hf_model("qwen3")):
        attack = attacks.GCG(model, tiny.tokenizer(), TALKS, "Sure", attacks.GCGConfig(**SMALL))
        with pytest.raises(attacks.AttackError, match="another model"):
            attack.restore(state)


def test_what_a_model_is_known_by_does_not_depend_on_precision_or_on_a_bridge() -> None:
    model = tiny.model("llama")
    plain = digest(attacks.GCG(model.hf, tiny.tokenizer(), TALKS, "Sure", attacks.GCGConfig(**SMALL)))["model"]
    half = tiny.model("llama", dtype=torch.bfloat16)
    assert model.bridge is not None
    for hf in (model.hf, half.hf):
        attack = attacks.GCG(hf, tiny.tokenizer(), TALKS, "Sure", attacks.GCGConfig(**SMALL))
        assert digest(attack)["model"] == plain


def test_a_template_that_writes_another_text_is_named() -> None:
    tok = copy.deepcopy(tiny.tokenizer())
    _, state = begun(tiny.hf_model("llama"))
    tok.chat_template = "Today. " + tok.chat_template  # as one with a date does after midnight
    attack = attacks.GCG(tiny.hf_model("llama"), tok, TALKS, "Sure", attacks.GCGConfig(**SMALL))
    with pytest.raises(attacks.AttackError, match="another text that the chat template writes;"):
        attack.restore(state)


@dataclass(frozen=True)
class Held:
    """A term as a user writes it; ``inner`` is an object whose words hold an address."""

    inner: Any
    weight: float = 1.0

    def watch(self, model: Any, slot: attacks.Slot) -> Any:
        return Projection(self.inner.direction, 1).watch(model, slot)


class Plain:
    def __init__(self, direction: torch.Tensor) -> None:
        self.direction = direction


def test_a_term_is_known_by_what_it_holds() -> None:
    model = tiny.hf_model("llama")
    width = model.config.hidden_size
    direction = torch.arange(1.0, width + 1)
    changed = direction.clone()
    changed[width // 2] += 1  # where torch leaves numbers out when it prints a long tensor
    _, state = begun(model, terms=(Held(Plain(direction)),))
    again = attacks.GCG(
        model, tiny.tokenizer(), TALKS, "Sure", attacks.GCGConfig(**SMALL), (Held(Plain(direction.clone())),)
    )
    again.restore(state)
    other = attacks.GCG(model, tiny.tokenizer(), TALKS, "Sure", attacks.GCGConfig(**SMALL), (Held(Plain(changed)),))
    with pytest.raises(attacks.AttackError, match="another terms"):
        other.restore(state)


def test_settings_that_may_change_are_those_of_the_one_who_goes_on() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    _, state = begun(model)
    attack = attacks.GCG(model, tok, TALKS, "Sure", attacks.GCGConfig(**SMALL, batch_size=2))
    attack.restore(state)
    assert attack.search.batch_size == 2, "fewer at once, after memory ran out"
    attack = attacks.GCG(model, tok, TALKS, "Sure", attacks.GCGConfig(**SMALL))
    attack.restore(state | {"stopped": True})
    assert len(list(attack.steps())) == SMALL["num_steps"] - 2, "it stopped early, and is not to any more"
    _, scheduled = begun(model, search_width_start=40)
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 8, "search_width_start": 40})
    with pytest.raises(attacks.AttackError, match="another settings"):
        attacks.GCG(model, tok, TALKS, "Sure", config).restore(scheduled)


def test_batches_do_not_depend_on_who_shares_the_memory_later() -> None:
    attack, _ = begun(tiny.hf_model("llama"), 1)
    before = attack.search.most(0, 10)
    try:
        share_memory(1000)
        assert attack.search.most(0, 10) == before
        assert begun(tiny.hf_model("llama"), 1)[0].search.memory < attack.search.memory
    finally:
        share_memory(1)


def test_a_model_in_training_mode_is_refused() -> None:
    model = tiny.hf_model("llama").train()
    with pytest.raises(attacks.AttackError, match=r"model\.eval\(\)"):
        attacks.run(model, tiny.tokenizer(), TALKS[0], "Sure", attacks.GCGConfig(**SMALL))


def test_a_tokenizer_may_have_more_tokens_than_the_model() -> None:
    model, tok = tiny.hf_model("llama"), copy.deepcopy(tiny.tokenizer())
    tok.add_special_tokens({"unk_token": "[UNK]"})
    assert tok.unk_token_id >= model.get_input_embeddings().weight.shape[0]
    assert attacks.run(model, tok, TALKS[0], "Sure", attacks.GCGConfig(**{**SMALL, "num_steps": 1})).losses


def test_a_space_that_a_template_strips_is_not_part_of_a_suffix() -> None:
    tok = tiny.tokenizer("llama3.1")
    found = attacks.run(tiny.hf_model("llama"), tok, " {optim_str} Sing", "Sure", attacks.GCGConfig(**SMALL))
    for step in found.steps:
        text = tok.apply_chat_template(
            [{"role": "user", "content": f" {step.string} Sing"}], tokenize=False, add_generation_prompt=True
        )
        ids = tok(text, add_special_tokens=False).input_ids
        own = list(step.ids)
        assert any(ids[i : i + len(own)] == own for i in range(len(ids))), step.string


def test_without_a_place_the_suffix_stands_behind_a_space() -> None:
    tok = tiny.tokenizer()
    config = attacks.GCGConfig(**SMALL)
    for text in ("Write a poem about rai", "Sing "):
        (slot,) = attacks.GCG(tiny.hf_model("llama"), tok, text, "Sure", config).slots
        assert slot.joiner == " " and slot.before_text.endswith(text.rstrip())


def test_a_model_without_attention_is_attacked_without_a_prefix_cache() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=700, hidden_size=32, num_hidden_layers=2, state_size=8)
    ).eval()
    found = [
        attacks.run(model, tiny.tokenizer(), TALKS[0], "Sure", attacks.GCGConfig(**{**SMALL, **more, "num_steps": 2}))
        for more in ({}, {"use_prefix_cache": False})
    ]
    assert found[0].losses == pytest.approx(found[1].losses)


@pytest.mark.long
def test_the_self_test_tells_the_targets_own_loss_in_every_conversation() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    plain = attacks.self_test(attacks.GCG(model, tok, TALKS, "Sure", attacks.GCGConfig(**SMALL)))
    term = Projection(torch.ones(model.config.hidden_size), 1, weight=100.0)
    for terms, more in (((term,), {}), ((), {"use_mellowmax": True}), ((), {"progressive_goals": True})):
        attack = attacks.GCG(model, tok, TALKS, "Sure", attacks.GCGConfig(**SMALL, **more), terms)
        assert attacks.self_test(attack).losses == pytest.approx(plain.losses, abs=1e-4)
    small = attacks.GCG(model, tok, TALKS, "Sure", attacks.GCGConfig(**SMALL, batch_size=1))
    assert attacks.self_test(small).gib < plain.gib


def test_arguments_of_another_kind_are_named() -> None:
    """In a process of its own: here the tests' type checks would speak first."""
    code = (
        "from attacks.inputs import pair_up\n"
        "for given in (('x', None), ({'role': 'user'}, 'Sure'), (['x', 7], 'Sure'), (['x'], [b'Sure'])):\n"
        "    try: pair_up(*given)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told[0].startswith("AttackError The target is None;")
    assert told[1].startswith("AttackError The conversation is {'role': 'user'};")
    assert told[2].startswith("AttackError The conversation is 7;")
    assert told[3].startswith("AttackError The target is b'Sure';")


def test_more_ways_to_say_that_memory_is_out() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_directions_precision_does_not_matter(dtype: torch.dtype) -> None:
    model = tiny.hf_model("llama")
    term = Projection(torch.arange(1.0, model.config.hidden_size + 1).to(dtype), 1)
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 1})
    assert attacks.run(model, tiny.tokenizer(), TALKS[0], "Sure", config, terms=(term,)).losses
