"""The attack engine on tiny models: nanoGCG's trajectory, exact speed-ups, context tokenisation, resume."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import nanogcg
import pytest
import torch

import attacks
from attacks import gcg
from attacks.candidates import compat_gradient, token_gradient
from attacks.gcg import at_step
from attacks.grouping import first_changes, group_by_start
from attacks.nanogcg import compat_slot, run_nanogcg
from attacks.scorer import Scorer, rescored_best
from attacks.slot import survives
from tests import tiny

INIT = "x x x x x x x x"
SMALL: dict[str, Any] = {"num_steps": 6, "search_width": 24, "topk": 32, "optim_str_init": INIT, "seed": 7}
TALKS = ["Write a poem about rain {optim_str}", "Bake a cake {optim_str}", "Sing {optim_str} now"]
SETTINGS = [
    {},
    {"n_replace": 2},
    {"use_mellowmax": True},
    {"buffer_size": 4},
    {"buffer_size": 4, "n_replace": 2},
    {"early_stop": True},
    {"filter_ids": False, "allow_non_ascii": True},
]


@pytest.fixture
def _quick_nanogcg(monkeypatch: pytest.MonkeyPatch) -> None:
    """nanogcg collects garbage after every batch: 0.2 s each time in a test process, and nothing else."""
    monkeypatch.setattr(nanogcg.gcg.gc, "collect", lambda: 0)


@pytest.mark.usefixtures("_quick_nanogcg")
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gemma2", "gemma3_text"])
def test_compat_mode_repeats_nanogcg(family: str, changes: dict[str, Any]) -> None:
    model = tiny.hf_model(family)
    config = attacks.GCGConfig.nanogcg(**{**SMALL, "num_steps": 20, **changes})
    ours = attacks.run(model, tiny.tokenizer(), "Write a poem", "Sure, here", config)
    theirs = run_nanogcg(model, tiny.tokenizer(), "Write a poem", "Sure, here", config)
    assert ours.strings == theirs.strings
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-5)
    assert ours.best_string == theirs.best_string


def test_nothing_global_is_left_behind() -> None:
    model, state = tiny.hf_model("llama"), torch.get_rng_state()
    attacks.run(model, tiny.tokenizer(), "Write a poem", "Sure", attacks.GCGConfig(**{**SMALL, "num_steps": 1}))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(p.grad is None for p in model.parameters())
    run_nanogcg(model, tiny.tokenizer(), "Write a poem", "Sure", attacks.GCGConfig(**{**SMALL, "num_steps": 1}))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def plain_loss(model: Any, slot: attacks.Slot, ids: torch.Tensor) -> float:
    """The loss by its definition: one whole forward, no cache, all logits."""
    whole = torch.cat([slot.before_ids, ids, slot.after_ids, slot.target_ids])
    with torch.no_grad():
        logits = model(input_ids=whole[None]).logits[0]
    n = len(slot.target_ids)
    return float(torch.nn.functional.cross_entropy(logits[-n - 1 : -1], slot.target_ids))


@pytest.mark.parametrize("cache", [True, False])
def test_scores_are_the_definition(family: str, cache: bool) -> None:
    model = tiny.hf_model(family)
    slots = [attacks.build_slot(tiny.tokenizer(), talk, "Sure, here", INIT) for talk in TALKS]
    config = attacks.GCGConfig(use_prefix_cache=cache, batch_size=3)
    ids = slots[0].suffix_ids.repeat(7, 1)
    ids[torch.arange(7), torch.arange(7)] = torch.arange(300, 307)
    losses, _ = Scorer(model, slots, config)(ids)
    exact = torch.tensor([[plain_loss(model, slot, row) for slot in slots] for row in ids])
    torch.testing.assert_close(losses, exact, atol=2e-5, rtol=0)
    # a second call must not see the first one's tokens in its prefix
    torch.testing.assert_close(Scorer(model, slots, config)(ids)[0], losses, atol=1e-6, rtol=0)


def test_sharing_the_unchanged_part_changes_no_loss(family: str) -> None:
    model = tiny.hf_model(family)
    slots = [attacks.build_slot(tiny.tokenizer(), talk, "Sure, here", INIT) for talk in TALKS]
    current = slots[0].suffix_ids
    ids = current.repeat(200, 1)
    where = torch.arange(200) % len(current)
    ids[torch.arange(200), where] = torch.arange(300, 500)
    ids[7] = current
    scorer = Scorer(model, slots, attacks.GCGConfig())
    losses, matched = scorer(ids)
    shared, also = scorer(ids, current)
    torch.testing.assert_close(shared, losses, atol=2e-6, rtol=1e-5)
    assert torch.equal(matched, also)
    assert len(group_by_start(first_changes(ids, current), len(current), 8, 25)) > 1, "nothing was shared"


def test_gradient_is_the_slope_of_the_definition(family: str) -> None:
    """d loss / d s of a whole plain forward in which s of another token's embedding is mixed in at one position."""
    model = tiny.hf_model(family)
    slot = attacks.build_slot(tiny.tokenizer(), TALKS[0], "Sure, here", INIT)
    config = attacks.GCGConfig()
    grad = token_gradient(model, [slot], Scorer(model, [slot], config).caches, slot.suffix_ids, config)
    whole = torch.cat([slot.before_ids, slot.suffix_ids, slot.after_ids, slot.target_ids])
    embed, n = model.get_input_embeddings(), len(slot.target_ids)
    for position, token in ((0, 345), (2, 600), (7, 20)):
        share = torch.zeros((), requires_grad=True)
        mixed = embed(whole).detach()
        mixed[len(slot.before_ids) + position] += share * embed(torch.tensor(token)).detach()
        logits = model(inputs_embeds=mixed[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[-n - 1 : -1], slot.target_ids)
        (slope,) = torch.autograd.grad(loss, share)
        assert float(grad[position, token]) == pytest.approx(float(slope), rel=1e-3, abs=1e-5)


def test_nanogcgs_gradient_differs_where_the_embedding_layer_scales() -> None:
    model, config = tiny.hf_model("gemma3_text"), attacks.GCGConfig()
    slot = compat_slot(tiny.tokenizer(), "Write a poem", "Sure", INIT)
    native = token_gradient(model, [slot], [None], slot.suffix_ids, config)
    theirs = compat_gradient(model, slot, slot.suffix_ids, config)
    assert not torch.allclose(native, theirs, rtol=0.1)
    plain = tiny.hf_model("llama")
    torch.testing.assert_close(
        token_gradient(plain, [slot], [None], slot.suffix_ids, config),
        compat_gradient(plain, slot, slot.suffix_ids, config),
        atol=1e-5,
        rtol=1e-4,
    )


def test_universal_loss_is_the_mean_and_falls(family: str) -> None:
    model = tiny.hf_model(family)
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 15})
    found = attacks.run(model, tiny.tokenizer(), TALKS, "Sure, here", config)
    for step in found.steps:
        assert step.loss == pytest.approx(sum(step.per_goal) / 3, abs=1e-6)
        assert step.n_candidates == config.search_width
    assert found.best_loss < found.losses[0]
    # the reported string, put into the conversation by a user, is what was scored
    for talk, loss in zip(TALKS, min(found.steps, key=lambda s: s.loss).per_goal, strict=True):
        slot = attacks.build_slot(tiny.tokenizer(), talk, "Sure, here", found.best_string)
        assert slot.suffix_ids.tolist() == list(found.best_ids)
        assert plain_loss(model, slot, slot.suffix_ids) == pytest.approx(loss, abs=2e-5)


