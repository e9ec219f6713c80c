"""Replays and what stands on them, on tiny random models of every architecture: each equals the full forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from suffix_analysis import causal, causal_tests
from suffix_analysis.causal import Readout
from suffix_analysis.circuits import edge_rows, edge_weights, find_paths, kept_edges
from suffix_analysis.errors import UserError
from suffix_analysis.factors import FACTORS, shapley, split_change
from suffix_analysis.generate import endless, generate
from suffix_analysis.lens import logit_attribution, logit_lens
from suffix_analysis.mechanism import _terms
from suffix_analysis.mechanism_checks import state_error
from suffix_analysis.models import Model
from suffix_analysis.refusal import refusal_score
from suffix_analysis.replay import Prepared, aligned, prepare, replay, reply
from suffix_analysis.traces import trace
from tests import tiny

ARCHITECTURES = (
    "llama", "gemma", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "olmo3", "smollm3",
    "granite", "stablelm", "phi",
)  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {"granite": {"residual_multiplier": 0.4, "embedding_multiplier": 3.0}}
SUFFIX = "x y z ! more"
TOKENS = (40, 41)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def runs(request: pytest.FixtureRequest) -> tuple[Model, Prepared, Prepared]:
    """A model with prompts of several lengths, without and with a suffix."""
    own = "olmo2" if request.param == "olmo2" else None  # a line's end behind the user's text merges with its last sign
    model = tiny.model(request.param, format_name=own, **CHANGES.get(request.param, {}))
    tiny.shake(model.hf)
    plain, attacked = (prepare(model, [model.chat(t, suffix) for t in tiny.TEXTS]) for suffix in ("", SUFFIX))
    return model, plain, attacked


def readout(model: Model) -> Readout:
    vector = tiny.unit(model.d_model)
    return Readout(vector / vector.norm(), 2, TOKENS)


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


def test_a_replay_equals_the_full_forward(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, _, attacked = runs
    logits, projection = whole(model, attacked, [])
    torch.testing.assert_close(attacked.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(replay(attacked), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(replay(attacked, start=2), logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(replay(attacked, copies=3)[::3], logits, atol=1e-5, rtol=1e-5)
    close(causal.base(attacked, readout(model)), (logits, projection))


def test_a_replaced_head_equals_the_full_recompute(runs: tuple[Model, Prepared, Prepared]) -> None:
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
def test_cut_edges_equal_the_full_recompute(
    runs: tuple[Model, Prepared, Prepared], renormalise: bool, at: int | None
) -> None:
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


def test_patching_all_heads_gives_the_other_run(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, plain, attacked = runs
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    found = causal.measure(attacked, causal.replaced(every, plain.z), readout(model))
    expected = causal.base(plain, readout(model))
    torch.testing.assert_close(found.score, expected.score, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.projection, expected.projection, atol=1e-5, rtol=1e-5)


def test_transplanted_attention_is_the_controls_and_the_values_stay(runs: tuple[Model, Prepared, Prepared]) -> None:
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
    runs: tuple[Model, Prepared, Prepared],
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


def test_a_runs_own_attention_transplanted_changes_nothing(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, plain, attacked = runs
    heads = [(0, 1), (2, 3)]
    found = causal.measure(attacked, causal.transplanted(attacked, attacked, heads), readout(model))
    torch.testing.assert_close(found.score, causal.base(attacked, readout(model)).score, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="equal token counts"):
        causal.transplanted(attacked, plain, heads)


def test_restoring_sets_the_projection_and_a_dose_of_zero_changes_nothing(
    runs: tuple[Model, Prepared, Prepared],
) -> None:
    model, plain, attacked = runs
    read = readout(model)
    levels = causal.base(plain, read).projection
    full = causal.measure(attacked, causal.shifted(read, levels), read)
    torch.testing.assert_close(full.projection, levels, atol=1e-4, rtol=1e-4)
    none = causal.measure(attacked, causal.shifted(read, levels, 0.0), read)
    assert torch.equal(none.score, causal.measure(attacked, [], read).score)


def test_factors_sum_to_the_change_and_their_ends_are_the_two_runs(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, plain, attacked = runs
    split = split_change(plain, attacked, readout(model).unit)
    assert split.error < 1e-4
    mine = aligned(plain, attacked)
    extra = (attacked.regions["instruction"].sum(dim=1) - mine.regions["instruction"].sum(dim=1)).tolist()
    assert extra == ([0, 0, 0, 1, 0] if model.hf.config.model_type == "olmo2" else [0] * 5), "only the ? is merged"
    assert state_error(plain, mine) < 1e-5
    total = torch.stack([split.parts[name] for name in FACTORS]).sum(dim=0)
    torch.testing.assert_close(total, split.attacked - split.plain, atol=1e-5, rtol=1e-4)
    for name, run in (("plain", plain), ("attacked", attacked)):
        traced = trace(model, list(run.chats), readout(model).unit)
        own = traced.contribution[..., 2]  # the instruction
        same = [i for i, moved in enumerate(extra) if not moved]
        torch.testing.assert_close(getattr(split, name)[same], own[same], atol=1e-5, rtol=1e-3)


def test_terms_are_what_the_trace_finds_written(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, _, attacked = runs
    top, read = [(0, 1), (1, 3), (2, 0)], readout(model)
    traced = trace(model, list(attacked.chats), read.unit)
    below = [traced.head_contribution[:, layer, head] for layer, head in top if layer < read.layer]
    found = _terms(attacked, read, top).T
    assert not found.requires_grad, "or it cannot become a table"
    torch.testing.assert_close(found[0], torch.stack(below).sum(dim=0), atol=1e-5, rtol=1e-4)
    whole = traced.head_contribution[:, : read.layer].sum(dim=(1, 2)) + traced.attention_bias[: read.layer].sum()
    torch.testing.assert_close(found[1], whole - found[0], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found[2], traced.mlp_out[:, : read.layer].sum(dim=1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[3], traced.embedding, atol=1e-5, rtol=1e-4)


def test_paths_sum_to_what_the_heads_bring_from_chat_tokens(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, _, attacked = runs
    into = [(2, 1), (1, 3)]
    paths = find_paths(attacked, readout(model).unit, into)
    assert paths.error < 1e-4
    traced = trace(model, list(attacked.chats), readout(model).unit)
    for i, head in enumerate(into):
        torch.testing.assert_close(paths.direct[:, i], traced.contribution[:, head[0], head[1]], atol=1e-5, rtol=1e-3)
    written = attacked.mlp_out[:, :, -1].float() @ readout(model).unit
    torch.testing.assert_close(paths.mlps, written, atol=1e-5, rtol=1e-4)
    early = find_paths(attacked, readout(model).unit, into, below=1).mlps
    torch.testing.assert_close(early[:, :1], written[:, :1], atol=1e-5, rtol=1e-4)
    assert float(early[:, 1:].abs().max()) == 0, "MLPs behind the readout cannot have moved it"
    weights = edge_weights(paths)
    through = sum(w for key, w in weights.items() if key[0] == "early → head" and key[-1] == (2, 1))
    torch.testing.assert_close(through, paths.through_heads[:, 0].sum(dim=(1, 2, 3, 4)), atol=1e-5, rtol=1e-4)


def test_an_edges_weight_is_its_mean_over_prompts_and_suffixes(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, plain, attacked = runs
    found = [find_paths(run, readout(model).unit, [(2, 1), (1, 3)]) for run in (plain, attacked)]
    kept = kept_edges(found)
    rows = edge_rows({"none": found[:1], "adversarial": found}, kept)
    assert len(rows) == 2 * len(kept) and len(kept) > 4
    for row, key in zip(rows[len(kept) :], kept, strict=True):
        each = [float(edge_weights(paths)[key].mean()) for paths in found]
        assert (row["kind"], row["arm"], row["n_suffixes"]) == (key[0], "adversarial", 2)
        assert row["weight"] == pytest.approx(sum(each) / 2, rel=1e-5, abs=1e-9)
        assert row["lo"] <= row["weight"] <= row["hi"]
    assert {row["n_suffixes"] for row in rows[: len(kept)]} == {0}


def test_the_lens_ends_at_the_models_own_output(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, _, attacked = runs
    lens = logit_lens(attacked, TOKENS)
    assert lens.shape == (len(attacked), model.n_layers + 1)
    torch.testing.assert_close(lens[:, -1], refusal_score(attacked.logits, TOKENS), atol=1e-4, rtol=1e-4)


def test_direct_logit_attribution_adds_up(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, _, attacked = runs
    found = logit_attribution(model, attacked.chats, TOKENS)
    parts = (
        found.heads.sum(dim=(1, 2))
        + found.attention_bias.sum(dim=1)
        + found.mlp_out.sum(dim=1)
        + found.embedding
        + found.bias
    )
    torch.testing.assert_close(parts, found.total, atol=1e-4, rtol=1e-4)
    if model.hf.config.model_type in ("gemma2", "granite"):  # caps and scales stand behind what is attributed
        return
    difference = attacked.logits[:, list(TOKENS)].mean(dim=1) - attacked.logits.mean(dim=1)
    torch.testing.assert_close(found.total, difference, atol=1e-4, rtol=1e-4)


def test_replies_without_an_intervention_are_the_models_own(runs: tuple[Model, Prepared, Prepared]) -> None:
    model, _, attacked = runs
    expected = generate(model.hf, model.tokenizer, [chat.ids for chat in attacked.chats], 6)
    assert reply(attacked, [], 6) == expected
    first = generate(model.hf, model.tokenizer, [chat.ids for chat in attacked.chats], 1)
    assert reply(attacked, [], 1) == first


def test_a_reply_whose_first_token_ends_it_is_empty_and_leaves_the_others_alone(
    runs: tuple[Model, Prepared, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, attacked = runs
    stop = int(attacked.logits[0].argmax())
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", [stop])
    replies = reply(attacked, [], 10)
    assert replies[0] == ""
    assert replies == generate(model.hf, model.tokenizer, [chat.ids for chat in attacked.chats], 10)


def test_dominance_is_one_over_all_regions_and_traces_reach_every_chat_token(
    runs: tuple[Model, Prepared, Prepared],
) -> None:
    model, _, attacked = runs
    vector = readout(model).unit
    traced = trace(model, list(attacked.chats), vector)
    torch.testing.assert_close(
        traced.dominance.sum(dim=-1), torch.ones(len(attacked), model.n_layers), atol=1e-4, rtol=1e-4
    )
    other = trace(model, list(attacked.chats), vector, position=-2)
    torch.testing.assert_close(other.projection, attacked.resid[:, :, -2].float() @ vector, atol=1e-5, rtol=1e-4)
    assert other.identity < 1e-5
    with pytest.raises(UserError, match="position is 0"):
        trace(model, list(attacked.chats), vector, position=0)


def test_attribution_ranks_as_the_sweep_does() -> None:
    model = tiny.model("llama")
    run = prepare(model, [model.chat(text, SUFFIX) for text in tiny.TEXTS])
    # a small change, where first order is all there is
    values = run.z * 0.999
    exact, estimate = (f(run, values, readout(model)) for f in (causal.head_sweep, causal.attribution))
    torch.testing.assert_close(estimate.projection, exact.projection, atol=2e-5, rtol=0.05)
    correlation = torch.corrcoef(torch.stack([estimate.score.flatten().double(), exact.score.flatten().double()]))[0, 1]
    assert float(correlation) > 0.99


def test_shapley_parts_sum_and_divide_an_interaction_equally() -> None:
    values = {
        frozenset(): torch.tensor(0.0), frozenset("a"): torch.tensor(1.0), frozenset("b"): torch.tensor(0.0),
        frozenset("ab"): torch.tensor(3.0),
    }  # fmt: skip
    parts = shapley(values, ("a", "b"))
    assert float(parts["a"]) == 2.0 and float(parts["b"]) == 1.0


def test_bad_runs_are_refused_in_one_sentence() -> None:
    model = tiny.model("llama")
    with pytest.raises(UserError, match="no prompts to replay"):
        prepare(model, [])
    with pytest.raises(UserError, match="tiny-llama takes 512"):
        prepare(model, [model.chat("word " * 600)])
    one, two = (prepare(model, [model.chat(text)]) for text in tiny.TEXTS[:2])
    with pytest.raises(UserError, match="different instructions"):
        split_change(one, two, readout(model).unit)
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


def test_runs_whose_instructions_have_other_tokens_are_refused(runs: tuple[Model, Prepared, Prepared]) -> None:
    _, plain, _ = runs
    merged = [replace(chat, ids=chat.ids.flip(0)) for chat in plain.chats]
    with pytest.raises(UserError, match=r"'Bake a cake' has other tokens with the suffix"):
        aligned(plain, replace(plain, chats=tuple(merged)))
