"""Tables of detectors and mitigations, and attacks on defended models, on tiny models."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

import attacks
from suffix_analysis import adaptive, mitigations
from suffix_analysis.adaptive import Detected, Trial, attack_defended, budgets
from suffix_analysis.attacking import conversation
from suffix_analysis.config import StudyConfig
from suffix_analysis.defences import Firings, restored
from suffix_analysis.detection import measure_detectors, parts_of
from suffix_analysis.detectors import (
    Harmfulness,
    read,
)
from suffix_analysis.forward import last_logits
from suffix_analysis.generate import generate
from suffix_analysis.judges import Verdict
from suffix_analysis.mitigations import measure_mitigations, swapped
from suffix_analysis.prompts import load_prompts
from tests import tiny
from tests.stages.test_defences import SUFFIX, TEXTS, every_head, few_prompts, some_direction, some_levels, suffixes

pytestmark = pytest.mark.long


def test_the_tables_have_every_line_and_their_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    direction, prompts = some_direction(model), few_prompts()
    fitted, rows = measure_detectors(model, direction, prompts, suffixes(4), most=3)
    assert len(rows) == 7 * (6 + 3)
    assert {(row["n_prompts"], row["n_suffixes"]) for row in rows} == {(3, 2)}
    assert all(0 <= row["lo"] <= row["auroc"] <= row["hi"] <= 1 for row in rows)
    asked: set[str] = set()

    def spied(hf: object, tokenizer: object, ids: list[torch.Tensor], length: int) -> list[str]:
        asked.update(model.tokenizer.decode(row) for row in ids)
        return generate(hf, tokenizer, ids, length)

    monkeypatch.setattr(mitigations, "generate", spied)
    table = measure_mitigations(model, direction, fitted, prompts, suffixes(4), n_heads=2, length=3, most=3)
    names = [row["defence"] for row in table]
    assert names[0] == "none" and len(set(names)) == len(names) == 15
    assert sum(row["control"] for row in table) == 6
    assert table[0]["slower"] == 0 and all(row["seconds"] > 0 for row in table)
    held = {row["defence"]: row["mass"] for row in table if row["mass"] is not None}
    assert len(held) == 2 + 3 + 1 and max(held.values()) == held[mitigations.damping(0.9, fitted.tail)], (
        "the strongest edges hold most"
    )
    by_name = {row["defence"]: row for row in table}
    top, control = (
        by_name[mitigations.damping(0.9, fitted.tail)],
        by_name["at most as much taken from the tokens before them"],
    )
    assert top["taken"] == pytest.approx(0.9 * top["mass"]) and 0 < control["taken"] <= top["taken"] + 1e-6
    for row in table:
        gated = "fires" in row["defence"] or "filter" in row["defence"]
        assert all((row[f"fires_{kind}"] is not None) == gated for kind in ("attacked", "lookalike", "harmless"))
    assert {(row["n_timed"], row["wrapped"]) for row in table} == {(3, True)}, "some_direction has it wrapped"
    assert (table[0]["cost"], table[0]["success_change"], table[0]["lookalike_change"]) == (0, 0, 0)
    filters = {"refused where the detector fires", "perplexity filter"}
    assert {row["defence"] for row in table if row["cost"] is None} == filters | {"SmoothLLM, 10 copies"}
    for row in table:  # a random model refuses nothing, and a filter what it fires at
        assert row["refused"] == (row["fires_attacked"] if row["defence"] in filters else 0)
    edits = [row for row in table[1:] if row["cost"] is not None and "fires" not in row["defence"]]
    assert all(row["cost"] != 0 for row in edits), "an edit acts while the cost of replies is measured"
    report = [p for p in prompts if p.kind == "harmful" and p.split == "report"][:3]
    for part, wanted in zip(parts_of(suffixes(4), "adversarial"), (False, True), strict=True):
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
    monkeypatch.setattr(mitigations, "gaps", lambda *args: torch.tensor([fitted.gap + 1, fitted.gap]))
    voices = ["no"]
    for name in ("perplexity filter", "refused where the detector fires"):
        assert made[name].reply(model, ["a", "b"]) == [mitigations.REFUSAL, said["no"]]  # type: ignore[misc]
        assert made[name].fired.take() == 0.5


def test_what_is_answered_succeeds_and_what_is_refused_does_not() -> None:
    model = tiny.model("llama")
    direction, prompts = some_direction(model), few_prompts()
    fitted, _ = measure_detectors(model, direction, prompts, suffixes(2), most=2)
    verdicts: Iterator[Verdict] = itertools.cycle(["complied", "refusal"])
    table = measure_mitigations(
        *(model, direction, fitted, prompts, suffixes(2)),
        n_heads=2,
        length=3,
        most=2,
        judge=lambda text, reply: next(verdicts),
    )
    assert {row["success"] for row in table} == {0.5}


def test_times_are_beside_the_model_as_it_was_loaded() -> None:
    """Only lines that need TransformerLens's hooks are timed on a model that it has wrapped."""
    read_from, model = tiny.model("llama"), tiny.model("llama")
    fitted, _ = measure_detectors(read_from, some_direction(read_from), few_prompts(), suffixes(2), most=2)
    plan = mitigations.defences(model, some_direction(read_from), fitted, 2, 3, 0)
    met: dict[str, set[bool]] = {}

    def spied(line: mitigations.Defence) -> mitigations.Defence:
        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with line.context():
                yield
            met.setdefault(line.name, set()).add("bridge" in model.__dict__)

        return replace(line, context=context)

    times = mitigations._times(model, [spied(line) for line in plan], ["Sing", "Bake a cake"], 3)
    assert times.keys() == met.keys()
    for line in plan[1:]:
        assert met[line.name] == {line.wrapped}, line.name


