"""The attack engine's search on tiny models: several goals, schedules, context tokenisation, controls, resume."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import attacks
from attacks import gcg
from attacks.gcg import at_step
from attacks.slot import survives
from tests import tiny
from tests.small_attacks import INIT, SMALL, TALKS, plain_loss


def test_universal_loss_is_the_mean_and_falls(family: str) -> None:
    model = tiny.hf_model(family)
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 15})
    found = attacks.run(model, tiny.tokenizer(), TALKS, "Sure, here", config)
    for step in found.steps:
        assert step.loss == pytest.approx(sum(step.per_goal) / 3, abs=1e-6)
        assert config.search_width <= step.n_candidates < config.search_width + config.merge
    assert found.best_loss < found.losses[0]
    # the reported string, put into the conversation by a user, is what was scored
    for talk, loss in zip(TALKS, min(found.steps, key=lambda s: s.loss).per_goal, strict=True):
        slot = attacks.build_slot(tiny.tokenizer(), talk, "Sure, here", found.best_string)
        assert slot.suffix_ids.tolist() == list(found.best_ids)
        assert plain_loss(model, slot, slot.suffix_ids) == pytest.approx(loss, abs=2e-5)


def test_every_candidate_retokenises_in_context() -> None:
    tok, model = tiny.tokenizer(), tiny.hf_model("llama")
    config = attacks.GCGConfig(**SMALL)
    attack = attacks.GCG(model, tok, TALKS, "Sure", config)
    for step in attack.steps():
        assert bool(survives(tok, attack.slots, torch.tensor([step.ids]))[0])
        text = tok.apply_chat_template(
            [{"role": "user", "content": "Bake a cake " + step.string}], tokenize=False, add_generation_prompt=True
        )
        slot = attack.slots[1]
        assert tok(text, add_special_tokens=False).input_ids == (
            slot.before_ids.tolist() + list(step.ids) + slot.after_ids.tolist()
        )


EXTRAS: list[dict[str, Any]] = [
    {"score_dtype": "bfloat16", "buffer_size": 3},
    {"momentum": 0.5, "n_replace_start": 3, "even_positions": True, "search_width_start": 40},
    {"score_dtype": "float32", "buffer_size": 3},
    {"progressive_goals": True, "patience": 2, "merge": 4},
]


@pytest.mark.parametrize(
    "changes", [*EXTRAS[:2], *(pytest.param(extra, marks=pytest.mark.slow) for extra in EXTRAS[2:])], ids=str
)
def test_resume_is_bit_for_bit(changes: dict[str, Any]) -> None:
    model, tok = tiny.hf_model("qwen3"), tiny.tokenizer()
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 12, **changes})
    whole = list(attacks.GCG(model, tok, TALKS, "Sure", config).steps())
    first = attacks.GCG(model, tok, TALKS, "Sure", config)
    steps = first.steps()
    for _ in range(5):
        next(steps)
    assert timeless(continued(first)) == timeless(whole[5:])


def continued(attack: attacks.GCG) -> list[attacks.Step]:
    """The rest of an attack from its state alone, in a new object."""
    state = json.loads(json.dumps(attack.state()))
    other = attacks.GCG(attack.model, attack.tokenizer, attack.conversations, "Sure", attack.config)
    other.restore(state)
    return list(other.steps())


def timeless(steps: list[attacks.Step]) -> list[attacks.Step]:
    """Steps without how long they took."""
    return [dataclasses.replace(step, seconds=0.0) for step in steps]


def test_resume_keeps_goals_that_have_joined_and_the_way_back_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """One goal joins at step 2, and two candidates a step with a short patience go back to the best again and again."""
    changes = {"num_steps": 14, "search_width": 2, "patience": 2, "progressive_goals": True, "merge": 0}
    config = attacks.GCGConfig(**SMALL | changes)
    original = gcg.rescored_best

    def met_at_step_2(search: Any, *args: Any) -> Any:
        won = original(search, *args)
        return dataclasses.replace(won, matched=torch.full_like(won.matched, attack.step == 1))

    monkeypatch.setattr(gcg, "rescored_best", met_at_step_2)
    model, tok = tiny.hf_model("qwen3"), tiny.tokenizer()
    attack = attacks.GCG(model, tok, TALKS, "Sure", config)
    whole = list(attack.steps())
    attack = attacks.GCG(model, tok, TALKS, "Sure", config)
    steps = attack.steps()
    for _ in range(7):
        next(steps)
    attack.search.batch_size = 1
    monkeypatch.setattr(gcg, "rescored_best", original)
    rest = continued(attack)
    assert [len(step.per_goal) for step in rest] == [2] * 7
    keep = [(s.step, s.ids, s.best_ids, s.best_string, s.n_candidates, s.n_rejected) for s in rest]
    assert keep == [(s.step, s.ids, s.best_ids, s.best_string, s.n_candidates, s.n_rejected) for s in whole[7:]]
    state = json.loads(json.dumps(attack.state()))
    other = attacks.GCG(model, tok, TALKS, "Sure", config)
    other.restore(state)
    assert json.loads(json.dumps(other.state())) == state
    assert (other.search.batch_size, other.search.active, other.best_step) == (1, 2, attack.best_step)


def test_an_attack_that_has_stopped_early_stays_stopped() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    slot = attacks.build_slot(tok, TALKS[1], "x", INIT)
    with torch.no_grad():
        logits = model(input_ids=torch.cat([slot.before_ids, slot.suffix_ids, slot.after_ids])[None]).logits
    target = tok.decode(logits[0, -1].argmax())  # what the model says anyway
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 30}, early_stop=True)
    attack = attacks.GCG(model, tok, TALKS[1], target, config)
    steps = list(attack.steps())
    assert steps[-1].matched and len(steps) < 30
    other = attacks.GCG(model, tok, TALKS[1], target, config)
    other.restore(json.loads(json.dumps(attack.state())))
    assert list(other.steps()) == []


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("generator", "00ff"), ("generator", "no hex"), ("velocity", {"shape": [1], "data": "AAAA"}), ("velocity", 5),
        ("batches", []), ("best", []), ("buffer", []), ("buffer", [[1.0, [1]], [1.0, [1, 2]]]), ("active", 9),
        ("buffer", [[1.0, [10**6]]]), ("step", "a"), ("seen_match", None), ("search_dtype", "float7"),
    ],
)  # fmt: skip
def test_a_damaged_state_is_named(part: str, value: Any) -> None:
    config = attacks.GCGConfig(**SMALL, momentum=0.5)
    attack = attacks.GCG(tiny.hf_model("llama"), tiny.tokenizer(), TALKS, "Sure", config)
    next(attack.steps())
    state = json.loads(json.dumps(attack.state()))
    with pytest.raises(attacks.AttackError, match=r"damaged|precision|searching in"):
        attack.restore(state | {part: value})
    with pytest.raises(attacks.AttackError, match=f"damaged .{part}: Field required"):
        attack.restore({key: kept for key, kept in state.items() if key != part})


OTHER: list[dict[str, Any]] = [
    {"target": "Yes"}, {"talks": TALKS[::-1]}, {"config": {"seed": 8}}, {"config": {"merge": 0}},
    {"config": {"optim_str_init": INIT.replace("x", "y")}}, {"terms": (attacks.SuffixAttention(),)},
]  # fmt: skip


@pytest.mark.parametrize("change", OTHER, ids=str)
def test_a_state_of_another_attack_is_refused(change: dict[str, Any]) -> None:
    def made(**changes: Any) -> attacks.GCG:
        config = attacks.GCGConfig(**{**SMALL, **changes.get("config", {})})
        talks, target = changes.get("talks", TALKS), changes.get("target", "Sure")
        return attacks.GCG(model, tiny.tokenizer(), talks, target, config, changes.get("terms", ()))

    model = tiny.hf_model("llama")
    attack = made()
    next(attack.steps())
    state = json.loads(json.dumps(attack.state()))
    with pytest.raises(attacks.AttackError, match="of another attack"):
        made(**change).restore(state)
    longer = made(config={"num_steps": 9, "batch_size": 4})
    longer.restore(state)
    assert [step.step for step in longer.steps()] == [2, 3, 4, 5, 6, 7, 8, 9], "more steps are the same attack"


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_an_attack_goes_on_in_the_precision_it_began_in(first: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" measures may be otherwise when it goes on, on this machine or on another."""
    model, config = tiny.hf_model("llama"), attacks.GCGConfig(**SMALL)
    monkeypatch.setattr("attacks.precision.fast_dtype", lambda device: first)
    whole = list(attacks.GCG(model, tiny.tokenizer(), TALKS, "Sure", config).steps())
    attack = attacks.GCG(model, tiny.tokenizer(), TALKS, "Sure", config)
    steps = attack.steps()
    for _ in range(3):
        next(steps)
    state = json.loads(json.dumps(attack.state()))
    other = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[first]
    monkeypatch.setattr("attacks.precision.fast_dtype", lambda device: other)
    again = attacks.GCG(model, tiny.tokenizer(), TALKS, "Sure", config)
    assert again.search.model.dtype == other
    again.restore(state)
    assert again.search.model.dtype == first
    assert [(s.ids, s.loss) for s in again.steps()] == [(s.ids, s.loss) for s in whole[3:]]


