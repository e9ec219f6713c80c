"""Splits of what happens at the last prompt token, on tiny random models of every architecture: each adds up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from suffix_analysis.circuits import edge_rows, edge_weights, find_paths, kept_edges
from suffix_analysis.errors import UserError
from suffix_analysis.factors import FACTORS, shapley, split_change
from suffix_analysis.lens import logit_attribution, logit_lens
from suffix_analysis.mechanism import _terms
from suffix_analysis.mechanism_checks import state_error
from suffix_analysis.refusal import refusal_score
from suffix_analysis.replay import aligned, prepare
from suffix_analysis.traces import trace
from tests import tiny
from tests.prepared import ARCHITECTURES, TOKENS, Runs, readout, two_runs


@pytest.fixture(params=ARCHITECTURES, scope="module")
def runs(request: pytest.FixtureRequest) -> Runs:
    return two_runs(request.param)


def test_factors_sum_to_the_change_and_their_ends_are_the_two_runs(runs: Runs) -> None:
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


def test_terms_are_what_the_trace_finds_written(runs: Runs) -> None:
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


def test_paths_sum_to_what_the_heads_bring_from_chat_tokens(runs: Runs) -> None:
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


def test_an_edges_weight_is_its_mean_over_prompts_and_suffixes(runs: Runs) -> None:
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


def test_the_lens_ends_at_the_models_own_output(runs: Runs) -> None:
    model, _, attacked = runs
    lens = logit_lens(attacked, TOKENS)
    assert lens.shape == (len(attacked), model.n_layers + 1)
    torch.testing.assert_close(lens[:, -1], refusal_score(attacked.logits, TOKENS), atol=1e-4, rtol=1e-4)


def test_direct_logit_attribution_adds_up(runs: Runs) -> None:
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


def test_dominance_is_one_over_all_regions_and_traces_reach_every_chat_token(
    runs: Runs,
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


def test_shapley_parts_sum_and_divide_an_interaction_equally() -> None:
    values = {
        frozenset(): torch.tensor(0.0), frozenset("a"): torch.tensor(1.0), frozenset("b"): torch.tensor(0.0),
        frozenset("ab"): torch.tensor(3.0),
    }  # fmt: skip
    parts = shapley(values, ("a", "b"))
    assert float(parts["a"]) == 2.0 and float(parts["b"]) == 1.0


def test_runs_whose_instructions_have_other_tokens_are_refused(runs: Runs) -> None:
    _, plain, _ = runs
    merged = [replace(chat, ids=chat.ids.flip(0)) for chat in plain.chats]
    with pytest.raises(UserError, match=r"'Bake a cake' has other tokens with the suffix"):
        aligned(plain, replace(plain, chats=tuple(merged)))


def test_runs_of_different_instructions_are_not_split() -> None:
    model = tiny.model("llama")
    one, two = (prepare(model, [model.chat(text)]) for text in tiny.TEXTS[:2])
    with pytest.raises(UserError, match="different instructions"):
        split_change(one, two, readout(model).unit)