def test_the_cost_is_left_open_where_no_harmless_reply_has_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    direction, prompts = some_direction(model), few_prompts()
    fitted, _ = measure_detectors(model, direction, prompts, suffixes(2), most=2)
    monkeypatch.setattr(mitigations, "reply_pairs", lambda *_, **__: [])
    table = measure_mitigations(model, direction, fitted, prompts, suffixes(2), n_heads=1, length=3, most=2)
    assert {row["cost"] for row in table} == {None}


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
    harm = Harmfulness(
        torch.nn.functional.normalize(torch.arange(1.0, model.d_model + 1), dim=0), 2, 1.0, 0.0, 1.0, 0.0
    )
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


def test_the_attack_on_a_gated_defence_evades_its_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    direction = some_direction(model)
    prompts = few_prompts()
    fitted, _ = measure_detectors(model, direction, prompts, suffixes(2), most=2)
    asked: dict[str, Any] = {}

    def spied(model: Any, trial: Trial, defended: Any, terms: Any, on_step: Any, fired: Any) -> list[dict[str, Any]]:
        assert [*fired] == [mitigations.RESTORED]
        asked.update(final=trial.final, defended=defended, terms=terms)
        return []

    monkeypatch.setattr(mitigations, "attack_defended", spied)
    own = [p for p in prompts if p.split == "select"]
    split = own[:2], own[2:]
    mitigations.attack_defences(model, direction, fitted, prompts, StudyConfig(steps=2), split)
    ((evading,),) = asked["terms"].values()
    assert [*asked["terms"]] == [mitigations.RESTORED] and mitigations.RESTORED in asked["defended"]
    assert evading.weight > 0 and evading.cut < fitted.gap
    assert {p.split for p in asked["final"]} == {"report"}


def test_a_swapped_text_keeps_its_length_and_most_letters() -> None:
    text = "Tell me how clouds form over the sea"
    found = swapped(text, random.Random(0), 0.25)
    assert len(found) == len(text)
    assert 0 < sum(a != b for a, b in zip(found, text, strict=True)) <= 9
    assert swapped(text, random.Random(0), 0.0) == text


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
    fired = Firings()
    always = Harmfulness(direction.unit, 2, 1.0, 0.0, 1.0, 0.0)
    defended["gated"] = lambda behind: restored(
        model, direction, some_levels(model), always, -1e9, behind=behind, fired=fired
    )
    rows = attack_defended(model, Trial(prompts[:2], prompts[2:], [5, 6], config), defended, {}, fired={"gated": fired})
    for row in rows:
        assert row["fires"] == (1.0 if row["defence"] == "gated" and row["step"] in (0, 3) else None)
    losses = {name: [row["loss"] for row in rows if row["defence"] == name] for name in defended}
    assert [row["step"] for row in rows] == [0, 1, 2, 3] * 4
    assert losses["none"] == losses["nothing"] != losses["restored"]
    begun = {row["defence"]: row["target_loss"] for row in rows if row["step"] == 0}
    assert begun["none"] == begun["nothing"] != begun["restored"], "all begin with one text, which meets the defence"
    for row in rows:
        looked = row["step"] in (0, 3)
        assert (row["not_refused"] is not None) == (row["target_loss"] is not None) == looked
        if row["step"] == 3:  # there are no further terms, so the best loss is the target's own
            assert row["target_loss"] == pytest.approx(row["best_loss"], abs=1e-4)
    assert {(row["n_prompts"], row["n_train"]) for row in rows} == {(4, 2)}


def test_the_first_and_the_last_step_are_judged_on_report_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    assert model.bridge is not None
    prompts = load_prompts("embedded", split="select", kind="harmful")[:4]
    config = StudyConfig(steps=2, search_width=6, topk=16, suffix_tokens=4, n_instructions=1)
    verdicts = iter(["refusal"] * 4 + ["complied", "refusal", "complied", "complied"])
    monkeypatch.setattr(adaptive, "judge_named", lambda name: lambda text, reply: next(verdicts))
    none: dict[str, Any] = {"none": lambda behind: contextlib.nullcontext()}
    rows = attack_defended(model, Trial(prompts[:1], prompts[1:], [5], config, prompts), none, {})
    assert [row["success"] for row in rows] == [0.0, None, 0.75] and rows[-1]["n_final"] == 4
    for row, n in ((rows[0], 0), (rows[-1], 3)):
        exact = binomtest(n, 4).proportion_ci(method="exact")
        assert (row["success_lo"], row["success_hi"]) == pytest.approx((exact.low, exact.high))
    assert rows[1]["success_lo"] is None


def test_a_defences_price_is_counted_in_steps() -> None:
    def looks(name: str, *pairs: tuple[float, float]) -> list[dict[str, Any]]:
        return [
            {"defence": name, "step": step, "target_loss": loss, "not_refused": share}
            for step, (loss, share) in zip((0, 5, 8), pairs, strict=True)
        ]

    unseen = {"defence": "none", "step": 1, "target_loss": None, "not_refused": None}
    rows = [
        *looks("none", (2.0, 0.1), (1.0, 0.5), (0.8, 0.9)),
        unseen,
        *looks("costly", (3.0, 0.0), (2.0, 0.2), (0.9, 0.6)),
    ]
    rows += looks("useless", (0.5, 0.7), (0.5, 0.7), (0.4, 0.8))
    found = {row["defence"]: (row["steps_to_half"], row["steps_to_loss"]) for row in budgets(rows)}
    assert found == {"none": (5, 8), "costly": (8, None), "useless": (0, 0)}
    assert {(row["bar"], row["n_steps"]) for row in budgets(rows)} == {(0.8, 8)}
    assert [row["steps_to_loss"] for row in budgets(rows[3 + 1 :])] == [None, None], (
        "nothing undefended to compare with"
    )
