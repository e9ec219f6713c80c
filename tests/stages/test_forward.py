"""Batched forwards, replies, interventions and traces on tiny models, against their definitions."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch

import suffix_analysis.forward as forward_module
import suffix_analysis.traces as traces_module
from attacks.caches import prefix_cache
from suffix_analysis.analysis import analyze
from suffix_analysis.batching import Batch
from suffix_analysis.chat import REGIONS
from suffix_analysis.directions import chat_means, find_direction
from suffix_analysis.errors import UserError
from suffix_analysis.forward import ablated_logits, added_logits, last_logits
from suffix_analysis.generate import answers, generate
from suffix_analysis.interventions import ablate, add, set_projection, writes
from suffix_analysis.prompts import Prompt
from suffix_analysis.refusal import opens_refusal
from suffix_analysis.traces import trace
from tests import tiny

TEXTS = [
    "Bake a cake",
    "Write a poem about the rain in spring",
    "Sing",
    "How do I mend a chair?",
    "Go home now, please",
]


def unit(n: int, seed: int = 0) -> torch.Tensor:
    vector = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return 3 * vector / vector.norm()


def test_last_logits_equal_one_plain_forward_each(family: str) -> None:
    model = tiny.model(family)
    rows = [model.chat(text, suffix).ids for text in TEXTS for suffix in ("", "x y z")]
    batched = last_logits(model.hf, model.tokenizer, rows)
    with torch.no_grad():
        single = torch.stack([model.hf(input_ids=row[None]).logits[0, -1] for row in rows])
    torch.testing.assert_close(batched, single, atol=2e-4, rtol=0)


def test_batched_replies_equal_single_ones(family: str) -> None:
    model = tiny.model(family)
    rows = [model.chat(text).ids for text in TEXTS]
    together = generate(model.hf, model.tokenizer, rows, 6)
    assert together == [generate(model.hf, model.tokenizer, [row], 6)[0] for row in rows]


def test_replies_come_with_the_logits_they_begin_with(family: str) -> None:
    model, vector = tiny.model(family), unit(32)
    rows = [model.chat(text, suffix).ids for text in TEXTS for suffix in ("", "x y z")]
    for context in (contextlib.nullcontext(), ablate(model, vector)):
        with context:
            replies, first = answers(model.hf, model.tokenizer, rows, 5)
            torch.testing.assert_close(first, last_logits(model.hf, model.tokenizer, rows), atol=2e-4, rtol=0)
            alone = [model.hf.generate(row[None], max_new_tokens=5, do_sample=False) for row in rows]
        texts = [
            model.tokenizer.decode(out[0, len(row) :], skip_special_tokens=True)
            for out, row in zip(alone, rows, strict=True)
        ]
        assert replies == texts


def test_after_ablation_no_block_sees_the_direction(family: str) -> None:
    model, vector = tiny.model(family), unit(32)
    seen: dict[str, float] = {}

    def look(x: torch.Tensor, hook: object) -> None:
        seen[hook.name] = float((x @ (vector / vector.norm())).abs().max())  # type: ignore[attr-defined]

    names = [f"blocks.{i}.hook_resid_pre" for i in range(3)] + ["blocks.2.hook_resid_post"]
    ids = model.chat(TEXTS[0]).ids[None]
    with torch.no_grad():
        with model.bridge.hooks(fwd_hooks=[(n, look) for n in names]):
            model.hf(input_ids=ids)
        before = max(seen.values())
        with ablate(model, vector), model.bridge.hooks(fwd_hooks=[(n, look) for n in names]):
            model.hf(input_ids=ids)
    assert len(seen) == 4
    assert max(seen.values()) < 1e-5 * before


def test_a_set_projection_is_what_every_block_sees(family: str) -> None:
    model, vector = tiny.model(family), unit(32)
    levels = torch.linspace(-2, 3, model.n_layers + 1)
    r, seen = vector / vector.norm(), {}
    rows = [model.chat(text).ids for text in TEXTS]
    names = [f"blocks.{i}.hook_resid_pre" for i in range(3)] + ["blocks.2.hook_resid_post"]
    with set_projection(model, vector, levels):
        hooks = [(name, lambda x, hook, name=name: seen.update({name: x @ r})) for name in names]
        with torch.no_grad(), model.bridge.hooks(fwd_hooks=hooks):
            model.hf(input_ids=rows[0][None])
    for name, level in zip(names, levels, strict=True):
        torch.testing.assert_close(seen[name], level.expand_as(seen[name]), atol=1e-4, rtol=1e-4)
    with set_projection(model, vector, torch.zeros(4)):
        zeroed = last_logits(model.hf, model.tokenizer, rows)
    with ablate(model, vector):
        torch.testing.assert_close(zeroed, last_logits(model.hf, model.tokenizer, rows), atol=1e-4, rtol=1e-4)
    for wrong, levels in ((torch.zeros(32), torch.zeros(4)), (vector, torch.zeros(3))):
        with pytest.raises(ValueError), set_projection(model, wrong, levels):
            pass


def test_ablation_is_its_definition_by_hand() -> None:
    """The same edit made with plain PyTorch hooks on an unwrapped copy of the model."""
    vector = unit(32)
    r = vector / vector.norm()
    plain = tiny.hf_model("llama")

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x - (x @ r)[..., None] * r

    for block in plain.model.layers:
        block.register_forward_pre_hook(lambda _, args: (cut(args[0]), *args[1:]))
        block.self_attn.register_forward_hook(lambda _, __, out: (cut(out[0]), *out[1:]))
        block.mlp.register_forward_hook(lambda _, __, out: cut(out))
    model = tiny.model("llama")
    rows = [model.chat(text).ids for text in TEXTS]
    with torch.no_grad():
        expected = torch.stack([plain(input_ids=row[None]).logits[0, -1] for row in rows])
    with ablate(model, vector):
        torch.testing.assert_close(last_logits(model.hf, model.tokenizer, rows), expected, atol=1e-4, rtol=0)


def test_addition_moves_one_layer_by_alpha_r(family: str) -> None:
    model, vector = tiny.model(family), unit(32)
    ids = model.chat(TEXTS[1]).ids[None]
    seen: list[torch.Tensor] = []
    hook = [("blocks.1.hook_resid_pre", lambda x, hook: seen.append(x.clone()))]
    with torch.no_grad():
        for context in (add(model, vector, 1, 0.0), add(model, vector, 1, 2.0)):
            with context, model.bridge.hooks(fwd_hooks=hook):
                model.hf(input_ids=ids)
    torch.testing.assert_close(seen[1] - seen[0], (2 * vector).expand_as(seen[0]), atol=1e-5, rtol=1e-5)


def test_strength_zero_changes_nothing_and_hooks_go_after_an_error() -> None:
    model = tiny.model("llama")
    rows = [model.chat(text).ids for text in TEXTS]
    assert model.bridge is not None  # the bridge's attention rounds differently, so it must be there from the start
    plain = last_logits(model.hf, model.tokenizer, rows)
    with add(model, unit(32), 1, 0.0):
        assert torch.equal(last_logits(model.hf, model.tokenizer, rows), plain)
    with pytest.raises(RuntimeError, match="on purpose"), ablate(model, unit(32)):
        raise RuntimeError("on purpose")
    assert torch.equal(last_logits(model.hf, model.tokenizer, rows), plain)
    assert all(not model.bridge.hook_dict[name].fwd_hooks for name in model.bridge.hook_dict)
    assert len(writes(3)) == 7


@pytest.mark.parametrize("bad", [torch.zeros(32), torch.full((32,), math.nan)], ids=["zero", "nan"])
def test_a_direction_without_length_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot be ablated"), ablate(tiny.model("llama"), bad):
        pass


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
    monkeypatch.setattr(traces_module, "post_norm", lambda block, d_model: None)
    monkeypatch.setattr(traces_module, "multiplier", lambda model: 1.0)
    with pytest.raises(UserError, match="attention write"):
        trace(model, TEXTS, unit(32))


def test_a_stream_that_something_else_writes_to_is_refused() -> None:
    model = tiny.model("llama")
    with pytest.raises(UserError, match="final residual stream"), add(model, unit(32), 1):
        trace(model, TEXTS, unit(32))


@pytest.mark.parametrize("at_once", [1, 2, 10])
def test_many_vectors_together_change_what_each_alone_does(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the blocks below an addition, which are skipped, change nothing."""
    monkeypatch.setattr(forward_module, "_at_once", lambda n_prefix, groups: at_once)
    model = tiny.model(family)
    rows = [model.chat(text).ids for text in ("Write a poem", "Name a very tall tree in the north", "Sing")]
    ablated, added = ablated_logits(model, rows), added_logits(model, rows, 2.0)
    vectors = torch.randn(3, model.d_model, generator=torch.Generator().manual_seed(0))

    def alone(context: Any) -> torch.Tensor:
        with context:
            return last_logits(model.hf, model.tokenizer, rows)

    wanted = torch.stack([alone(ablate(model, vector)) for vector in vectors])
    torch.testing.assert_close(ablated(vectors), wanted, atol=1e-4, rtol=1e-5)
    for layer in range(model.n_layers):
        wanted = torch.stack([alone(add(model, vector, layer, 2.0)) for vector in vectors])
        torch.testing.assert_close(added(vectors, layer), wanted, atol=1e-4, rtol=1e-5)
    assert all("forward" not in block.__dict__ for block in model.bridge.blocks)


