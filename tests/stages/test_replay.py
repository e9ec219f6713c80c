"""Replays and what stands on them, on tiny random models of every architecture: each equals the full forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from suffix_analysis import causal, causal_tests
from suffix_analysis.errors import UserError
from suffix_analysis.generate import endless, generate
from suffix_analysis.models import Model
from suffix_analysis.refusal import refusal_score
from suffix_analysis.replay import Prepared, prepare, replay, reply
from tests import tiny
from tests.prepared import ARCHITECTURES, SUFFIX, TOKENS, Runs, readout, two_runs


@pytest.fixture(params=ARCHITECTURES, scope="module")
def runs(request: pytest.FixtureRequest) -> Runs:
    return two_runs(request.param)


def whole(model: Model, run: Prepared, hooks: list[causal.Hook]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and projection at chat[-1] of full forwards, one prompt at a time, with hooks that know no cache."""
    read, logits, projection = readout(model), [], []
    for chat in run.chats:
        seen: list[torch.Tensor] = []

        def look(x: torch.Tensor, hook: Any, seen: list[torch.Tensor] = seen) -> None:
            seen.append(x[0, -1].float() @ read.unit)

        with torch.no_grad(), model.bridge.hooks(fwd_hooks=[*hooks, ("blocks.2.hook_resid_pre", look)]):
            logits.append(model.hf(input_ids=chat.ids[None]).logits[0, -1].float())
        projection.append(seen[0])
    return torch.stack(logits), torch.stack(projection)