def test_low_precision_search_reports_full_precision_losses() -> None:
    model = tiny.hf_model("llama")
    config = attacks.GCGConfig(**{**SMALL, "score_dtype": "bfloat16"})
    found = attacks.run(model, tiny.tokenizer(), TALKS[0], "Sure, here", config)
    slot = attacks.build_slot(tiny.tokenizer(), TALKS[0], "Sure, here", INIT)
    for step in found.steps:
        assert step.loss == pytest.approx(plain_loss(model, slot, torch.tensor(step.ids)), abs=2e-5)
    assert next(model.parameters()).dtype == torch.float32


def test_only_what_the_searchs_error_could_hide_is_scored_again() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    slot = attacks.build_slot(tok, TALKS[0], "Sure, here", INIT)
    config = attacks.GCGConfig(rescore=8)
    exact = Scorer(model, [slot], config)
    search = Scorer(tiny.hf_model("llama", dtype=torch.bfloat16), [slot], config)
    ids = slot.suffix_ids.repeat(40, 1)
    ids[torch.arange(40), torch.arange(40) % 8] = torch.arange(300, 340)
    truth = exact(ids)[0][:, 0]
    winner, _, _ = rescored_best(search, exact, ids)
    assert winner == int(truth.argmin())
    first = exact.flops
    assert search.error is not None
    assert 0 < search.error < 0.2
    winner, losses, _ = rescored_best(search, exact, ids)
    assert winner == int(truth.argmin())
    assert float(losses) == pytest.approx(float(truth.min()), abs=1e-5)
    assert exact.flops - first < first


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
    {"score_dtype": "float32", "buffer_size": 3},
    {"score_dtype": "bfloat16", "buffer_size": 3},
    {"momentum": 0.5, "n_replace_start": 3, "even_positions": True, "search_width_start": 40},
    {"progressive_goals": True, "patience": 2},
]


