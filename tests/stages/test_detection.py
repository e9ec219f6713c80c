"""Detectors on tiny models: what they read, and on what they are fitted, calibrated and measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from suffix_analysis import detection
from suffix_analysis.chat import Chat
from suffix_analysis.detection import matched, measure_detectors, parts_of
from suffix_analysis.detector_table import detector_rows, largest_or, threshold
from suffix_analysis.detectors import (
    Detector,
    Harmfulness,
    Readings,
    blind,
    by_user_token,
    fit_detectors,
    gaps,
    harmfulness_of,
    peak,
    read,
    user_mask,
    windowed,
)
from suffix_analysis.errors import UserError
from suffix_analysis.oneness import discriminant, fitted
from suffix_analysis.prompts import Prompt
from suffix_analysis.stats import crossed_auroc, rate_interval
from tests import tiny
from tests.stages.test_defences import SUFFIX, TEXTS, few_prompts, some_direction, suffixes


def test_readings_are_what_they_say(family: str) -> None:
    model = tiny.model(family)
    chats = [model.chat(text, SUFFIX) for text in TEXTS]
    direction = some_direction(model, 1)
    harm = harmfulness_of(model, direction, [model.chat(t) for t in TEXTS[:2]], [model.chat(t) for t in TEXTS[2:]])
    found = read(model, chats, direction, harm)
    for i, chat in enumerate(chats):
        logits = model.hf(input_ids=chat.ids[None]).logits[0].float().log_softmax(-1)
        at = user_mask(chat).nonzero().flatten()
        surprisal = -logits[at - 1, chat.ids[at]]
        assert float(found.tokens[i]) == len(at)
        assert float(found.perplexity[i]) == pytest.approx(windowed(surprisal.detach()), abs=2e-3)
        own, _ = by_user_token(model, [chat], harm.unit, harm.layer)[0]
        assert torch.allclose(own, surprisal, atol=2e-3)
    assert found.hijacking.shape == (4, model.n_layers)
    assert found.heads.shape == (4, model.n_layers * model.n_heads)


def test_harmfulness_and_refusal_are_0_and_1_on_average_for_what_they_were_fitted_with() -> None:
    model = tiny.model("llama")
    sides = [[model.chat(text) for text in texts] for texts in (TEXTS[:2], TEXTS[2:])]
    _, means = zip(*(fitted(model, chats, 2, chats[0].n_chat) for chats in sides), strict=True)
    at_end = [torch.cat([mean[:, -1], mean[-1:, -1]]).float() for mean in means]  # the last layer is not read
    direction = replace(some_direction(model), vector=at_end[0][2] - at_end[1][2])
    direction = replace(direction, means_harmful=at_end[0], means_harmless=at_end[1])
    harm = harmfulness_of(model, direction, *sides)
    for chats, wanted in zip(sides, (1.0, 0.0), strict=True):
        found = read(model, chats, direction, harm)
        for name in ("harmfulness", "instructed", "refusal"):
            assert float(getattr(found, name).mean()) == pytest.approx(wanted, abs=1e-3), name
        assert float(gaps(model, direction, harm, chats).mean()) == pytest.approx(0, abs=1e-3)
    with pytest.raises(UserError, match="do not look more harmful"):
        harmfulness_of(model, direction, sides[0], sides[0])


def test_a_later_token_cannot_lower_harmfulness() -> None:
    model = tiny.model("llama")
    harm = Harmfulness(torch.nn.functional.normalize(torch.ones(model.d_model), dim=0), 2, 1.0, 0.0, 1.0, 0.0)
    direction = some_direction(model)
    plain = read(model, [model.chat(text) for text in TEXTS], direction, harm).harmfulness
    attacked = read(model, [model.chat(text, SUFFIX) for text in TEXTS], direction, harm).harmfulness
    assert bool((attacked >= plain - 1e-4).all())


def test_the_peak_is_the_mean_of_the_three_largest_and_one_outlier_moves_it_little() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 9, generator=rng)
    wanted = rows.sort(dim=1, descending=True).values[:, :3].mean(dim=1)
    assert torch.allclose(peak(rows), wanted)
    more = torch.cat([rows, torch.randn(50, 4, generator=rng)], dim=1)
    assert bool((peak(more) >= peak(rows)).all()), "further tokens only raise it"
    outlier = torch.zeros(1, 9)
    outlier[0, 4] = 3.0
    assert float(peak(outlier)) == pytest.approx(1.0), "a third of what the largest alone would say"
    assert torch.equal(peak(rows[:, :2]), rows[:, :2].mean(dim=1)), "fewer tokens: all of them"
    user = torch.rand(50, 9, generator=rng) < 0.4
    for bad in (float("nan"), float("inf")):
        assert not bool(peak(torch.tensor([[bad, 1.0, 2.0, 3.0]])).isfinite().any()), "an overflow does not pass unseen"
    for row, mask, found in zip(rows, user, peak(rows, user), strict=True):
        assert float(found) == pytest.approx(float(peak(row[mask][None]))) if mask.any() else bool(found.isnan())


def test_the_peak_has_a_gradient_at_its_three_tokens_alone() -> None:
    rows = torch.tensor([[0.0, 5.0, 1.0, 4.0, 3.0]], requires_grad=True)
    peak(rows, torch.tensor([[True, True, True, True, True]])).sum().backward()
    assert rows.grad is not None and torch.allclose(rows.grad, torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]]) / 3)


def test_the_tail_is_the_users_last_tokens() -> None:
    chat = tiny.model("llama").chat(TEXTS[3], SUFFIX)
    found = blind(chat, 4)
    at = user_mask(chat).nonzero().flatten()
    assert found.regions["suffix"].nonzero().flatten().tolist() == at[-4:].tolist()
    assert torch.equal(user_mask(found), user_mask(chat))


def readings(n: int, harm: float, tokens: float, seed: int) -> Readings:
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 8, generator=rng)
    return Readings(
        tokens=tokens + noise[:, 0], perplexity=noise[:, 1], harmfulness=harm + 0.1 * noise[:, 2],
        refusal=0.1 * noise[:, 3], hijacking=noise[:, 4:6] + torch.tensor([0.0, harm]), heads=noise[:, 6:] + harm,
        attention=noise[:, 6:], before=noise[:, 6:], instructed=harm + 0.1 * noise[:, 2],
    )  # fmt: skip


def test_what_is_planted_is_found_and_the_baseline_finds_nothing() -> None:
    detectors = fit_detectors(readings(64, 3.0, 30, 0), readings(64, 0.0, 30, 1))
    calibration = {"benign": readings(400, 0.0, 30, 2)}
    rows = detector_rows(
        detectors, calibration, [readings(40, 3.0, 30, s) for s in (3, 4)],
        {"benign": [readings(40, 0.0, 30, s) for s in (5, 6, 7)]},
    )  # fmt: skip
    found = {row["detector"]: row for row in rows if row["against"] == "all of these"}
    assert found["harmfulness − refusal"]["auroc"] > 0.99 and found["harmfulness − refusal"]["caught_1"] > 0.99
    assert found["hijacking strength (layer 1)"]["auroc"] > 0.95
    assert found["probe on head contributions"]["auroc"] > 0.95
    for nothing in ("token count", "windowed perplexity", "low refusal projection"):
        assert found[nothing]["lo"] < 0.5 < found[nothing]["hi"]
    assert all(row["false_positives_5"] < 0.12 for row in found.values())
    assert all(row["descriptive"] for row in found.values()), "two suffixes are few"


def test_thresholds_keep_their_promise_on_further_conversations() -> None:
    rng = np.random.default_rng(0)
    for rate, n in ((0.01, 99), (0.01, 250), (0.05, 19), (0.05, 60)):
        beyond = []
        for _ in range(4000):
            scores = rng.normal(size=n + 1)
            cut = threshold(scores[1:], rate)
            assert cut is not None
            beyond.append(scores[0] > cut)
        assert np.mean(beyond) <= rate + 3 * np.sqrt(rate / 4000)
    assert threshold(rng.normal(size=98), 0.01) is None and threshold(rng.normal(size=18), 0.05) is None
    assert largest_or(np.array([1.0, 3.0, 2.0]), 0.05) == 3.0


def test_rates_that_too_few_conversations_set_are_left_out() -> None:
    detectors = fit_detectors(readings(64, 3.0, 30, 0), readings(64, 0.0, 30, 1))
    rows = detector_rows(
        detectors,
        {"benign": readings(50, 0.0, 30, 2)},
        [readings(40, 3.0, 30, 3)],
        {"benign": [readings(40, 0, 33, 5)]},
    )
    for row in rows:
        assert row["caught_1"] is row["threshold_1"] is row["false_positives_1_hi"] is None and row["n_marks"] == 50
        assert row["caught_5"] is not None and row["descriptive"]
        assert row["tokens_apart"] == pytest.approx(-3, abs=0.7), "others are longer, and the row is descriptive"


def test_what_tables_share_is_drawn_once() -> None:
    """Prompts on which all conversations score high widen the interval of kinds that share them."""
    rng = np.random.default_rng(0)
    hard = 2 * rng.normal(size=(12, 1))
    positive = 1 + rng.normal(size=(12, 6))
    negatives = [hard + 0.1 * rng.normal(size=(12, 6)) for _ in range(3)]
    apart = crossed_auroc(positive, negatives)
    shared = crossed_auroc(positive, negatives, sets=[("a", "x"), *(("b", str(i)) for i in range(3))])
    assert shared[0] == apart[0] and shared[2] - shared[1] > 1.2 * (apart[2] - apart[1])
    with pytest.raises(ValueError, match="a has 12 members in one table and 6 in another"):
        crossed_auroc(positive, [positive[:6]], sets=[("a", "x"), ("a", "y")])


def test_one_pair_of_prompts_cannot_fit_and_calibrate() -> None:
    model = tiny.model("llama")
    prompts = [p for p in few_prompts() if p.split != "select" or p.id == few_prompts()[4].id or p.kind == "harmless"]
    assert sum(p.split == "select" and p.kind == "harmful" for p in prompts) == 1
    with pytest.raises(UserError, match="1 pairs of harmful and harmless select prompts; detectors need two"):
        measure_detectors(model, some_direction(model), prompts, suffixes(2), most=2)


def test_the_texts_end_is_as_long_as_the_suffixes_are() -> None:
    model = tiny.model("llama")
    fitted, _ = measure_detectors(model, some_direction(model), few_prompts(), suffixes(4), most=2)
    own = [model.chat("x", s.text).regions["suffix"].sum() for s in parts_of(suffixes(4), "adversarial")[0]]
    assert fitted.tail == int(max(own)) != 20
    every = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    assert fitted.taken(every, 0.5) == pytest.approx(0.5 * float(fitted.attention.mean()))
    assert fitted.taken(every, 1.0, before=True) <= float(fitted.attacked.before.mean()) + 1e-6


@pytest.mark.long
def test_nothing_is_measured_with_what_it_was_fitted_or_calibrated_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    prompts, calls = few_prompts(), list[set[tuple[str, str]]]()
    split = {p.text: p.split for p in prompts}
    fitting: list[list[Readings]] = []

    def spied(model: object, chats: list[Chat], *more: Any) -> Readings:
        calls.append({(chat.instruction, chat.suffix) for chat in chats})
        return read(model, chats, *more)  # type: ignore[arg-type]

    def learnt(attacked: Readings, others: Readings) -> list[Detector]:
        fitting.append([attacked, others])
        calls.append({("fitted", "")})
        return fit_detectors(attacked, others)

    monkeypatch.setattr(detection, "read", spied)
    monkeypatch.setattr(detection, "fit_detectors", learnt)
    fitted, rows = measure_detectors(model, some_direction(model), prompts, suffixes(4), most=2)
    at = calls.index({("fitted", "")})
    used = set[tuple[str, str]]().union(*calls[:at])
    later = calls[at + 1 :]
    calibrated = set[tuple[str, str]]().union(*(c for c in later if split[min(c)[0]] == "select"))
    measured = set[tuple[str, str]]().union(*(c for c in later if split[min(c)[0]] == "report"))
    assert {split[text] for text, _ in used} == {split[text] for text, _ in calibrated} == {"select"}
    assert {split[text] for text, _ in measured} == {"report"}
    with_text = [{pair for pair in part if pair[1]} for part in (used, calibrated, measured)]
    assert not {text for text, _ in used} & {text for text, _ in calibrated}, (
        "prompts of their own, also without a text"
    )
    assert not {s for _, s in with_text[0] | with_text[1]} & {s for _, s in with_text[2]}, "suffixes not seen before"
    assert set(fitted.calibration) == {row["against"] for row in rows} - {
        "all of these", "harmless alone", "lookalike alone", "long harmless text"
    }  # fmt: skip
    cuts = {row["against"]: row["threshold_5"] for row in rows if row["detector"] == "probe on head contributions"}
    probe = fitted.of("probe")
    for kind, found in fitted.calibration.items():
        assert cuts[kind] == threshold(probe.score(found), 0.05), "every kind has its own threshold"
    both = torch.cat([readings.heads for readings in fitting[0]]).double()
    centred = (fitting[0][0].heads.double() - both.mean(dim=0)) / both.std(dim=0).clamp(min=1e-9)
    assert probe.score(fitting[0][0]).shape == (len(centred),)
    unit = discriminant(centred, (fitting[0][1].heads.double() - both.mean(dim=0)) / both.std(dim=0).clamp(min=1e-9))
    assert np.allclose(probe.score(fitting[0][0]), (centred @ unit).numpy()), "both classes scale the probe"
    plain = {kind: fitted.of("harmfulness − refusal").score(own) for kind, own in fitted.plain.items()}
    assert {kind: len(own) for kind, own in plain.items()} == {
        "harmless alone": 2, "lookalike alone": 4, "long harmless text": 2
    }, "those that fitted are left out"  # fmt: skip
    lengths = {kind: float(own.tokens.mean()) for kind, own in fitted.plain.items()}
    assert lengths["long harmless text"] > lengths["harmless alone"] + 4
    far = replace(fitted.plain["long harmless text"], harmfulness=fitted.plain["long harmless text"].harmfulness + 1e3)
    assert replace(fitted, plain=fitted.plain | {"long harmless text": far}).gap > fitted.gap, "long ones count, too"
    assert all(fitted.gap >= own.max() for own in plain.values()), "harmless prompts are left alone"
    for kind, higher in (("harmful + benign text", False), ("harmless + random text", True)):
        far = replace(fitted.calibration[kind], harmfulness=fitted.calibration[kind].harmfulness + 1e3)
        moved = replace(fitted, calibration=fitted.calibration | {kind: far})
        assert (moved.gap > fitted.gap) == higher, "to refuse harmful ones is no mistake"
    kinds = [fitted.calibration["harmless + benign text"], *fitted.plain.values()]
    assert fitted.perplexity == pytest.approx(max(float(kind.perplexity.max()) for kind in kinds))


def test_the_suffixs_beginning_is_known_to_one_detector_alone() -> None:
    model = tiny.model("llama")
    harm = Harmfulness(torch.nn.functional.normalize(torch.ones(model.d_model), dim=0), 2, 1.0, 0.0, 1.0, 0.0)
    direction = some_direction(model)
    plain = read(model, [model.chat(text) for text in TEXTS], direction, harm)
    attacked = read(model, [model.chat(text, SUFFIX) for text in TEXTS], direction, harm)
    assert torch.allclose(attacked.instructed, plain.instructed, atol=1e-4), "what stands before cannot be changed"


def test_perfect_separation_has_an_interval() -> None:
    value, lo, hi = crossed_auroc(np.ones((20, 3)), [np.zeros((20, 3))])
    assert value == hi == 1 and lo == pytest.approx(rate_interval(np.ones(20))[1])


def test_prompts_come_in_pairs_of_the_same_length() -> None:
    model = tiny.model("llama")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    kinds = (("harmful", range(4, 12)), ("harmless", range(12)))
    prompts = [
        Prompt(f"{kind}-{n}-{i}", " ".join([*words[:n], letter]), kind, "report")
        for kind, lengths in kinds for n in lengths for i, letter in enumerate("xy")
    ]  # fmt: skip
    found = matched(model, prompts, "report", 12)
    sizes = [[len(model.chat(p.text).ids) for p in found[kind]] for kind in ("harmful", "harmless")]
    assert sizes[0] == sizes[1] and len(set(sizes[0])) > 3
    assert len({p.id for own in found.values() for p in own}) == 24, "no prompt twice"
    # where no length is shared, a few pairs are better than none
    far = [p for p in prompts if (len(p.text) < 20) == (p.kind == "harmless")]
    assert 0 < len(matched(model, far, "report", 12)["harmful"]) <= 8


def test_one_suffix_is_too_few_to_fit_and_to_measure() -> None:
    with pytest.raises(UserError, match="1 suffixes of the adversarial arm"):
        parts_of(suffixes(1), "adversarial")


@pytest.mark.long
def test_few_texts_on_either_side_are_descriptive_and_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suffix_analysis.detector_table.APART", 1e9)  # these texts differ in length
    model = tiny.model("llama")
    prompts = few_prompts()
    arms = {arm: [s for s in suffixes(12) if s.arm == arm] for arm in ("adversarial", "random", "benign")}
    for few, described in ((None, False), ("adversarial", True), ("random", True)):
        own = [s for arm, some in arms.items() for s in (some[:4] if arm == few else some)]
        fitted, rows = measure_detectors(model, some_direction(model), prompts, own, most=2)
        whole = next(row for row in rows if row["against"] == "all of these")
        assert whole["descriptive"] == described, few
        assert whole["n_suffixes"] == (2 if few == "adversarial" else 8) and whole["n_texts"] == (
            8 if few is None else 2
        )
        assert {row["n_texts"] for row in rows if row["against"] in fitted.plain} == {0}
    positive, negative = np.random.default_rng(0).normal(1, 1, (12, 16)), np.random.default_rng(1).normal(0, 1, (12, 3))
    widths = [hi - lo for n in (16, 3) for _, lo, hi in [crossed_auroc(positive, [negative], n_suffixes=n)]]
    assert widths[1] > 1.5 * widths[0]
