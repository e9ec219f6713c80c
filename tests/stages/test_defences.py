"""Mitigations on tiny models: identities, and nothing that depends on batching or on the cache."""

from __future__ import annotations

import contextlib
import itertools
import random
from typing import Any

import pytest
import torch

import attacks
from suffix_analysis import adaptive, mitigations
from suffix_analysis.adaptive import Detected, attack_defended
from suffix_analysis.attacking import conversation
from suffix_analysis.config import StudyConfig
from suffix_analysis.defences import damped, harmful_levels, restored
from suffix_analysis.detection import halves, measure_detectors
from suffix_analysis.detectors import (
    Harmfulness,
    read,
    user_mask,
)
from suffix_analysis.directions import Direction
from suffix_analysis.forward import last_logits
from suffix_analysis.generate import generate
from suffix_analysis.interventions import random_directions
from suffix_analysis.mitigations import measure_mitigations, swapped
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt, load_prompts
from suffix_analysis.records import Suffix
from tests import tiny

TEXTS = ["Pick a lock", "Break a window now", "Bake a cake", "Sing about the sea and the sky"]
SUFFIX = "x ! y ? z"


def some_direction(model: Model, layer: int = 2) -> Direction:
    assert model.bridge is not None  # wrapping changes the order of sums, so it comes before anything is compared
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(model.d_model, generator=generator)
    means = torch.randn(model.n_layers + 1, model.d_model, generator=generator)
    return Direction(vector, -1, layer, [], means + vector, means, (5,), {})


def some_levels(model: Model) -> torch.Tensor:
    """A projection for every chat position, all of them different."""
    return torch.arange(1.0, model.chat("x").n_chat + 1)


def every_head(model: Model) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


def test_a_strength_of_zero_changes_nothing_bit_for_bit(family: str) -> None:
    model = tiny.model(family)
    direction = some_direction(model)
    rows = [model.chat(text, SUFFIX).ids for text in TEXTS]
    plain = last_logits(model.hf, model.tokenizer, rows)
    for context in (
        damped(model, every_head(model), 0.0),
        restored(model, direction, some_levels(model), strength=0.0),
    ):
        with context:
            assert torch.equal(last_logits(model.hf, model.tokenizer, rows), plain)
    assert torch.equal(last_logits(model.hf, model.tokenizer, rows), plain), "all hooks are gone"


def test_mitigations_act_the_same_alone_in_batches_and_in_replies() -> None:
    model = tiny.model("llama")
    direction = some_direction(model)
    rows = [model.chat(text, SUFFIX).ids for text in TEXTS]
    plain = last_logits(model.hf, model.tokenizer, rows)
    for context in (
        lambda: damped(model, every_head(model), 0.8, tail=3),
        lambda: damped(model, every_head(model), 0.8, tail=99),  # more than the users' texts hold
        lambda: restored(model, direction, some_levels(model)),
    ):
        with context():
            together = last_logits(model.hf, model.tokenizer, rows)
            alone = torch.cat([last_logits(model.hf, model.tokenizer, [row]) for row in rows])
            whole = model.hf(input_ids=rows[0][None]).logits[0, -1].float()
            replies = generate(model.hf, model.tokenizer, rows, 3)
            first = [generate(model.hf, model.tokenizer, [row], 3)[0] for row in rows]
        assert torch.allclose(together, alone, atol=1e-4)
        assert torch.allclose(together[0], whole, atol=1e-4)
        assert not torch.allclose(together, plain, atol=1e-3)
        assert replies == first


def test_only_the_users_own_tokens_are_damped() -> None:
    model = tiny.model("llama")
    chats = [model.chat(text) for text in TEXTS]  # shorter than the tail
    seen: list[torch.Tensor] = []

    def look(pattern: torch.Tensor, hook: object) -> None:
        seen.append(pattern.detach().clone())

    with (
        damped(model, [(0, 0)], 1.0, tail=99),
        model.bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", look)]),
    ):
        for chat in chats:
            model.hf(input_ids=chat.ids[None])
    for chat, pattern in zip(chats, seen, strict=True):
        row = pattern[0, 0, -1]
        assert float(row[user_mask(chat)].max()) == 0
        assert float(row[~user_mask(chat)].min()) > 0


