"""Batched forwards and replies on tiny models, against their definitions."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from attacks.caches import prefix_cache
from attacks.precision import copied
from suffix_analysis import candidate_table
from suffix_analysis.candidate_table import MARGIN
from suffix_analysis.directions import DirectionConfig, NoDirection, chat_means, find_direction, select, split_prompts
from suffix_analysis.errors import UserError
from suffix_analysis.forward import last_logits
from suffix_analysis.generate import PART, answers, generate
from suffix_analysis.interventions import ablate
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.refusal import opens_refusal
from tests import tiny
from tests.tiny import TEXTS, unit


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


def test_replies_that_end_leave_the_batch_and_change_no_other(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(family)
    rows = [model.chat(text, suffix).ids for text in TEXTS for suffix in ("", "x y z")]
    with torch.no_grad():
        alone = [model.hf.generate(row[None], max_new_tokens=20, do_sample=False)[0, len(row) :] for row in rows]
    stops = [int(alone[0][2]), int(alone[1][11])]
    monkeypatch.setattr(model.hf.generation_config, "eos_token_id", stops)
    wanted = []
    for ids in alone:
        at = torch.isin(ids, torch.tensor(stops)).nonzero().flatten()
        wanted.append(ids[: int(at[0]) if len(at) else 20])
    assert len({len(ids) for ids in wanted}) > 1
    sizes: list[int] = []
    hook = model.hf.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs.get("input_ids", args[0] if args else None))), with_kwargs=True
    )
    try:
        replies = generate(model.hf, model.tokenizer, rows, 20)
    finally:
        hook.remove()
    assert replies == [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
    n_long = sum(len(ids) >= PART for ids in wanted)
    assert sizes[-1] <= n_long < len(rows)


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
    with pytest.raises(UserError, match="is in both the fit and the select part"):
        split = [Prompt(str(i), f"Cut {i % 8}", "harmful", "select" if i >= 8 else "fit") for i in range(10)]
        find_direction(model, split, [f"Make cake number {i}" for i in range(20)])
    many = [f"Do thing number {i}" for i in range(20)]
    with pytest.raises(UserError, match=r"'do  thing number 0' stands twice"):
        find_direction(model, [*many, "do  thing number 0"], [f"Make cake number {i}" for i in range(20)])
    for place in ("fit", "select"):
        split = [Prompt(str(i), text, "harmful", "fit" if i < 12 else "select") for i, text in enumerate(many)]
        seen = Prompt("seen", next(p.text for p in split if p.split == place), "harmful", "report")
        with pytest.raises(UserError, match=f"is in both the {place} and the report part"):
            find_direction(model, [*split, seen], [f"Make cake number {i}" for i in range(20)])
    some = [Prompt(str(i), text, "harmful", "fit" if i < 12 else "") for i, text in enumerate(many)]
    with pytest.raises(UserError, match=r"12 of 20 prompts have a split; give all of them one"):
        find_direction(model, some, [f"Make cake number {i}" for i in range(20)])
    few = [Prompt(str(i), text, "harmless", "fit" if i < 7 else "select") for i, text in enumerate(many)]
    with pytest.raises(UserError, match=r"20 harmless prompts .* 7 for extraction"):
        find_direction(model, many, [Prompt(p.id, f"Bake {p.text}", p.kind, p.split) for p in few])
    with pytest.raises(UserError, match="refuses 0 of"):
        find_direction(model, many, [f"Make cake number {i}" for i in range(20)])


@pytest.mark.parametrize("settings", [{}, {"keep_by_score": False}])
@pytest.mark.parametrize("tokens", [None, [5]])
def test_activations_that_are_not_finite_are_named_with_their_layer(
    settings: dict[str, Any], tokens: list[int] | None
) -> None:
    hf = tiny.hf_model("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model = Model("broken", hf, tiny.tokenizer(), None)
    texts = [[f"{word} thing number {i}" for i in range(12)] for word in ("Do", "Make")]
    with pytest.raises(UserError, match=r"not finite (in .* from layer 2 on|at layer 2)"):
        find_direction(model, *texts, DirectionConfig(**settings), refusal_tokens=tokens)


def test_too_few_prompts_that_are_refused_are_counted() -> None:
    """A random model never gives half of its probability to one token."""
    model = tiny.model("llama")
    texts = [[f"{word} thing number {i}" for i in range(20)] for word in ("Do", "Make")]
    with pytest.raises(UserError, match=r"Only \d of 16 harmful prompts are refused .*\[5\].* at least 8"):
        find_direction(model, *texts, refusal_tokens=[5])


def test_the_table_of_candidates_that_all_fail_comes_with_the_error() -> None:
    model = tiny.model("llama")
    texts = [[f"{word} thing number {i}" for i in range(12)] for word in ("Do", "Make")]
    config = DirectionConfig(induce_threshold=1e6, kl_threshold=math.inf, keep_by_score=False)
    with pytest.raises(NoDirection, match="does not induce") as error:
        find_direction(model, *texts, config, refusal_tokens=[5])
    assert len(error.value.scores) == model.n_layers * model.chat("x").n_chat
    assert {row["status"] for row in error.value.scores} <= {"does not induce", "too late", "zero"}


def test_a_twin_is_what_loading_in_its_precision_gives(tmp_path: Path) -> None:
    """Weights are cast, rotary frequencies are not; and the model itself stays as it was."""
    hf = tiny.hf_model("llama")
    hf.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    twin = Model("m", hf, tiny.tokenizer(), None).twin(torch.bfloat16)
    assert twin.hf.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in twin.hf.parameters())
    assert twin.hf.lm_head.weight is twin.hf.model.embed_tokens.weight, "tied as in the model"
    ids = torch.arange(5, 305)[None]
    with torch.no_grad():
        assert torch.equal(twin.hf(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert all(p.dtype == torch.float32 for p in hf.parameters())


def test_a_wrapped_model_is_copied_too() -> None:
    """TransformerLens's bridge gives the head a bias of its own, as a buffer."""
    model = tiny.model("llama")
    ids = torch.arange(5, 25)[None]
    assert model.bridge is not None
    with torch.no_grad():
        low, wanted = copied(model.hf, torch.bfloat16)(input_ids=ids).logits, model.hf(input_ids=ids).logits
    assert low.dtype == torch.bfloat16 and wanted.dtype == torch.float32
    assert float((low.float() - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())


def test_report_prompts_never_take_part() -> None:
    prompts = [Prompt(str(i), f"Cut number {i}", "harmful", "fit" if i < 60 else "report") for i in range(120)]
    fit, chosen = split_prompts(prompts, DirectionConfig())
    assert {p.split for p in [*fit, *chosen]} == {"fit"} and len(fit) + len(chosen) == 60
    with pytest.raises(UserError, match="0 prompts beside the report split's are too few"):
        split_prompts(prompts[60:], DirectionConfig())


def test_every_row_that_could_decide_is_scored_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight leaders fail in the model's own precision, and a ninth misses the limit narrowly in the quick one only."""

    def row(position: int, bypass: float, kl: float) -> dict[str, Any]:
        return {"position": position, "layer": 1, "refusal_score": bypass, "steering_score": 1.0, "kl_div_score": kl,
                "status": "", "dtype": "bfloat16"}  # fmt: skip

    quick = [*(row(-i, -20.0 - i, 0.09) for i in range(4, 12)), row(-2, -9.0, 0.104), row(-3, 3.0, 0.05)]
    truth = {-2: row(-2, -9.0, 0.09), -3: row(-3, 3.0, 0.05)} | {-i: row(-i, -20.0 - i, 0.2) for i in range(4, 12)}
    asked: list[int] = []

    def scores(*args: Any, only: list[tuple[int, int]]) -> list[dict[str, Any]]:
        asked.extend(position for position, _ in only)
        return [truth[position] for position, _ in only]

    monkeypatch.setattr(candidate_table, "score_candidates", scores)
    model, config, nothing = tiny.model("llama"), DirectionConfig(layer_share=1.0), torch.zeros(1)

    def chosen(rows: list[dict[str, Any]]) -> tuple[int, int]:
        found = candidate_table.rescore_leaders(model, nothing, 1.0, rows, [], [], [], config)
        return select(found, model.n_layers, layer_share=1.0)

    assert chosen(quick) == (-2, 1)
    assert chosen(quick[:-1]) == (-2, 1), "also where no other row passes"
    assert len(asked) == 10 + 9


def test_candidates_that_are_too_late_can_be_left_unscored() -> None:
    model = tiny.model("llama")
    texts = [[f"{word} thing number {i}" for i in range(12)] for word in ("Do", "Make")]
    settings = {"kl_threshold": 1e9, "induce_threshold": -1e9, "layer_share": 0.7, "keep_by_score": False}
    whole, quick = (
        find_direction(model, *texts, DirectionConfig(**settings, score_excluded=late), refusal_tokens=[5])  # type: ignore[arg-type]
        for late in (True, False)
    )
    assert (quick.position, quick.layer) == (whole.position, whole.layer)
    assert torch.equal(quick.vector, whole.vector)
    late = [row for row in quick.scores if row["layer"] >= int(0.7 * model.n_layers)]
    assert late and all(row["status"] == "too late" and math.isnan(row["refusal_score"]) for row in late)
    early = [row for row in quick.scores if row not in late]
    full = [row for row in whole.scores if row["layer"] < int(0.7 * model.n_layers)]
    assert [row | {"dtype": None} for row in early] == [row | {"dtype": None} for row in full]


def test_candidates_that_do_not_induce_can_be_left_without_their_other_scores() -> None:
    model = tiny.model("llama")
    texts = [[f"{word} thing number {i}" for i in range(12)] for word in ("Do", "Make")]
    settings: dict[str, Any] = {"kl_threshold": 1e9, "layer_share": 1.0, "keep_by_score": False}
    free = find_direction(model, *texts, DirectionConfig(**settings, induce_threshold=-1e9), refusal_tokens=[5])
    scores = sorted(row["steering_score"] for row in free.scores if row["status"] != "zero")
    settings["induce_threshold"] = (scores[-3] + scores[-4]) / 2  # three pass
    assert scores[0] < settings["induce_threshold"] - MARGIN
    whole, quick = (
        find_direction(model, *texts, DirectionConfig(**settings, score_excluded=full), refusal_tokens=[5])
        for full in (True, False)
    )
    assert (quick.position, quick.layer) == (whole.position, whole.layer)
    assert torch.equal(quick.vector, whole.vector)
    left = [row for row in quick.scores if math.isnan(row["kl_div_score"])]
    assert {row["status"] for row in left} == {"zero", "does not induce"}
    assert all(row["steering_score"] < settings["induce_threshold"] - MARGIN for row in left if row["status"] != "zero")
    for mine, full in zip(quick.scores, whole.scores, strict=True):
        assert mine["status"] == full["status"]
        for name in ("refusal_score", "steering_score", "kl_div_score"):
            assert math.isnan(mine[name]) or mine[name] == pytest.approx(full[name], abs=1e-4)
    with pytest.raises(UserError, match=r"does not induce \(induce -?[\d.]+; allowed"):
        find_direction(
            model,
            *texts,
            DirectionConfig(**settings | {"induce_threshold": 1e6}, score_excluded=False),
            refusal_tokens=[5],
        )


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


def test_a_checkpoints_own_penalties_do_not_reach_replies() -> None:
    model = tiny.model("llama")
    rows = [model.chat(text, "x y z").ids for text in TEXTS]
    plain, scores = answers(model.hf, model.tokenizer, rows, 6)
    config = model.hf.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 1
    try:
        found, first = answers(model.hf, model.tokenizer, rows, 6)
    finally:
        config.repetition_penalty, config.no_repeat_ngram_size = None, None
    assert found == plain
    assert torch.equal(first, scores)


def test_a_checkpoints_own_generation_settings_change_no_reply(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny.model(family)
    rows = [model.chat(text).ids for text in TEXTS]
    plain = generate(model.hf, model.tokenizer, rows, 12)
    monkeypatch.setattr(model.hf.generation_config, "use_cache", False)
    monkeypatch.setattr(model.hf.generation_config, "max_length", 64)
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level("WARNING", logger="transformers"):
            assert generate(model.hf, model.tokenizer, rows, 12) == plain
            assert generate(model.hf, model.tokenizer, rows[:1], 12) == plain[:1]
    finally:
        transformers.logging.disable_propagation()
    assert not caplog.records
