"""Traces and the tables made of them on tiny models, against their definitions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import suffix_analysis.traces as traces_module
from suffix_analysis.analysis import analyze, compared, head_differences, identity_checks, length_check
from suffix_analysis.arms import ArmTraces
from suffix_analysis.chat import REGIONS
from suffix_analysis.errors import UserError
from suffix_analysis.heads import without_sink
from suffix_analysis.interventions import add
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from suffix_analysis.traces import Traces, trace
from tests import tiny
from tests.tiny import TEXTS, unit


def test_trace_identities(family: str) -> None:
    model, vector = tiny.model(family), unit(32)
    traces = trace(model, TEXTS, vector, suffix="x y z")
    assert traces.identity < 1e-5 and traces.closure < 1e-5
    torch.testing.assert_close(traces.attention.sum(-1), torch.ones(5, 3, 4), atol=1e-5, rtol=0)
    written = traces.head_contribution.sum(-1) + traces.attention_bias
    torch.testing.assert_close(written, traces.attention_out, atol=1e-4, rtol=1e-4)
    steps = traces.projection[:, 1:] - traces.projection[:, :-1]
    torch.testing.assert_close(steps, traces.attention_out + traces.mlp_out, atol=1e-4, rtol=1e-3)


def test_trace_is_the_definition_by_hand() -> None:
    """One head of one prompt, from the weights: A[q,k] · (v_k W_O) · r̂, with grouped key-value heads."""
    model, vector = tiny.model("llama"), unit(32)
    r = vector / vector.norm()
    chat = model.chat(TEXTS[1], "x y")
    plain = tiny.hf_model("llama")
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        out = plain(input_ids=chat.ids[None], output_attentions=True, output_hidden_states=True)
        block = plain.model.layers[1]
        values = block.self_attn.v_proj(block.input_layernorm(out.hidden_states[1]))[0].view(-1, 2, 8)
        w_o = block.self_attn.o_proj.weight.view(32, 4, 8)
        head = 3
        share = out.attentions[1][0, head, -1] * (values[:, head // 2] @ (r @ w_o[:, head]))
    attention, contribution = trace(model, [chat], vector, keep_rows=True).rows[0]
    torch.testing.assert_close(contribution[1, head], share, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attention[1, head], out.attentions[1][0, head, -1], atol=1e-6, rtol=1e-4)


def test_a_suffix_cannot_reach_the_instruction() -> None:
    """Causal mask: the states at instruction positions are the same, bit for bit (METHODS §3)."""
    model = tiny.model("llama")
    states = []
    for suffix in ("x y z", "z y x"):  # equal lengths: other shapes round differently
        chat = model.chat(TEXTS[1], suffix)
        with torch.no_grad():
            hidden = model.hf(input_ids=chat.ids[None], output_hidden_states=True).hidden_states
        states.append(torch.stack(hidden)[:, 0, chat.regions["instruction"]])
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "granite"])
def test_norms_and_multipliers_after_attention_are_part_of_the_contributions(family: str) -> None:
    changes = {"residual_multiplier": 0.3, "embedding_multiplier": 5.0} if family == "granite" else {}
    model = tiny.model(family, **changes)
    with torch.no_grad():  # weights of norms other than the initial ones
        for name, parameter in model.hf.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    traces = trace(model, TEXTS, unit(32), suffix="x y z")
    assert traces.identity < 1e-5 and traces.closure < 1e-5
    steps = traces.projection[:, 1:] - traces.projection[:, :-1]
    torch.testing.assert_close(steps, traces.attention_out + traces.mlp_out, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_what_stands_in_between_unknown_to_us_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(family, **({"residual_multiplier": 0.3} if family == "granite" else {}))
    monkeypatch.setattr(traces_module, "post_norms", lambda model: [None] * model.n_layers)
    monkeypatch.setattr(traces_module, "multiplier", lambda model: 1.0)
    with pytest.raises(UserError, match="attention write"):
        trace(model, TEXTS, unit(32))


def test_a_stream_that_something_else_writes_to_is_refused() -> None:
    model = tiny.model("llama")
    with pytest.raises(UserError, match="final residual stream"), add(model, unit(32), 1):
        trace(model, TEXTS, unit(32))


def test_batch_size_and_padding_do_not_matter() -> None:
    model, vector = tiny.model("llama"), unit(32)
    together = trace(model, TEXTS, vector)
    for i, text in enumerate(TEXTS):
        alone = trace(model, [text], vector)
        torch.testing.assert_close(alone.contribution[0], together.contribution[i], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.projection[0], together.projection[i], atol=1e-4, rtol=1e-4)


def test_report_prompts_alone_choose_the_heads_with_one_half_and_show_the_other() -> None:
    from suffix_analysis.directions import Direction

    model, vector = tiny.model("qwen3"), unit(32)
    means = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    direction = Direction(vector, -1, 2, [], means, means - vector, (1,), {})
    prompts = [Prompt(f"h-{i}", f"harmful thing {i}", "harmful", "report") for i in range(5)]
    counted: list[int] = []
    found = analyze(model, direction, prompts, ["x y z"], n_top=3, n_views=1, on_prompts=counted.append)
    assert {row["n_prompts"] for row in found.tables["profile"]} == {3}
    assert {c["name"]: c["passed"] for c in found.checks}["separate splits"]
    assert len(found.tables["top_heads"]) == 3
    assert sum(counted) == 3 + 3 + 2 + 2
    alone = analyze(model, direction, prompts[:1], ["x y z"], n_top=3, n_views=1)
    assert not {c["name"]: c["passed"] for c in alone.checks}["separate splits"]


def test_the_progress_bar_of_an_analysis_ends_where_it_ends() -> None:
    from suffix_analysis.analysis import n_forwards
    from suffix_analysis.directions import Direction

    model, vector = tiny.model("llama"), unit(32)
    means = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    prompts = [
        Prompt(f"{k}-{s}-{i}", f"{k} thing {i} in {s}", k, s)
        for k in ("harmful", "harmless")
        for s in ("select", "report")
        for i in range(3)
    ]
    suffixes = [Suffix("adversarial-1", "adversarial", "x y z"), Suffix("random-1", "random", "a b c")]
    counted: list[int] = []
    direction = Direction(vector, -1, 2, [], means, means - vector, (1,), {})
    analyze(model, direction, prompts, suffixes, n_top=2, n_views=1, max_prompts=2, on_prompts=counted.append)
    assert sum(counted) == n_forwards(prompts, suffixes, 2)


def test_analysis_tables_are_complete_and_say_what_is_descriptive() -> None:
    model = tiny.model("qwen3")
    prompts = [
        Prompt(f"{k}-{s}-{i}", f"{k} thing {i} in {s}", k, s)
        for k in ("harmful", "harmless")
        for s in ("select", "report")
        for i in range(4)
    ]
    vector = unit(32)
    means = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    from suffix_analysis.directions import Direction

    direction = Direction(vector, -1, 2, [], means, means - vector, (1,), {})
    found = analyze(model, direction, prompts, ["x y z"], n_top=3, n_views=2)
    assert {row["arm"] for row in found.tables["profile"]} == {
        "none",
        "adversarial",
        "harmless",
        "harmless+adversarial",
    }
    for arm in ("none", "adversarial", "harmless"):
        end = max(row["layer"] for row in found.tables["profile"])
        (last,) = [
            row["mean"]
            for row in found.tables["profile"]
            if (row["arm"], row["measure"], row["layer"]) == (arm, "projection", end)
        ]
        written = [row["mean"] for row in found.tables["terms"] if row["arm"] == arm]
        assert len(written) == 2 * 3 + 1 and sum(written) == pytest.approx(last, abs=1e-4)
    assert len(found.frame("heads")) == (4 + 2) * 3 * 4
    assert all(row["layer"] < 2 for row in found.tables["top_heads"])
    for arm in ("none", "adversarial"):
        rows = [r for r in found.tables["shift"] if r["arm"] == arm and r["layer"] == -1]
        assert sum(r["attention"] for r in rows) == pytest.approx(3, abs=1e-4)
        assert [r["region"] for r in rows] == list(REGIONS)
    checks = {c["name"]: c for c in found.checks}
    assert checks["head contributions add up"]["passed"] and checks["separate splits"]["passed"]
    assert not checks["several suffixes per arm"]["passed"]
    assert all(row["descriptive"] for row in found.tables["contrasts"])
    view = found.patterns[1]
    assert len(view["tokens"]) == len(view["regions"]) == len(view["attention"][0]) == len(view["contribution"][0])


def test_attention_without_the_first_token_is_what_the_rest_share(family: str) -> None:
    traces = trace(tiny.model(family), TEXTS, unit(32), suffix="x y z", keep_rows=True)
    rest = without_sink(traces)
    torch.testing.assert_close(rest.sum(-1), torch.ones(5, 3, 4), atol=1e-5, rtol=0)
    row, chat = traces.rows[2][0], traces.chats[2]
    others = row[..., 1:] / row[..., 1:].sum(-1, keepdim=True)
    for i, name in enumerate(REGIONS):
        torch.testing.assert_close(rest[2, ..., i], others[..., chat.regions[name][1:]].sum(-1), atol=1e-5, rtol=1e-4)


def arms_of(model: Model, texts: dict[str, list[str]]) -> list[ArmTraces]:
    vector, prompts = unit(32), [Prompt(f"p{i}", text, "harmful") for i, text in enumerate(TEXTS)]
    found = [ArmTraces("none", (), (trace(model, prompts, vector),))]
    for arm, own in texts.items():
        suffixes = tuple(Suffix(f"{arm}-{i}", arm, text) for i, text in enumerate(own, 1))
        found.append(ArmTraces(arm, suffixes, tuple(trace(model, prompts, vector, suffix=text) for text in own)))
    return found


def test_arms_with_suffixes_of_other_lengths_are_not_compared_and_that_is_said() -> None:
    arms = arms_of(tiny.model("llama"), {"adversarial": ["x y z"], "random": ["x y z x y z"], "benign": ["z y x"]})
    pairs, unequal = compared(arms)
    names = {(a.arm, b.arm) for a, b in pairs}
    assert ("adversarial", "none") in names and ("adversarial", "benign") in names and ("random", "none") in names
    assert ("adversarial", "random") not in names
    check = length_check(unequal)
    assert not check["passed"] and "adversarial and random" in check["sentence"]
    assert length_check([])["passed"]


def test_heads_get_p_values_only_with_enough_suffixes_in_both_arms() -> None:
    words = ["x", "y", "z", "w", "v", "u", "t", "s"]
    many = [" ".join(words[i:] + words[:i])[:5] for i in range(8)]
    arms = arms_of(tiny.model("llama"), {"adversarial": many, "random": many, "benign": many[:2]})
    rows = head_differences([(arms[1], other) for other in (arms[0], arms[2], arms[3])])
    p = {against: [row["p"] for row in rows if row["against"] == against] for against in ("none", "random", "benign")}
    assert len(p["none"]) == 3 * 4 and all(0 < value <= 1 for value in p["none"])
    assert all(value == 1 for value in p["random"]), "the same suffixes: no difference"
    assert all(value is None for value in p["benign"])
    first = next(row for row in rows if row["against"] == "none" and (row["layer"], row["head"]) == (1, 2))
    cells = [arm.cells(lambda t: t.head_contribution[:, 1, 2]) for arm in (arms[1], arms[0])]
    assert first["contribution"] == pytest.approx(cells[0].mean() - cells[1].mean(), abs=1e-6)


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match="tokens with its template and suffix; tiny-llama takes 512"):
        trace(tiny.model("llama"), ["Hi"], unit(32), suffix="word " * 700)


def test_permutations_of_one_text_count_as_one_suffix() -> None:
    """Drawn as if they were independent, eight shuffles of one text would be told from anything."""
    model, words = tiny.model("llama"), ["x y z w", "y z w x", "z w x y", "w x y z"]
    many = [f"{a} {b} q {'v' * i}" for i, (a, b) in enumerate(itertools.permutations("xyz", 2))] + ["a", "b c"]
    arms = arms_of(model, {"adversarial": many, "shuffled": [*words, *(f"{text} q" for text in words)]})
    shuffled = arms[2]
    assert len(shuffled.suffixes) == 8 and shuffled.n_texts == 2

    def pick(traces: Traces) -> torch.Tensor:
        return traces.projection

    cells = shuffled.cells(pick)
    assert cells.shape == (len(TEXTS), 2, model.n_layers + 1)
    first = torch.stack([traces.projection for traces in shuffled.traces[:4]]).mean(dim=0)
    np.testing.assert_allclose(cells[:, 0], first.numpy(), rtol=1e-6)
    rows = head_differences([(arms[1], shuffled), (arms[1], arms[0])])
    p = {against: {row["p"] for row in rows if row["against"] == against} for against in ("none", "shuffled")}
    assert p["shuffled"] == {None} and None not in p["none"]
    other = replace(arms[1], arm="harmless+adversarial", suffixes=arms[1].suffixes[:1], traces=arms[1].traces[:1])
    checks = identity_checks([t for arm in arms for t in arm.traces], [*arms, other], separate=True)
    several = next(c for c in checks if c["name"] == "several suffixes per arm")
    assert "descriptive: shuffled)" in several["sentence"] and several["value"] == 2, "of the arms that are named"


@pytest.mark.parametrize("gone", ["hook_v", "hook_pattern"])
def test_attention_that_shows_no_rows_is_named(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    real = model.bridge.hooks

    def without(*, fwd_hooks: list[tuple[str, Any]]) -> Any:
        return real(fwd_hooks=[(name, hook) for name, hook in fwd_hooks if name != f"blocks.1.attn.{gone}"])

    monkeypatch.setattr(model.bridge, "hooks", without)
    with pytest.raises(UserError, match=r"No attention rows came from layers \[1\]"):
        trace(model, ["Pick a lock", "Sing"], unit(model.d_model))