def test_vectors_run_together_as_far_as_memory_allows() -> None:
    batch = Batch(list(range(10)), {"input_ids": torch.zeros(10, 20)})
    assert forward_module._at_once(0, [batch]) == forward_module.TOKEN_BUDGET // 200
    assert forward_module._at_once(1000, [batch]) == forward_module.REPLY_BUDGET // 10200
    assert forward_module._at_once(10**6, [batch]) == 1


def test_batch_size_and_padding_do_not_matter() -> None:
    model, vector = tiny.model("llama"), unit(32)
    together = trace(model, TEXTS, vector)
    for i, text in enumerate(TEXTS):
        alone = trace(model, [text], vector)
        torch.testing.assert_close(alone.contribution[0], together.contribution[i], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.projection[0], together.projection[i], atol=1e-4, rtol=1e-4)


def test_chat_means_are_float64_means_of_block_inputs() -> None:
    model = tiny.model("llama")
    chats = [model.chat(text) for text in TEXTS]
    means, _ = chat_means(model, chats)
    with torch.no_grad():
        rows = [
            torch.stack(model.hf(input_ids=c.ids[None], output_hidden_states=True).hidden_states[:3]) for c in chats
        ]
    expected = torch.stack([row[:, 0, -c.n_chat :].double() for row, c in zip(rows, chats, strict=True)]).mean(0)
    torch.testing.assert_close(means[:3], expected, atol=1e-5, rtol=1e-5)