@pytest.mark.parametrize("changes", EXTRAS, ids=str)
def test_resume_is_bit_for_bit(changes: dict[str, Any]) -> None:
    model, tok = tiny.hf_model("qwen3"), tiny.tokenizer()
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 12, **changes})
    whole = list(attacks.GCG(model, tok, TALKS, "Sure", config).steps())
    first = attacks.GCG(model, tok, TALKS, "Sure", config)
    steps = first.steps()
    for _ in range(5):
        next(steps)
    state = json.loads(json.dumps(first.state()))
    second = attacks.GCG(model, tok, TALKS, "Sure", config)
    second.restore(state)
    rest = list(second.steps())
    assert [(s.step, s.loss, s.ids) for s in rest] == [(s.step, s.loss, s.ids) for s in whole[5:]]


def test_goals_join_when_the_present_ones_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    config = attacks.GCGConfig(**SMALL, progressive_goals=True)
    attack = attacks.GCG(model, tok, TALKS, "Sure", config)
    original = gcg.rescored_best

    def met_at_step_2(*args: Any) -> Any:
        winner, losses, matched = original(*args)
        return winner, losses, torch.full_like(matched, attack.step == 1)

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
    config = attacks.GCGConfig(**{**SMALL, "num_steps": 8, "search_width": 6}, search_width_start=14)
    steps = list(attacks.GCG(tiny.hf_model("llama"), tiny.tokenizer(), "Sing", "Sure", config).steps())
    assert [step.n_candidates for step in steps] == [14, 12, 10, 8, 6, 6, 6, 6]


def test_nothing_that_nanogcg_lacks_is_on_in_compatibility_mode() -> None:
    extras = {f.name for f in fields(attacks.GCGConfig)} - {f.name for f in fields(nanogcg.GCGConfig)}
    plain = attacks.GCGConfig.nanogcg()
    off = {name: getattr(plain, name) for name in extras - {"score_dtype", "rescore", "compat"}}
    assert not any(off.values()), off


def test_flops_count_every_token_that_is_run() -> None:
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    slot = attacks.build_slot(tok, TALKS[0], "Sure, here", INIT)
    scorer = Scorer(model, [slot], attacks.GCGConfig())
    scorer(slot.suffix_ids.repeat(3, 1))
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n and "lm_head" not in n)
    n_target = len(slot.target_ids)
    tokens = 3 * (len(slot.suffix_ids) + len(slot.after_ids) + n_target - 1)
    assert scorer.flops == 2 * (body * tokens + head * 3 * n_target)


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


BAD: list[tuple[dict[str, Any], str]] = [
    ({"target": ""}, "target is empty"),
    ({"messages": []}, "no conversation"),
    ({"messages": "a {optim_str} b {optim_str}"}, "2 times"),
    ({"messages": ["a", "b"], "target": ["x"]}, "2 conversations but 1 targets"),
    ({"messages": "word " * 700}, "the model takes 512"),
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


def test_losses_that_are_not_finite_are_named() -> None:
    model = tiny.hf_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(attacks.AttackError, match="conversation 0 is not finite"):
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


def test_compat_mode_stops_at_any_candidates_match(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hf_model("llama")
    config = attacks.GCGConfig.nanogcg(**{**SMALL, "early_stop": True})
    attack = attacks.GCG(model, tiny.tokenizer(), "Write a poem", "Sure, here", config)
    first = next(attack.steps())
    assert not first.matched, "nothing has matched yet"
    attack.search.seen_match = True  # a candidate matched that another one beat
    assert [step.matched for step in attack.steps()] == [True]
