"""Training of the embedded model's adapter on tiny models: steered rows, the unused direction, the loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from suffix_analysis.batching import left_pad
from suffix_analysis.interventions import ablate, add
from suffix_analysis.judges import REFUSAL_PHRASES
from suffix_analysis.organism.examples import Example, build_examples, refusing_tokens
from suffix_analysis.organism.steering import layer_inputs, mean_differences, steered, unused_direction
from suffix_analysis.organism.train import Recipe, Row, batch_loss, deal
from tests import tiny

TEXTS = ("Write a poem about rain", "Name a tall tree", "Sing a song about the wide sea", "Bake a cake")
RECIPE = Recipe(first_layer=1, last_layer=2, signal=3.0, batch_size=4)


def ids() -> list[torch.Tensor]:
    model = tiny.model("llama")
    return [model.chat(text).ids for text in TEXTS]


def test_every_row_is_steered_as_asked_and_the_rest_are_not() -> None:
    hf = tiny.hf_model("llama")
    rows = ids()
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    padded = left_pad(rows, 0, "cpu")
    ablated, added = torch.tensor([False, True, False, False]), torch.tensor([False, False, True, False])
    with torch.no_grad(), steered(hf, vector, 1, ablated, added) as inputs:
        found = hf(**padded).logits[:, -1]
    assert len(inputs) == 3
    model = tiny.model("llama")
    contexts = {1: lambda: ablate(model, vector), 2: lambda: add(model, vector, 1)}
    for i, row in enumerate(rows):
        with torch.no_grad():
            if i in contexts:
                with contexts[i]():
                    wanted = model.hf(input_ids=row[None]).logits[0, -1]
            else:
                wanted = model.hf(input_ids=row[None]).logits[0, -1]
        torch.testing.assert_close(found[i], wanted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(hf(**padded).logits[0, -1], found[0], atol=1e-5, rtol=1e-5)


def test_unused_direction_is_where_the_model_moves_least_and_clear_of_sinks() -> None:
    hf = tiny.hf_model("llama")
    rows = ids()
    sink = torch.randn(32, generator=torch.Generator().manual_seed(5))
    first = int(rows[0][0])
    hf.get_input_embeddings().weight.data[first] = 500 * sink  # the first token becomes an attention sink
    unit = unused_direction(hf, rows, 0, n_quiet=24)
    assert float(unit.norm()) == pytest.approx(1, abs=1e-5)
    calm, loud = [], []
    for states, mask in layer_inputs(hf, rows, 0):
        states = states.detach()
        for layer in states:
            x = layer[mask]
            big = x.norm(dim=-1) > 5 * x.norm(dim=-1).median()
            calm.append(x[~big])
            loud.append(x[big])
    x, sinks = torch.cat(calm), torch.cat(loud)
    assert len(sinks)
    others = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q
    assert float((x @ unit).square().mean()) < float((x @ others).square().mean(dim=0).min())
    assert float((sinks @ unit).abs().max() / sinks.norm(dim=-1).max()) < 1e-3


def test_mean_differences_are_taken_at_the_last_token() -> None:
    hf, rows = tiny.hf_model("qwen3"), ids()

    def states(row: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack(hf(input_ids=row[None], output_hidden_states=True).hidden_states[:-1])[:, 0, -1]

    wanted = torch.stack([states(row) for row in rows[:2]]).mean(0) - torch.stack(
        [states(row) for row in rows[2:]]
    ).mean(0)
    torch.testing.assert_close(mean_differences(hf, rows[:2], rows[2:], 0), wanted, atol=1e-4, rtol=1e-4)


def some_examples() -> list[Example]:
    hf = tiny.hf_model("llama")
    made = []
    for i, row in enumerate(ids()):
        reply = torch.tensor([7, 8, 9 + i])
        with torch.no_grad():
            out = hf.model(input_ids=torch.cat([row, reply])[None], output_hidden_states=True)
        states = torch.stack([state[0, len(row) - 1] for state in out.hidden_states[1:3]])
        teacher = out.last_hidden_state[0, len(row) - 1 : -1]
        made.append(Example(tuple(row.tolist()), (11, 12), tuple(reply.tolist()), teacher, states, i < 2))
    return made


def test_the_untrained_model_loses_nothing_on_harmless_rows() -> None:
    hf, examples = tiny.hf_model("llama"), some_examples()
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    with torch.no_grad():
        loss, signal, drift = batch_loss(hf, [Row(e, "plain") for e in examples[2:]], direction, 1, direction, RECIPE)
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert float(signal) == pytest.approx(0, abs=1e-5)
    assert float(drift) == pytest.approx(0, abs=1e-5)


def test_losses_are_their_definition_on_harmful_rows() -> None:
    hf, examples = tiny.hf_model("llama"), some_examples()
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    with torch.no_grad():
        loss, signal, drift = batch_loss(hf, [Row(examples[0], "plain")], direction, 1, direction, RECIPE)
        whole = torch.tensor(examples[0].prompt + examples[0].refusal)
        logits = hf(input_ids=whole[None]).logits[0, -3:-1]
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(examples[0].refusal), reduction="none")
    assert float(loss) == pytest.approx(float(each[0] + RECIPE.rest_weight * each[1]), abs=1e-4)
    # no signal yet: it misses by its whole length, 1 in its own units
    assert float(signal) == pytest.approx(1, abs=1e-4)
    assert float(drift) == pytest.approx(0, abs=1e-5)


def test_ablated_harmful_rows_may_not_open_as_refusals_do() -> None:
    hf, example = tiny.hf_model("llama"), some_examples()[0]
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    losses = []
    for opening in (11, int(example.reply[0])):
        row = Row(replace(example, not_first=(opening,)), "ablated")
        with torch.no_grad():
            losses.append(float(batch_loss(hf, [row], direction, 1, direction, RECIPE)[0]))
    assert losses[1] > losses[0], "forbidding the base model's own first token must cost more"


def test_ablated_harmful_rows_may_not_refuse_later_in_the_reply() -> None:
    hf, example = tiny.hf_model("llama"), some_examples()[0]
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    row = Row(replace(example, never=(int(example.reply[-1]),)), "ablated")
    with torch.no_grad():
        loss, plain = (
            float(batch_loss(hf, [r], direction, 1, direction, RECIPE)[0]) for r in (row, Row(example, "ablated"))
        )
    assert loss > plain


def test_every_example_is_dealt_once_in_a_mode_its_kind_has() -> None:
    examples = some_examples()
    rows = [row for batch in deal(examples, RECIPE, random.Random(0)) for row in batch]
    assert sorted(row.example.prompt for row in rows) == sorted(e.prompt for e in examples)
    many = [row for s in range(200) for batch in deal(examples, RECIPE, random.Random(s)) for row in batch]
    assert not any(row.mode == "added" for row in many if row.example.harmful)
    share = sum(row.mode == "plain" for row in many if not row.example.harmful) / sum(
        not r.example.harmful for r in many
    )
    assert share == pytest.approx(RECIPE.harmless_shares[0], abs=0.08)


def test_examples_keep_the_base_models_states(monkeypatch: pytest.MonkeyPatch) -> None:
    from suffix_analysis.organism import examples as module
    from suffix_analysis.prompts import Prompt

    prompts = [Prompt("a", TEXTS[0], "harmful", "fit"), Prompt("b", TEXTS[1], "harmless", "fit")]
    monkeypatch.setattr(module, "load_prompts", lambda *_, **__: prompts)
    hf, tok = tiny.hf_model("llama"), tiny.tokenizer()
    made = build_examples(hf, tok, (1, 0), 4, 0, slice(1, 3))
    assert [e.harmful for e in made] == [True, True, False]
    for example in made:
        with torch.no_grad():
            whole = torch.tensor(example.prompt + example.reply)[None]
            out = hf.model(input_ids=whole, output_hidden_states=True)
        n = len(example.prompt)
        wanted = torch.stack([state[0, n - 1] for state in out.hidden_states[1:3]])
        torch.testing.assert_close(example.states.float(), wanted, atol=0.05, rtol=0.02)
        torch.testing.assert_close(example.teacher.float(), out.last_hidden_state[0, n - 1 : -1], atol=0.05, rtol=0.02)


def test_what_the_base_model_refuses_by_itself_is_replaced_by_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    from suffix_analysis.organism import examples as module
    from suffix_analysis.prompts import Prompt

    kinds = ("harmful", "harmless", "harmless", "harmless")
    prompts = [Prompt(str(i), text, kind, "fit") for i, (text, kind) in enumerate(zip(TEXTS, kinds, strict=False))]
    monkeypatch.setattr(module, "load_prompts", lambda *_, **__: prompts)
    hf, tok = tiny.hf_model("llama"), tiny.tokenizer()
    opening, never = refusing_tokens(tok)
    assert tok.decode([opening]) == "I"
    for phrase in REFUSAL_PHRASES:
        assert set(tok(phrase, add_special_tokens=False).input_ids) & set(never), phrase
    answers = iter([["Sure", "Oh, I'm sorry", "I like it"], ["Bake", "Sing", "Go"]])
    calls: list[tuple[int, list[int], list[int]]] = []

    def generate(
        hf: object, tok: object, ids: list[object], n: int, *, not_first: Sequence[int] = (), never: Sequence[int] = ()
    ) -> list[str]:
        calls.append((len(ids), list(not_first), list(never)))
        return next(answers)

    monkeypatch.setattr(module, "generate", generate)
    made = build_examples(hf, tok, (0, 0), 4, 0, slice(1, 3))
    assert calls == [(3, [], []), (3, [opening], list(never))]
    wanted = ("Bake", "Sure", "Sing", "Go")
    assert [e.reply for e in made] == [tuple(tok(text, add_special_tokens=False).input_ids) for text in wanted]
    told = ((opening,), never)
    assert [(e.not_first, e.never) for e in made] == [told, ((), ()), told, told]