def test_a_defence_acts_on_a_prompt_whatever_else_runs_with_it() -> None:
    """Behind a reply, beside equal prompts, and where one instruction meets several suffixes, which share a prefix."""
    model = tiny.model("llama")
    direction = some_direction(model)
    harm = Harmfulness(torch.nn.functional.normalize(torch.arange(1.0, model.d_model + 1), dim=0), 2, 1.0, 0.0)
    ids = model.chat(TEXTS[3], SUFFIX).ids
    others = [model.chat(TEXTS[3], text).ids for text in ("a b c", "x ! y")]
    longer = torch.cat([ids, torch.tensor([7, 8, 9])])
    for context in (
        lambda: damped(model, every_head(model), 0.8),
        lambda: restored(model, direction, some_levels(model)),
        lambda: restored(model, direction, some_levels(model), harm, -1e9),
    ):
        with torch.no_grad(), context():
            wanted = model.hf(input_ids=ids[None]).logits[0, -1].float()
            behind_a_reply = model.hf(input_ids=longer[None]).logits[0, len(ids) - 1].float()
            equals = last_logits(model.hf, model.tokenizer, [ids, ids])
            beside = last_logits(model.hf, model.tokenizer, [ids, *others])
        for found in (behind_a_reply, *equals, beside[0]):
            assert torch.allclose(found, wanted, atol=1e-4)
        assert not torch.allclose(wanted, last_logits(model.hf, model.tokenizer, [ids])[0], atol=1e-3)


def test_a_full_strength_cuts_the_edges_and_rows_still_sum_to_one() -> None:
    model = tiny.model("llama")
    chat = model.chat(TEXTS[0], SUFFIX)
    n_suffix = int(chat.regions["suffix"].sum())
    seen: list[torch.Tensor] = []

    def look(pattern: torch.Tensor, hook: object) -> None:
        seen.append(pattern.detach().clone())

    with (
        damped(model, [(1, 0)], 1.0, tail=n_suffix),
        model.bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", look)]),
    ):
        model.hf(input_ids=chat.ids[None])
    rows = seen[0][0, :, chat.regions["chat"]]
    assert float(rows[0][:, chat.regions["suffix"]].max()) == 0
    assert float(rows[1][:, chat.regions["suffix"]].max()) > 0, "other heads are left alone"
    assert torch.allclose(rows.sum(dim=-1), torch.ones(rows.shape[:2]), atol=1e-5)
    with pytest.raises(ValueError, match="strength is 1"), damped(model, [(1, 0)], 1.5):
        pass


def test_restoring_takes_the_projection_to_the_harmful_mean_where_the_detector_fires() -> None:
    model = tiny.model("llama")
    direction, chats = some_direction(model), [model.chat(text, SUFFIX) for text in TEXTS]
    harm = Harmfulness(torch.nn.functional.normalize(torch.arange(1.0, model.d_model + 1), dim=0), 2, 1.0, 0.0)
    wanted = read(model, chats, direction, harm)
    gap = wanted.harmfulness - wanted.refusal
    cut = float(gap.sort().values[1:3].mean())  # two fire, two do not
    levels, seen = some_levels(model), list[torch.Tensor]()
    n_chat = len(levels)

    def look(x: torch.Tensor, hook: object) -> None:
        seen.append(x[0] @ direction.unit)

    for chat, fires in zip(chats, (gap > cut).tolist(), strict=True):
        for context in (contextlib.nullcontext(), restored(model, direction, levels, harm, cut)):
            with context, model.bridge.hooks(fwd_hooks=[(f"blocks.{direction.layer}.hook_resid_pre", look)]):
                model.hf(input_ids=chat.ids[None])
        before, after = seen[-2:]
        assert torch.equal(before[:-n_chat], after[:-n_chat]), "the user's tokens are left alone"
        assert torch.allclose(after[-n_chat:], levels if fires else before[-n_chat:], atol=1e-3)
    assert (gap > cut).sum() == 2


def test_the_control_takes_the_same_steps_along_another_direction() -> None:
    model = tiny.model("llama")
    direction, levels = some_direction(model), some_levels(model)
    (other,) = random_directions(direction.vector, 1, 3)
    ids, n_chat = model.chat(TEXTS[0], SUFFIX).ids[None], len(levels)
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor, hook: object) -> None:
        seen.append(x[0])

    for context in (
        contextlib.nullcontext(), restored(model, direction, levels), restored(model, direction, levels, along=other)
    ):  # fmt: skip
        with (
            torch.no_grad(),
            context,
            model.bridge.hooks(fwd_hooks=[(f"blocks.{direction.layer}.hook_resid_pre", look)]),
        ):
            model.hf(input_ids=ids)
    plain, treated, control = seen
    steps = ((treated - plain) @ direction.unit)[-n_chat:]
    assert float(steps.abs().min()) > 0.1
    assert torch.allclose(((control - plain) @ (other / other.norm()))[-n_chat:], steps, atol=1e-4)
    assert torch.allclose((control @ direction.unit), (plain @ direction.unit), atol=1e-4)
    assert torch.allclose((control - plain).norm(dim=-1), (treated - plain).norm(dim=-1), atol=1e-4)