def test_find_direction_names_what_is_wrong() -> None:
    model = tiny.model("llama")
    with pytest.raises(UserError, match="too few for a direction"):
        find_direction(model, TEXTS[:3], ["a", "b", "c"])
    with pytest.raises(UserError, match="both harmful and harmless"):
        find_direction(model, TEXTS, TEXTS)
    with pytest.raises(UserError, match="2 prompts are in both the fit and the select part"):
        split = [Prompt(str(i), f"Cut {i % 8}", "harmful", "select" if i >= 8 else "fit") for i in range(10)]
        find_direction(model, split, [f"Make cake number {i}" for i in range(20)])
    many = [f"Do thing number {i}" for i in range(20)]
    with pytest.raises(UserError, match="refuses 0 of"):
        find_direction(model, many, [f"Make cake number {i}" for i in range(20)])


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


def test_no_reply_is_made_from_rows_that_are_not_contiguous() -> None:
    """In bfloat16 they turn the vocabulary product into a batched one: three times the time, gigabytes of copies."""
    model = tiny.model("llama", dtype=torch.bfloat16)
    seen: list[bool] = []
    head = model.hf.get_output_embeddings()
    original = head.forward
    head.forward = lambda x: (seen.append(x.is_contiguous()), original(x))[1]
    rows = [model.chat(text).ids for text in TEXTS]
    generate(model.hf, model.tokenizer, rows, 3)
    last_logits(model.hf, model.tokenizer, rows)
    assert seen
    assert all(seen)


def test_a_single_row_reaches_the_head_with_the_strides_of_its_own_shape() -> None:
    """A slice of one row calls itself contiguous, and its strides made the head copy its whole weight."""
    model = tiny.model("llama", dtype=torch.bfloat16)
    seen: list[tuple[tuple[int, ...], torch.Size]] = []
    head = model.hf.get_output_embeddings()
    original = head.forward
    head.forward = lambda x: (seen.append((x.stride(), x.shape)), original(x))[1]
    prefix_cache(model.hf, model.chat(TEXTS[0]).ids)
    ((strides, shape),) = seen
    assert strides == torch.empty(shape).stride()


def test_a_reply_opens_a_refusal_where_greedy_decoding_does(family: str) -> None:
    model = tiny.model(family)
    rows = [model.chat(text).ids for text in ("Write a poem", "Name a very tall tree", "Sing", "Go away now")]
    with torch.no_grad():
        first = [int(model.hf(input_ids=row[None]).logits[0, -1].argmax()) for row in rows]
    tokens = [first[0], first[2], 699]
    assert opens_refusal(model, rows, tokens).tolist() == [token in tokens for token in first]
