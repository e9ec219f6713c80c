"""What an attack is given: the self-test before it, bad input, tokenizers with habits of their own."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

import attacks
from attacks import selftest
from attacks.caches import cache_argument
from attacks.candidates import draw
from attacks.memory import is_out_of_memory
from attacks.scorer import Scorer
from attacks.slot import survives
from tests import tiny
from tests.small_attacks import INIT, SMALL, TALKS, plain_loss


def test_self_test_looks_before_the_attack() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    attack = attacks.GCG(model, tok, TALKS, "Sure, here", attacks.GCGConfig(**SMALL))
    found = attacks.self_test(attack)
    assert len(found.replies) == len(TALKS)
    wanted = [plain_loss(model, slot, slot.suffix_ids) for slot in attack.slots]
    assert list(found.losses) == pytest.approx(wanted, abs=0.05)
    assert found.warnings == ()
    assert found.seconds_per_step > 0 < found.gib


def test_self_test_warns_of_a_prompt_that_is_not_the_templates() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    attack = attacks.GCG(model, tok, "Write a poem", "Sure", attacks.GCGConfig.nanogcg(**SMALL))
    attack.slots[0] = replace(attack.slots[0], before_ids=torch.cat([torch.tensor([4]), attack.slots[0].before_ids]))
    (warning,) = attacks.self_test(attack).warnings
    assert "not tokenised as by the tokenizer's own chat template" in warning


def test_self_test_warns_of_a_target_that_needs_no_suffix() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    attack = attacks.GCG(model, tok, TALKS[1], "Sure", attacks.GCGConfig(**SMALL))
    reply = attacks.self_test(attack).replies[0]
    attack = attacks.GCG(model, tok, TALKS[1], reply.split()[0], attacks.GCGConfig(**SMALL))
    assert any("without any suffix" in warning for warning in attacks.self_test(attack).warnings)


def test_self_test_warns_of_what_takes_long_does_not_fit_or_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    config = attacks.GCGConfig(num_steps=10**9, search_width=8, topk=32, optim_str_init="x")
    attack = attacks.GCG(model, tok, TALKS[0], "Sure", config)
    monkeypatch.setattr(selftest, "free_bytes", lambda device: 0)
    hours, room, few = attacks.self_test(attack).warnings
    assert "1000000000 steps may take" in hours and "smaller search_width" in hours
    assert "may take 0.0 GiB and 0.0 are free" in room and "batch_size" in room
    assert "'x' is 2 tokens" in few
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    told = attacks.self_test(attacks.GCG(model, tok, TALKS[0], "Sure", attacks.GCGConfig(**SMALL))).warnings
    assert "the model would hardly ever say it" in told[0]


def test_the_time_of_a_step_is_estimated() -> None:
    """Within a factor of ten on a model whose steps are all overhead; `benchmarks/gcg.py estimate` knows more."""
    config = attacks.GCGConfig(**{**SMALL, "search_width": 200})
    attack = attacks.GCG(tiny.hf_model("llama"), tiny.tokenizer(), TALKS, "Sure", config)
    found = attacks.self_test(attack).seconds_per_step
    taken = sorted(step.seconds for step in attack.steps())[3]
    assert taken / 10 < found < taken * 10


BAD: list[tuple[dict[str, Any], str]] = [
    ({"target": ""}, "target is empty"),
    ({"target": " "}, "target is empty"),
    ({"target": "", "config": {"add_space_before_target": True}}, "target is empty"),
    ({"messages": []}, "no conversation"),
    ({"messages": "a {optim_str} b {optim_str}"}, "2 times"),
    ({"messages": ["a", "b"], "target": ["x"]}, "2 conversations but 1 targets"),
    ({"messages": "word " * 700}, r"but the model takes 512; shorten"),
    ({"target": "word " * 700}, r"16 of the suffix, 1401 of the target\), but the model takes 512"),
    ({"messages": ["a", "b {optim_str} {optim_str}"]}, "Conversation 1: The conversation holds .* 2 times"),
    ({"config": {"optim_str_init": "x x "}}, "'x x ' decodes to a text that is tokenised otherwise"),
    ({"config": {"optim_str_init": ("x x", "x x ")}}, r"have \[4, 5\] tokens; give equal lengths"),
    ({"messages": "Tell me th{optim_str}", "config": {"optim_str_init": "e x"}}, "'e x' merges with the text before"),
    ({"messages": "Go {optim_str}e end", "config": {"optim_str_init": "x th"}}, "' x th' merges with the text behind"),
    ({"messages": ["Go {optim_str}", "Go{optim_str}"]}, "tokenised differently in different conversations"),
    ({"config": {"optim_str_init": "  "}}, "initial suffix is '  '"),
    ({"config": {"n_replace": 20}}, "n_replace is 20, but the suffix has 16"),
    ({"config": {"topk": 5000}}, "topk is 5000"),
]


@pytest.mark.parametrize(("change", "expected"), BAD, ids=[e for _, e in BAD])
def test_bad_input_is_named(change: dict[str, Any], expected: str) -> None:
    model = tiny.hf_model("llama")
    config = attacks.GCGConfig(**{**SMALL, **change.get("config", {})})
    with pytest.raises(attacks.AttackError, match=expected):
        attacks.run(model, tiny.tokenizer(), change.get("messages", TALKS[0]), change.get("target", "Sure"), config)


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(attacks.AttackError, match="optim_str_init is"):
        attacks.GCGConfig(optim_str_init=())
    with pytest.raises(attacks.AttackError, match="optim_str_init is ''"):
        attacks.GCGConfig(optim_str_init="")
    with pytest.raises(attacks.AttackError, match="mellowmax_alpha is 0"):
        attacks.GCGConfig(mellowmax_alpha=0.0)
    with pytest.raises(attacks.AttackError, match="topk is 100000"):
        attacks.run(tiny.hf_model("llama"), tiny.tokenizer(), TALKS[0], "Sure", attacks.GCGConfig.nanogcg(topk=100_000))
    assert attacks.GCGConfig(verbosity="WARNING").verbosity == "WARNING"  # nanoGCG's users set it


@pytest.mark.parametrize("name", ["get_input_embeddings", "get_output_embeddings"])
def test_a_model_without_embeddings_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hf_model("llama")
    monkeypatch.setattr(model, name, lambda: None)
    with pytest.raises(attacks.AttackError, match=name):
        attacks.run(model, tiny.tokenizer(), TALKS[0], "Sure", attacks.GCGConfig(**SMALL))


def test_a_template_that_leaves_the_suffix_out_is_refused() -> None:
    tok = copy.deepcopy(tiny.tokenizer())
    tok.chat_template = "{{ messages[-1]['content'] }}"
    talk = [{"role": "user", "content": "Hi {optim_str}"}, {"role": "assistant", "content": "Yes?"}]
    with pytest.raises(attacks.AttackError, match="0 times instead of once"):
        attacks.build_slot(tok, talk, "Sure", INIT)


def test_a_suffix_that_opens_its_turn_keeps_its_beginning() -> None:
    """Templates that trim a turn would take a first space away, and the model would read other tokens."""
    tok = tiny.tokenizer()
    ids = torch.tensor([tok(text, add_special_tokens=False).input_ids[:2] for text in (" rain wind", "rain wind")])
    for talk, expected in (("{optim_str} Sing", [False, True]), ("Sing{optim_str} now", [True, True])):
        slot = attacks.build_slot(tok, talk, "Sure", INIT)
        assert survives(tok, [slot], ids).tolist() == expected, talk
    slot = attacks.build_slot(tok, "{optim_str} Sing", "Sure", INIT)
    assert slot.opens_turn and not attacks.build_slot(tok, "Sing{optim_str}", "Sure", INIT).opens_turn


@pytest.mark.parametrize("width", [1, 12])
def test_what_is_refused_or_repeated_is_drawn_again(width: int) -> None:
    """8 positions × 4 tokens are 32 candidates, of which about half are refused: many draws repeat or fail."""
    ids, forbidden = torch.full((8,), 300), torch.arange(10)
    gradient = torch.randn(8, 700, generator=torch.Generator().manual_seed(0))
    answers: list[bool] = []

    def keep(rows: torch.Tensor) -> torch.Tensor:
        fits = rows.sum(dim=1) % 2 == 0
        answers.extend(fits.tolist())
        return fits

    config = attacks.GCGConfig(search_width=width, topk=4)
    found, refused = draw(ids, gradient, forbidden, config, torch.Generator().manual_seed(1), keep)
    rows = list(map(tuple, found.tolist()))
    assert len(rows) == len(set(rows)) == width and tuple(ids.tolist()) not in rows
    assert bool((found.sum(dim=1) % 2 == 0).all())
    assert refused == answers.count(False) > 0 or width == 1
    best = (-gradient.index_fill(1, forbidden, float("inf"))).topk(4, dim=1).indices
    for row in found:
        (place,) = (row != ids).nonzero().flatten().tolist()
        assert int(row[place]) in best[place]


def test_only_a_want_of_memory_is_taken_for_one() -> None:
    told = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    assert is_out_of_memory(RuntimeError(told))
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


class Starved(torch.nn.Module):
    """A model that runs out of memory with more than ``limit`` rows."""

    def __init__(self, model: Any, limit: int) -> None:
        super().__init__()
        self.inner, self.limit, self.tried = model, limit, []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, input_ids: Any = None, cache: Any = None, **others: Any) -> Any:
        if input_ids is not None:
            self.tried.append(len(input_ids))
            if len(input_ids) > self.limit:
                raise torch.OutOfMemoryError("out of memory")
        return self.inner(input_ids=input_ids, **others, **{cache_argument(self.inner): cache})


def test_batches_are_halved_until_they_fit_and_nothing_else_changes() -> None:
    slot = attacks.build_slot(tiny.tokenizer(), TALKS[0], "Sure, here", INIT)
    ids = slot.suffix_ids.repeat(16, 1)
    ids[:, 3] = torch.arange(300, 316)
    config = attacks.GCGConfig(use_prefix_cache=False)
    model = Starved(tiny.hf_model("llama"), limit=3)
    scorer = Scorer(model, [slot], config)
    found, _ = scorer(ids)
    assert model.tried[:4] == [16, 8, 4, 2] and scorer.batch_size == 2
    torch.testing.assert_close(found, Scorer(tiny.hf_model("llama"), [slot], config)(ids)[0])
    with pytest.raises(attacks.AttackError, match="not enough memory on cpu for one candidate"):
        Scorer(Starved(tiny.hf_model("llama"), limit=0), [slot], config)(ids)


def test_the_search_is_never_wider_than_the_model() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        attack = attacks.GCG(
            tiny.hf_model("llama", dtype=dtype), tiny.tokenizer(), TALKS[0], "Sure", attacks.GCGConfig.nanogcg(topk=32)
        )
        assert attack.search.model.dtype == dtype and attack.exact is None


def test_losses_that_are_not_finite_are_named() -> None:
    model = tiny.hf_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(attacks.AttackError, match=r"conversation 0 is not finite \(nan\) in torch.float32; the"):
        attacks.run(model, tiny.tokenizer(), TALKS[0], "Sure", attacks.GCGConfig(**SMALL))


@pytest.mark.parametrize("name", ["num_steps", "search_width", "topk", "n_replace", "batch_size"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(attacks.AttackError, match=f"{name} is 0"):
        attacks.GCGConfig(**{name: 0})


def test_a_tokenizer_that_drops_the_first_space_can_be_attacked() -> None:
    """As Llama 2's, Mistral's and Phi-3's do, whose decoders strip the space of the word a text begins with."""
    tok = tiny.metaspace_tokenizer()
    assert tok.decode(tok(" rain", add_special_tokens=False).input_ids) == "rain"
    model = tiny.hf_model("llama")
    talks = [[{"role": "user", "content": f"{text} {attacks.PLACEHOLDER}"}] for text in ("Write a poem", "Sing")]
    found = attacks.run(model, tok, talks, "Sure", attacks.GCGConfig(**{**SMALL, "num_steps": 3}))
    assert len(set(found.strings)) == 3
    for talk, string, step in zip(talks * 2, found.strings, found.steps, strict=False):
        slot = attacks.build_slot(tok, talk, "Sure", string)
        assert tuple(slot.suffix_ids.tolist()) == step.ids, "what is typed is what was scored"
    slots = [attacks.build_slot(tok, talk, "Sure", "x") for talk in talks]
    for made in (attacks.random_suffixes(tok, slots, 3, 6, 0, 700), attacks.benign_suffixes(tok, slots, 3, 6)):
        assert len(made) == 3
        for text, ids in made:
            assert tuple(attacks.build_slot(tok, talks[0], "Sure", text).suffix_ids.tolist()) == ids