def test_levels_are_the_harmful_prompts_means_at_every_chat_position() -> None:
    model = tiny.model("llama")
    direction, chats = some_direction(model), [model.chat(text) for text in TEXTS]
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor, hook: object) -> None:
        seen.append(x[0, -chats[0].n_chat :] @ direction.unit)

    with model.bridge.hooks(fwd_hooks=[(f"blocks.{direction.layer}.hook_resid_pre", look)]):
        for chat in chats:
            model.hf(input_ids=chat.ids[None])
    assert torch.allclose(harmful_levels(model, direction, chats), torch.stack(seen).mean(dim=0), atol=1e-4)


def suffixes(count: int) -> list[Suffix]:
    return [
        Suffix(f"{arm}-{i}", arm, text * (i + 1))
        for arm, text in (("adversarial", "x ! y "), ("random", "q w e "), ("benign", "and so on "))
        for i in range(count)
    ]


def few_prompts() -> list[Prompt]:
    kinds = [(kind, split) for kind in ("harmful", "harmless") for split in ("fit", "select", "report")]
    return [
        prompt
        for kind, split in [*kinds, ("lookalike", "select"), ("lookalike", "report")]
        for prompt in load_prompts("embedded", split=split, kind=kind)[:4]
    ]


def test_the_tables_have_every_line_and_their_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    direction, prompts = some_direction(model), few_prompts()
    fitted, rows = measure_detectors(model, direction, prompts, suffixes(4), most=3)
    assert len(rows) == 7 * (6 + 2)
    assert {(row["n_prompts"], row["n_suffixes"]) for row in rows} == {(3, 2)}
    assert all(0 <= row["lo"] <= row["auroc"] <= row["hi"] <= 1 for row in rows)
    asked: set[str] = set()

    def spied(hf: object, tokenizer: object, ids: list[torch.Tensor], length: int) -> list[str]:
        asked.update(model.tokenizer.decode(row) for row in ids)
        return generate(hf, tokenizer, ids, length)

    monkeypatch.setattr(mitigations, "generate", spied)
    table = measure_mitigations(model, direction, fitted, prompts, suffixes(4), n_heads=2, length=3, most=3)
    names = [row["defence"] for row in table]
    assert names[0] == "none" and len(set(names)) == len(names) == 13
    assert sum(row["control"] for row in table) == 5
    assert (table[0]["cost"], table[0]["success_change"], table[0]["lookalike_change"]) == (0, 0, 0)
    assert {row["defence"] for row in table if row["cost"] is None} == {"perplexity filter", "SmoothLLM, 10 copies"}
    assert all(row["refused"] == 0 for row in table if "filter" not in row["defence"]), "a random model refuses nothing"
    edits = [row for row in table[1:] if row["cost"] is not None and "fires" not in row["defence"]]
    assert all(row["cost"] != 0 for row in edits), "an edit acts while the cost of replies is measured"
    report = [p for p in prompts if p.kind == "harmful" and p.split == "report"][:3]
    for part, wanted in zip(halves(suffixes(4), "adversarial"), (False, True), strict=True):
        for suffix in part:
            assert all((model.chat(f"{p.text} {suffix.text}").text in asked) == wanted for p in report)
    assert not [p.text for p in prompts if p.split != "report" and any(p.text in text for text in asked)]


def test_no_edit_of_the_table_is_its_own_control() -> None:
    model = tiny.model("llama")
    direction, prompts = some_direction(model), few_prompts()
    fitted, _ = measure_detectors(model, direction, prompts, suffixes(2), most=2)
    assert fitted.strongest(3) == sorted(every_head(model), key=lambda head: -float(fitted.attention[head]))[:3], (
        "the heads with the strongest edges"
    )
    made = {line.name: line for line in mitigations.defences(model, direction, fitted, 3, 3, 0)}
    ids = model.chat(TEXTS[0], SUFFIX).ids
    found = {}
    for name, line in made.items():
        if line.reply is None:
            with line.context():
                found[name] = last_logits(model.hf, model.tokenizer, [ids])
    plain = found.pop("none")
    gated = [name for name in found if "fires" in name]
    assert all(torch.equal(found.pop(name), plain) or fitted.gap < 1e3 for name in gated)
    names = list(found)
    assert all(not torch.allclose(found[a], found[b]) for a, b in itertools.combinations(names, 2))