def test_a_state_of_another_precision_is_refused() -> None:
    tok, config = tiny.tokenizer(), attacks.GCGConfig(**SMALL, score_dtype="bfloat16")
    state = attacks.GCG(tiny.hf_model("llama"), tok, TALKS, "Sure", config).state()
    other = attacks.GCG(tiny.hf_model("llama", dtype=torch.bfloat16), tok, TALKS, "Sure", config)
    with pytest.raises(attacks.AttackError, match=r"another precision than torch\.bfloat16"):
        other.restore(state)


def test_goals_join_when_the_present_ones_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    config = attacks.GCGConfig(**SMALL, progressive_goals=True)
    attack = attacks.GCG(model, tok, TALKS, "Sure", config)
    original = gcg.rescored_best

    def met_at_step_2(*args: Any) -> Any:
        won = original(*args)
        return dataclasses.replace(won, matched=torch.full_like(won.matched, attack.step == 1))

    monkeypatch.setattr(gcg, "rescored_best", met_at_step_2)
    steps = list(attack.steps())
    assert [len(step.per_goal) for step in steps] == [1, 1, 2, 2, 2, 2]
    assert not any(step.matched for step in steps)
    slot = attacks.build_slot(tok, TALKS[0], "Sure", INIT)
    both = [plain_loss(model, attacks.build_slot(tok, t, "Sure", INIT), torch.tensor(steps[1].ids)) for t in TALKS[:2]]
    assert len(slot.suffix_ids) == len(steps[1].ids)
    # from the third step on "best" is a loss over both goals
    assert steps[2].best_loss == pytest.approx(min(steps[2].loss, sum(both) / 2), abs=1e-5)
    assert gcg.result(steps).best_loss == min(step.loss for step in steps[2:])