def close(found: causal.Outcome, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(found.score, refusal_score(expected[0], TOKENS), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.projection, expected[1], atol=1e-5, rtol=1e-5)


def test_a_replay_equals_the_full_forward(runs: Runs) -> None:
    model, _, attacked = runs
    logits, projection = whole(model, attacked, [])
    torch.testing.assert_close(attacked.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(replay(attacked), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(replay(attacked, start=2), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(replay(attacked, copies=3)[::3], logits, atol=1e-5, rtol=1e-5)
    close(causal.base(attacked, readout(model)), (logits, projection))


def test_a_replaced_head_equals_the_full_recompute(runs: Runs) -> None:
    model, _, attacked = runs
    n, layer, head = attacked.n_chat, 1, 2

    def zero(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[:, -n:, head] = 0
        return z

    nothing = torch.zeros_like(attacked.z[0])
    found = causal.measure(attacked, causal.replaced([(layer, head)], nothing), readout(model))
    close(found, whole(model, attacked, [(f"blocks.{layer}.attn.hook_z", zero)]))
    sweep = causal.head_sweep(attacked, nothing, readout(model))
    plain = causal.base(attacked, readout(model))
    torch.testing.assert_close(sweep.score[:, layer, head], found.score - plain.score, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        sweep.projection[:, layer, head], found.projection - plain.projection, atol=1e-5, rtol=1e-5
    )
    later = sweep.projection[:, 2:]
    assert float(later.abs().max()) == 0, "heads behind the readout cannot move it"


@pytest.mark.parametrize(("renormalise", "at"), [(True, None), (False, None), (True, -1), (False, -2)])
def test_cut_edges_equal_the_full_recompute(runs: Runs, renormalise: bool, at: int | None) -> None:
    model, _, attacked = runs
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    places = range(-attacked.n_chat, 0) if at is None else [at]
    name = "hook_attn_scores" if renormalise else "hook_pattern"
    for chat in attacked.chats:
        source = chat.regions["suffix"]

        def forbid(x: torch.Tensor, hook: Any, source: torch.Tensor = source) -> torch.Tensor:
            x = x.clone()
            for place in places:
                x[:, 1:3, place, source] = torch.finfo(x.dtype).min if renormalise else 0.0
            return x

        one = prepare(model, [chat])
        hooks: list[causal.Hook] = [(f"blocks.{layer}.attn.{name}", forbid) for layer in range(model.n_layers)]
        found.append(whole(model, one, hooks))
    heads = [(layer, head) for layer in range(model.n_layers) for head in (1, 2)]
    cut = causal.cut(attacked, "suffix", heads, renormalise=renormalise, at=at)
    close(
        causal.measure(attacked, cut, readout(model)),
        (torch.cat([logits for logits, _ in found]), torch.cat([projection for _, projection in found])),
    )


def test_patching_all_heads_gives_the_other_run(runs: Runs) -> None:
    model, plain, attacked = runs
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    found = causal.measure(attacked, causal.replaced(every, plain.z), readout(model))
    expected = causal.base(plain, readout(model))
    torch.testing.assert_close(found.score, expected.score, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.projection, expected.projection, atol=1e-5, rtol=1e-5)


def test_transplanted_attention_is_the_controls_and_the_values_stay(runs: Runs) -> None:
    """Against a whole forward in which each prompt's rows at the chat tokens are written over one by one."""
    model, _, attacked = runs
    other = "y x z ! more"
    control = prepare(model, [model.chat(chat.instruction, other) for chat in attacked.chats])
    assert torch.equal(control.mask, attacked.mask) and other != SUFFIX
    heads = [(layer, head) for layer in range(model.n_layers) for head in (1, 2)]
    n, found = attacked.n_chat, []
    for i, chat in enumerate(attacked.chats):
        one = prepare(model, [chat])
        length = len(chat.ids)

        def put(x: torch.Tensor, hook: Any, i: int = i, length: int = length) -> torch.Tensor:
            x = x.clone()
            layer = int(hook.name.split(".")[1])
            x[0, 1:3, -n:] = control.pattern[i, layer, 1:3, :, -length:].to(x)
            return x

        hooks: list[causal.Hook] = [(f"blocks.{layer}.attn.hook_pattern", put) for layer in range(model.n_layers)]
        found.append(whole(model, one, hooks))
    outcome = causal.measure(attacked, causal.transplanted(attacked, control, heads), readout(model))
    close(outcome, (torch.cat([x for x, _ in found]), torch.cat([x for _, x in found])))
    base = causal.base(attacked, readout(model))
    assert float((outcome.projection - base.projection).abs().max()) > 1e-3, "it changes something"


def test_a_step_along_a_random_direction_is_as_long_and_leaves_the_projection(
    runs: Runs,
) -> None:
    model, plain, attacked = runs
    read = readout(model)
    steps = causal.base(plain, read).projection - causal.base(attacked, read).projection
    seen: list[torch.Tensor] = []
    hooks = causal_tests._elsewhere(causal_tests.Runs(plain, attacked), read, seed=5)
    name = f"blocks.{read.layer}.hook_resid_pre"
    look = [(name, lambda x, hook: seen.append(x[:, -1].clone()))]
    replay(attacked, [*look, *hooks, *look])
    moved = (seen[1] - seen[0]).detach().float()
    torch.testing.assert_close(moved.norm(dim=-1), steps.abs(), atol=1e-4, rtol=1e-4)
    assert float((moved @ read.unit).abs().max()) < 1e-4 * float(moved.norm(dim=-1).max())
    assert float(steps.abs().min()) > 0


def test_a_runs_own_attention_transplanted_changes_nothing(runs: Runs) -> None:
    model, plain, attacked = runs
    heads = [(0, 1), (2, 3)]
    found = causal.measure(attacked, causal.transplanted(attacked, attacked, heads), readout(model))
    torch.testing.assert_close(found.score, causal.base(attacked, readout(model)).score, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="equal token counts"):
        causal.transplanted(attacked, plain, heads)


def test_restoring_sets_the_projection_and_a_dose_of_zero_changes_nothing(
    runs: Runs,
) -> None:
    model, plain, attacked = runs
    read = readout(model)
    levels = causal.base(plain, read).projection
    full = causal.measure(attacked, causal.shifted(read, levels), read)
    torch.testing.assert_close(full.projection, levels, atol=1e-4, rtol=1e-4)
    none = causal.measure(attacked, causal.shifted(read, levels, 0.0), read)
    assert torch.equal(none.score, causal.measure(attacked, [], read).score)


def test_replies_without_an_intervention_are_the_models_own(runs: Runs) -> None:
    model, _, attacked = runs
    expected = generate(model.hf, model.tokenizer, [chat.ids for chat in attacked.chats], 6)
    assert reply(attacked, [], 6) == expected
    first = generate(model.hf, model.tokenizer, [chat.ids for chat in attacked.chats], 1)
    assert reply(attacked, [], 1) == first


def test_a_reply_whose_first_token_ends_it_is_empty_and_leaves_the_others_alone(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, attacked = runs
    stop = int(attacked.logits[0].argmax())
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [stop])
    replies = reply(attacked, [], 10)
    assert replies[0] == ""
    assert replies == generate(model.hf, model.tokenizer, [chat.ids for chat in attacked.chats], 10)


def test_attribution_ranks_as_the_sweep_does() -> None:
    model = tiny.model("llama")
    run = prepare(model, [model.chat(text, SUFFIX) for text in tiny.TEXTS])
    # a small change, where first order is all there is
    values = run.z * 0.999
    exact, estimate = (f(run, values, readout(model)) for f in (causal.head_sweep, causal.attribution))
    torch.testing.assert_close(estimate.projection, exact.projection, atol=2e-5, rtol=0.05)
    correlation = torch.corrcoef(torch.stack([estimate.score.flatten().double(), exact.score.flatten().double()]))[0, 1]
    assert float(correlation) > 0.99


def test_bad_runs_are_refused_in_one_sentence() -> None:
    model = tiny.model("llama")
    with pytest.raises(UserError, match="no prompts to replay"):
        prepare(model, [])
    with pytest.raises(UserError, match="tiny-llama takes 512"):
        prepare(model, [model.chat("word " * 600)])
    small = tiny.model("mistral", sliding_window=16)
    with pytest.raises(UserError, match="looks back 16"):
        prepare(small, [small.chat("word " * 20)])


def test_replies_that_nothing_ends_all_have_the_length_that_is_asked_for() -> None:
    model = tiny.model("llama")
    rows = [model.chat(text).ids for text in ("Pick a lock", "Bake a cake")]
    (first,) = {int(model.hf(input_ids=row[None]).logits[0, -1].argmax()) for row in rows[:1]}
    model.hf.generation_config.eos_token_id = first  # what the first reply begins with ends it
    ended = generate(model.hf, model.tokenizer, rows, 5)
    with endless(model.hf):
        whole = generate(model.hf, model.tokenizer, rows, 5)
    assert ended[0] == "" and len(whole[0]) > 0
    assert generate(model.hf, model.tokenizer, rows, 5) == ended, "as it was before"