def test_a_filter_answers_what_it_flags_and_votes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    direction, prompts = some_direction(model), few_prompts()
    fitted, _ = measure_detectors(model, direction, prompts, suffixes(2), most=2)
    made = {line.name: line for line in mitigations.defences(model, direction, fitted, 3, 3, 0)}
    said = {"yes": "I cannot help with that.", "no": "Here it is."}

    def replies(hf: object, tokenizer: object, ids: list[torch.Tensor], length: int) -> list[str]:
        return [said[voice] for voice in itertools.islice(itertools.cycle(voices), len(ids))]

    monkeypatch.setattr(mitigations, "generate", replies)
    for said_by_turns, wanted in ((["yes", "no", "no"], "no"), (["yes", "yes", "no"], "yes"), (["yes", "no"], "yes")):
        voices = said_by_turns
        assert made["SmoothLLM, 10 copies"].reply(model, ["Sing"]) == [said[wanted]]  # type: ignore[misc]
    monkeypatch.setattr(mitigations, "perplexities", lambda *args: torch.tensor([fitted.perplexity + 1, 0.0]))
    voices = ["no"]
    assert made["perplexity filter"].reply(model, ["a", "b"]) == [mitigations.REFUSAL, said["no"]]  # type: ignore[misc]


def test_what_is_answered_succeeds_and_what_is_refused_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    direction, prompts = some_direction(model), few_prompts()
    fitted, _ = measure_detectors(model, direction, prompts, suffixes(2), most=2)
    verdicts = iter(["complied", "refused"] * 500)
    monkeypatch.setattr(mitigations, "judge", lambda text, reply: next(verdicts))
    table = measure_mitigations(model, direction, fitted, prompts, suffixes(2), n_heads=2, length=3, most=2)
    assert {row["success"] for row in table} == {0.5}


def test_a_table_without_look_alikes_says_so() -> None:
    model = tiny.model("llama")
    direction, prompts = some_direction(model), [p for p in few_prompts() if p.kind != "lookalike"]
    fitted, _ = measure_detectors(model, direction, prompts, suffixes(2), most=2)
    table = measure_mitigations(model, direction, fitted, prompts, suffixes(2), n_heads=1, length=3, most=2)
    assert all(row["lookalike"] is row["lookalike_lo"] is row["lookalike_change"] is None for row in table)


def test_evading_the_detector_is_its_score_above_the_threshold() -> None:
    """The same number as the detector's, in a forward that goes on with the target; 0 where it stays silent."""
    model = tiny.model("llama")
    direction = some_direction(model)
    harm = Harmfulness(torch.nn.functional.normalize(torch.arange(1.0, model.d_model + 1), dim=0), 2, 1.0, 0.0)
    slot = attacks.build_slot(model.tokenizer, conversation(model, TEXTS[3]), "Sure, here", SUFFIX)
    chat = model.chat(TEXTS[3], SUFFIX)
    found = read(model, [chat], direction, harm)
    gap = float(found.harmfulness[0] - found.refusal[0])
    first = int(chat.regions["instruction"].nonzero()[0])
    row = torch.cat([chat.ids, slot.target_ids[:-1]])[None]
    for cut, wanted in ((gap - 0.7, 0.7), (gap + 0.1, 0.0)):
        for context in (
            contextlib.nullcontext(),
            restored(model, direction, some_levels(model), behind=len(row[0]) - len(chat.ids)),
        ):
            with context, Detected(direction, harm, cut, first).watch(model.hf, slot) as value, torch.no_grad():
                model.hf(input_ids=row)
            assert float(value()) == pytest.approx(wanted, abs=1e-3)