def test_patience_goes_back_to_the_best() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 30, "search_width": 2}, patience=1)
    attack = attacks.GCG(model, tok, "Write a poem", "Sure", config)
    went_back = 0
    for step in attack.steps():
        if step.loss > step.best_loss:
            assert attack.buffer[0][0] == step.best_loss
            went_back += 1
    assert went_back, "no step was worse than the best"


def test_more_tokens_are_replaced_at_the_beginning() -> None:
    config = attacks.GCGConfig(num_steps=20, n_replace_start=4, n_replace=1)
    assert [at_step(config, step).n_replace for step in (0, 5, 10, 19)] == [4, 2, 1, 1]
    assert at_step(attacks.GCGConfig(n_replace=2), 0).n_replace == 2


def test_the_search_narrows_or_widens_over_time() -> None:
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 8, "search_width": 6}, search_width_start=14, merge=0)
    steps = list(attacks.GCG(tiny.hf_model("llama"), tiny.tokenizer(), "Sing", "Sure", config).steps())
    assert [step.n_candidates for step in steps] == [14, 12, 10, 8, 6, 6, 6, 6]


def test_controls_have_the_same_token_count_in_context() -> None:
    tok, model = tiny.tokenizer(), tiny.hf_model("llama")
    slots = [attacks.build_slot(tok, talk, "Sure", INIT) for talk in TALKS]
    made = attacks.random_suffixes(tok, slots, 4, 8, 1, model.get_input_embeddings().weight.shape[0])
    ids = torch.tensor(made[0][1])
    made += attacks.shuffled_suffixes(tok, slots, ids, 3, 2) + attacks.benign_suffixes(tok, slots, 3, 8)
    assert len({text for text, _ in made}) == len(made) >= 8
    for text, row in made:
        for talk in TALKS:
            assert attacks.build_slot(tok, talk, "Sure", text).suffix_ids.tolist() == list(row)
    for _, row in made[4:7]:
        assert sorted(row) == sorted(ids.tolist())


def test_the_best_of_several_initial_suffixes_begins() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    inits = ("x a b c", "a x b c", "b a x c", "c b a x")
    losses = [
        attacks.GCG(model, tok, TALKS[0], "Sure", attacks.GCGConfig(optim_str_init=init, search_width=8)).buffer[0][0]
        for init in inits
    ]
    for order in (inits, inits[::-1]):
        for size, kept in ((0, 1), (1, 1), (2, 2)):
            config = attacks.GCGConfig(optim_str_init=order, search_width=8, buffer_size=size)
            buffer = attacks.GCG(model, tok, TALKS[0], "Sure", config).buffer
            assert [loss for loss, _ in buffer] == pytest.approx(sorted(losses)[:kept], abs=1e-5)


def test_every_suffix_that_a_buffer_begins_with_survives() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    attack = attacks.GCG(model, tok, TALKS, "Sure", attacks.GCGConfig(**{**SMALL, "buffer_size": 6}))
    assert len(attack.buffer) == 6
    assert survives(tok, attack.slots, torch.tensor([ids for _, ids in attack.buffer])).all()