def test_the_attack_on_a_gated_defence_evades_its_detector_from_a_known_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    direction = some_direction(model)
    prompts = few_prompts()
    fitted, _ = measure_detectors(model, direction, prompts, suffixes(2), most=2)
    asked: dict[str, Any] = {}

    def spied(*args: Any, **more: Any) -> list[dict[str, Any]]:
        asked.update(more, defended=args[4], terms=args[5])
        return []

    monkeypatch.setattr(mitigations, "attack_defended", spied)
    monkeypatch.setattr(mitigations, "split_for_attack", lambda own, n, seed, refused: (own[:2], own[2:]))
    mitigations.attack_defences(model, direction, fitted, prompts, suffixes(2), StudyConfig(steps=2))
    ((evading,),) = asked["terms"].values()
    assert [*asked["terms"]] == [mitigations.RESTORED] and mitigations.RESTORED in asked["defended"]
    assert evading.weight > 0 and evading.cut < fitted.gap
    assert asked["init"] == suffixes(2)[0].text
    assert {p.split for p in asked["final"]} == {"report"}


def test_a_swapped_text_keeps_its_length_and_most_letters() -> None:
    text = "Tell me how clouds form over the sea"
    found = swapped(text, random.Random(0), 0.25)
    assert len(found) == len(text)
    assert 0 < sum(a != b for a, b in zip(found, text, strict=True)) <= 9
    assert swapped(text, random.Random(0), 0.0) == text


def test_an_attackers_forward_meets_the_same_defence() -> None:
    model = tiny.model("llama")
    direction, ids = some_direction(model), model.chat(TEXTS[1], SUFFIX).ids
    target = torch.tensor([7, 8, 9])
    behind = len(target) - 1
    longer = torch.cat([ids, target[:-1]])[None]

    def contexts(behind: int) -> list[Any]:
        return [
            damped(model, every_head(model), 0.7, tail=4, behind=behind),
            restored(model, direction, some_levels(model), behind=behind),
        ]  # fmt: skip

    for plain, attacked in zip(contexts(0), contexts(behind), strict=True):
        with torch.no_grad(), plain:
            wanted = model.hf(input_ids=ids[None]).logits[0, -1]
        with torch.no_grad(), attacked:
            by_ids = model.hf(input_ids=longer).logits[0, len(ids) - 1]
            by_embeddings = model.hf(inputs_embeds=model.hf.get_input_embeddings()(longer)).logits[0, len(ids) - 1]
        assert torch.allclose(by_ids, wanted, atol=1e-4)
        assert torch.allclose(by_embeddings, wanted, atol=1e-4)


def test_adaptive_attacks_have_equal_budgets_and_meet_their_defence() -> None:
    model = tiny.model("llama")
    direction = some_direction(model)
    prompts = load_prompts("embedded", split="select", kind="harmful")[:6]
    config = StudyConfig(steps=3, search_width=8, topk=16, suffix_tokens=4, n_instructions=2)
    defended: dict[str, Any] = {
        "none": lambda behind: contextlib.nullcontext(),
        "nothing": lambda behind: restored(model, direction, some_levels(model), strength=0.0, behind=behind),
        "restored": lambda behind: restored(model, direction, some_levels(model), strength=3.0, behind=behind),
    }
    rows = attack_defended(model, prompts[:2], prompts[2:], [5, 6], defended, {}, config)
    losses = {name: [row["loss"] for row in rows if row["defence"] == name] for name in defended}
    assert [row["step"] for row in rows] == [1, 2, 3] * 3
    assert losses["none"] == losses["nothing"] != losses["restored"]
    for row in rows:
        looked = row["step"] == 3
        assert (row["not_refused"] is not None) == (row["target_loss"] is not None) == looked
        if looked:  # there are no further terms, so the best loss is the target's own
            assert row["target_loss"] == pytest.approx(row["best_loss"], abs=1e-4)
    assert {(row["n_prompts"], row["n_train"]) for row in rows} == {(4, 2)}


def test_the_last_step_is_judged_on_report_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    assert model.bridge is not None
    prompts = load_prompts("embedded", split="select", kind="harmful")[:4]
    config = StudyConfig(steps=2, search_width=6, topk=16, suffix_tokens=4, n_instructions=1)
    verdicts = iter(["complied", "refused", "complied", "complied"])
    monkeypatch.setattr(adaptive, "judge", lambda text, reply: next(verdicts))
    none: dict[str, Any] = {"none": lambda behind: contextlib.nullcontext()}
    rows = attack_defended(
        model, prompts[:1], prompts[1:], [5], none, {}, config, init="q w e r", final=prompts
    )  # fmt: skip
    assert [row["success"] for row in rows] == [None, 0.75] and rows[-1]["n_final"] == 4
