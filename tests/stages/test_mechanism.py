"""The mechanism stage on a planted model: its tables say what was planted, with controls and intervals."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from suffix_analysis.causal_tests import ATTENTION, random_heads
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.mechanism import measure_mechanism
from suffix_analysis.mechanism_checks import check_rows
from suffix_analysis.prompts import Prompt
from suffix_analysis.records import Suffix
from tests.planted.models import (
    CARRIER,
    D_MODEL,
    OPPONENT,
    READ_LAYER,
    REFUSAL,
    SUFFIX,
    WORDS,
    F,
    instructions,
    planted,
)

pytestmark = pytest.mark.long


def prompts(split: str, count: int, seed: int, kind: str = "harmful") -> list[Prompt]:
    texts = instructions(count, harmful=kind == "harmful", seed=seed)
    return [Prompt(f"{kind}-{split}-{i}", text, kind, split) for i, text in enumerate(texts)]


@functools.cache
def tables(mechanism: str) -> dict[str, list[dict[str, Any]]]:
    model = planted(mechanism)
    unit = torch.nn.functional.one_hot(torch.tensor(F["refuse"]), D_MODEL).float()
    means = torch.zeros(model.n_layers + 1, D_MODEL)
    direction = Direction(unit, -1, READ_LAYER, [], means + unit, means, (WORDS.index(REFUSAL),), {})
    suffixes = [
        Suffix(f"adversarial-{i}", "adversarial", " ".join(words)) for i, words in enumerate((SUFFIX, SUFFIX[::-1]))
    ]
    controls = [
        Suffix("shuffled-1", "shuffled", " ".join(SUFFIX[::-1])),
        *(Suffix(f"benign-{i}", "benign", " ".join(["and"] * len(SUFFIX))) for i in (1, 2)),
    ]
    return measure_mechanism(  # 20 prompts: two groups
        model, direction, prompts("report", 20, 3), prompts("select", 6, 4), prompts("select", 6, 5, "harmless"),
        suffixes, [CARRIER, OPPONENT], controls=controls, reply_tokens=2,
    )  # fmt: skip


def rows(mechanism: str, table: str, **wanted: object) -> list[dict[str, Any]]:
    return [row for row in tables(mechanism)[table] if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("mechanism", ["softmax", "query", "opponent", "mlp"])
def test_terms_say_what_carries_the_fall(mechanism: str) -> None:
    found = {row["term"]: row for row in rows(mechanism, "carried", arm="adversarial")}
    carrier = "MLPs" if mechanism == "mlp" else "top heads"
    assert sum(row["share"] for row in found.values()) == pytest.approx(1, abs=1e-6)
    assert found[carrier]["share"] == pytest.approx(1, abs=1e-4)
    assert (found[carrier]["n_prompts"], found[carrier]["n_suffixes"]) == (20, 2)


@pytest.mark.parametrize(("mechanism", "factor"), [("softmax", "dilution"), ("query", "query")])
def test_factors_say_why(mechanism: str, factor: str) -> None:
    for layer, head in (CARRIER, (-1, -1)):
        found = {
            row["factor"]: row["share"] for row in rows(mechanism, "factors", arm="adversarial", layer=layer, head=head)
        }
        assert found[factor] == pytest.approx(1, abs=1e-4)
    assert rows(mechanism, "factors", layer=OPPONENT[0], head=OPPONENT[1])[0]["share"] is None, "no change, no share"


def test_tests_recover_what_was_planted_and_their_controls_do_not() -> None:
    def recovered(test: str, heads: str, **wanted: object) -> list[float]:
        return [row["projection_recovered"] for row in rows("softmax", "causal", test=test, heads=heads, **wanted)]

    cut, destroyed = "suffix edges cut, mass renormalised", "suffix edges cut, mass destroyed"
    patched = "patched from the run without suffix"
    for test in (cut, patched):
        assert recovered(test, "top", n_heads=2) == [pytest.approx(1, abs=1e-4)]
        assert recovered(test, "all") == [pytest.approx(1, abs=1e-4)]
        assert recovered(test, "random", n_heads=2) == [pytest.approx(0, abs=1e-4)] * 3
    assert recovered(patched, "top", n_heads=1) == [pytest.approx(1, abs=1e-4)], "the carrier comes first"
    assert recovered(ATTENTION, "all") == [pytest.approx(0, abs=1e-4)], "the order of the suffix does nothing here"
    assert recovered(destroyed, "all") == [pytest.approx(0, abs=1e-4)]
    doses = [recovered("projection restored", "none", dose=dose)[0] for dose in (0.25, 0.5, 0.75, 1.0)]
    assert doses == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-4)
    assert recovered("random direction moved as far", "none") == [pytest.approx(0, abs=1e-4)]


def test_lens_ends_at_the_output_and_attribution_finds_the_carrier() -> None:
    last = max(row["layer"] for row in tables("softmax")["lens"])
    for arm in ("none", "adversarial"):
        (read,) = rows("softmax", "lens", arm=arm, layer=last)
        # the lens is of the first suffix only, and so is nothing else here
        if arm == "none":
            (base,) = rows("softmax", "causal", test="nothing changed", on="none")
            assert read["mean"] == pytest.approx(base["score_after"], abs=1e-4)
    written = {
        arm: rows("softmax", "logits", arm=arm, term="head", layer=CARRIER[0], head=CARRIER[1])[0]["mean"]
        for arm in ("none", "adversarial")
    }
    assert written["none"] > written["adversarial"]


def test_the_identities_of_a_run_hold() -> None:
    for mechanism in ("softmax", "query", "opponent", "mlp"):
        found = {row["name"]: row for row in tables(mechanism)["checks"]}
        assert set(found) == {"replays", "states", "factors add up", "paths add up", "logit attribution adds up",
                              "all heads patched"}  # fmt: skip
        assert all(row["passed"] for row in found.values()), found


def test_replies_under_the_tests_are_kept_with_their_verdicts() -> None:
    kept = tables("softmax")["causal_replies"]
    for row in tables("softmax")["causal"]:
        own = [
            reply for reply in kept
            if all(reply[key] == row[key] for key in ("test", "heads", "on", "dose", "n_heads"))
        ]  # fmt: skip
        if row["refused"] is None:
            assert row["complied"] is None
            continue
        assert len(own) == row["n_prompts"] * max(1, row["n_suffixes"]), row["test"]
        assert row["refused"] == pytest.approx(sum(reply["refused"] for reply in own) / len(own))
        assert row["complied"] == pytest.approx(sum(reply["verdict"] == "complied" for reply in own) / len(own))
    assert {reply["suffix_id"] for reply in kept} == {None, "adversarial-0", "adversarial-1"}


def test_a_control_that_is_not_defined_is_told_and_not_left_out() -> None:
    row = check_rows([0.0], [0.0], [float("nan"), 0.0], [0.0], [0.0], None)
    assert {check["name"]: check["passed"] for check in row} == {
        "replays": True, "states": True, "factors add up": False, "paths add up": True,
        "logit attribution adds up": True, "all heads patched": None,
    }  # fmt: skip
    assert "Not defined here" in row[-1]["sentence"]


def test_replies_flip_with_the_projection() -> None:
    restored = rows("softmax", "causal", test="projection restored", heads="none", dose=1.0)[0]
    assert restored["score_before"] < 0 < restored["score_after"]
    assert restored["refused"] == 1.0
    cut = "suffix edges cut, mass renormalised"
    assert rows("softmax", "causal", test=cut, heads="top", n_heads=2)[0]["refused"] == 1.0
    refused = [row["refused"] for row in rows("softmax", "causal", test=cut, heads="random", n_heads=2)]
    assert refused == [0.0, None, None], "replies of the first set of random heads only"
    assert rows("softmax", "causal", test="nothing changed", on="attacked")[0]["refused"] == 0.0
    assert rows("softmax", "causal", test="nothing changed", on="none")[0]["refused"] == 1.0
    for row in rows("softmax", "causal", test="nothing changed"):
        assert row["score_effect"] == 0 and row["projection_effect"] == 0
        assert row["n_suffixes"] == (0 if row["on"] == "none" else 2)


def test_other_arms_stand_beside_the_adversarial_one() -> None:
    for table in ("carried", "factors"):
        assert {row["arm"] for row in tables("opponent")[table]} == {"adversarial", "shuffled", "benign"}
    for table in ("circuit", "lens", "logits"):
        assert {row["arm"] for row in tables("opponent")[table]} == {"none", "adversarial", "shuffled", "benign"}
    falls = {
        arm: sum(row["value"] for row in rows("opponent", "carried", arm=arm))
        for arm in ("adversarial", "shuffled", "benign")
    }
    assert falls["adversarial"] == pytest.approx(falls["shuffled"], rel=1e-4), "the order does nothing here"
    assert abs(falls["benign"]) < 0.2 * falls["adversarial"], "as long, and of words that no head minds"
    (row,) = [row for row in rows("opponent", "carried", arm="benign") if row["term"] == "MLPs"]
    assert (row["n_prompts"], row["n_suffixes"]) == (20, 2)


def test_claims_stand_beside_their_controls() -> None:
    (held,) = rows("opponent", "mechanism_contrasts", kind="carried", measure="all", against="benign")
    falls = {
        arm: sum(row["value"] for row in rows("opponent", "carried", arm=arm)) for arm in ("adversarial", "benign")
    }
    assert held["estimate"] == pytest.approx(falls["adversarial"] - falls["benign"], rel=1e-6)
    assert held["descriptive"] and held["verdict"] == "descriptive", "two suffixes allow no more"
    assert held["equivalent"] == pytest.approx(0.1 * falls["adversarial"], rel=1e-6)
    (held,) = rows("opponent", "mechanism_contrasts", kind="carried", measure="all", against="shuffled")
    assert abs(held["estimate"]) < 1e-3 * falls["adversarial"], "the order does nothing here"
    by_test = {
        row["measure"]: row["estimate"] for row in rows("softmax", "mechanism_contrasts", kind="causal projection")
    }
    for row in rows("softmax", "causal", heads="top", n_heads=2):
        others = [
            other["projection_effect"]
            for other in rows("softmax", "causal", heads="random", n_heads=2, test=row["test"])
        ]
        assert by_test[row["test"]] == pytest.approx(row["projection_effect"] - sum(others) / len(others), abs=1e-4)
    (restored,) = rows("softmax", "causal", test="projection restored", dose=1.0)
    assert by_test["projection restored"] == pytest.approx(restored["projection_effect"], rel=1e-4)


def test_the_carrier_cut_from_the_instruction_or_set_to_nothing_gives_nothing() -> None:
    for test in ("instruction edges cut, mass renormalised", "zero-ablated"):
        whole = rows("softmax", "causal", test="nothing changed", on="none")[0]["projection_before"]
        for heads, left in (("top", 0), ("all", 0), ("random", 1)):
            for row in rows("softmax", "causal", test=test, heads=heads):
                if heads != "top" or row["n_heads"] == 2:
                    assert row["projection_after"] / whole == pytest.approx(left, abs=1e-3), row


def test_only_chat_minus_1_needs_its_edges_cut_and_the_harmful_mean_is_reached() -> None:
    found = {
        name: rows("softmax", "causal", test=name, heads="top", n_heads=2)[0]["projection_after"]
        for name in ("suffix edges cut, mass renormalised", "suffix edges cut at chat[-1] only")
    }
    assert len({round(value, 4) for value in found.values()}) == 1, "the carrier reads at chat[-1]"
    (row,) = rows("softmax", "causal", test="projection set to the harmful mean")
    assert row["projection_after"] == pytest.approx(1.0, abs=1e-4) and row["refused"] is not None


def test_the_circuit_is_of_all_suffixes() -> None:
    edges = rows("softmax", "circuit", arm="adversarial")
    assert edges and {row["n_suffixes"] for row in edges} == {2}
    assert {row["n_suffixes"] for row in rows("softmax", "circuit", arm="none")} == {0}


def test_attribution_patching_is_held_against_the_sweep() -> None:
    (row,) = rows("softmax", "ranking", run="none", measure="projection")
    assert (row["n_heads"], row["k"]) == (4 * READ_LAYER, min(8, 4 * READ_LAYER)), (
        "no head behind it can have an effect"
    )
    (other,) = rows("softmax", "ranking", run="none", measure="score")
    assert other["n_heads"] == 16
    assert row["error_ranked_first"] == pytest.approx(0, abs=1e-3), "the projection is linear in what a head writes"
    for found in rows("softmax", "sweep", run="none"):
        assert found["projection_lo"] - 1e-9 <= found["projection_effect"] <= found["projection_hi"] + 1e-9
    assert row["rank_correlation_lo"] <= row["rank_correlation"] <= row["rank_correlation_hi"]
    best = max(rows("softmax", "sweep", run="none"), key=lambda row: abs(row["projection_estimate"]))
    assert (best["layer"], best["head"]) == CARRIER


def test_the_sweep_reports_the_carrier_alone() -> None:
    # the head gives what it gives harmless prompts, so the run without a suffix loses its whole projection
    found = rows("softmax", "sweep", run="none")
    whole = rows("softmax", "causal", test="nothing changed", on="none")[0]["projection_before"]
    for row in found:
        if (row["layer"], row["head"]) == CARRIER:
            assert row["projection_effect"] == pytest.approx(-whole, rel=1e-3) and row["projection_p"] < 0.01
        else:
            assert abs(row["projection_effect"]) < 1e-3 * whole
    assert len(tables("softmax")["sweep"]) == 2 * 4 * 4
    assert all(row["projection_p"] is None for row in rows("softmax", "sweep", run="adversarial")), "one suffix"


@pytest.mark.parametrize("test", ["mean-ablated", "resample-ablated"])
def test_ablating_the_carrier_takes_the_projection_and_random_heads_do_not(test: str) -> None:
    for heads, lost in (("top", 1), ("all", 1), ("random", 0)):
        for row in rows("softmax", "causal", test=test, heads=heads):
            if heads != "top" or row["n_heads"] == 2:
                share = 1 - row["projection_after"] / row["projection_before"]
                assert share == pytest.approx(lost, abs=1e-3), row


def test_a_control_that_fits_only_some_suffixes_is_left_out() -> None:
    model = planted("softmax")
    unit = torch.nn.functional.one_hot(torch.tensor(F["refuse"]), D_MODEL).float()
    means = torch.zeros(model.n_layers + 1, D_MODEL)
    direction = Direction(unit, -1, READ_LAYER, [], means + unit, means, (WORDS.index(REFUSAL),), {})
    texts = (SUFFIX, SUFFIX[:-1], SUFFIX[::-1])
    suffixes = [Suffix(f"adversarial-{i}", "adversarial", " ".join(words)) for i, words in enumerate(texts)]
    found = measure_mechanism(
        model, direction, prompts("report", 1, 3), prompts("select", 6, 4), prompts("select", 6, 5, "harmless"),
        suffixes, [CARRIER], controls=[Suffix("shuffled-1", "shuffled", " ".join(SUFFIX[::-1]))], reply_tokens=1,
    )  # fmt: skip
    assert not [row for row in found["causal"] if row["test"] == ATTENTION]
    assert {row["n_suffixes"] for row in found["causal"] if row["on"] == "attacked"} == {3}
    assert all(row["projection_p"] is None for row in found["sweep"]), "one prompt allows no p value"


def test_the_circuit_is_the_direct_edge() -> None:
    for row in rows("softmax", "circuit", arm="none"):
        assert (row["kind"], row["region"]) in (("region → head", "instruction"), ("head → direction", None)), row
    edge, gone = (
        rows("softmax", "circuit", arm=arm, kind="region → head", region="instruction")[0]["weight"]
        for arm in ("none", "adversarial")
    )
    assert gone < 0.5 * edge


def test_random_heads_are_others_of_the_same_layers() -> None:
    top = [(1, 2), (1, 3), (2, 0)]
    found = random_heads(top, 4, below=4, seed=0)
    assert [layer for layer, _ in found] == [1, 1, 2]
    assert not set(found) & set(top) and len(set(found)) == 3
    near = random_heads([(2, 0), (2, 1)], 2, below=4, seed=0)
    assert {layer for layer, _ in near} <= {1, 3} and len(set(near)) == 2, "the nearest layers, where one has no more"
    assert random_heads([(0, 0), (0, 1)], 2, below=1, seed=0) == [], "no other head is left"


def test_contrasts_of_sets_say_how_many_there_are_and_how_many_do_less() -> None:
    found = [row for row in rows("softmax", "mechanism_contrasts") if row["kind"] == "causal projection"]
    cut = next(row for row in found if row["measure"].startswith("suffix edges cut, mass renorm"))
    assert cut["n_sets"] == cut["n_beyond"] >= 1
    assert all(row["n_sets"] is None for row in rows("softmax", "mechanism_contrasts", kind="carried"))


@pytest.mark.parametrize("lacking", ["report", "select", "harmless", "suffixes", "top"])
def test_what_there_must_be_one_of_is_named(lacking: str) -> None:
    model = planted("softmax")
    zeros = torch.zeros(model.n_layers + 1, D_MODEL)
    direction = Direction(torch.ones(D_MODEL), -1, READ_LAYER, [], zeros, zeros, (WORDS.index(REFUSAL),), {})
    given: dict[str, Any] = {
        "report": prompts("report", 2, 3), "select": prompts("select", 2, 4), "top": [CARRIER],
        "harmless": prompts("select", 2, 5, "harmless"), "suffixes": [Suffix("a-1", "adversarial", "and")],
    }  # fmt: skip
    with pytest.raises(UserError, match="to test the mechanism with; give at least one"):
        measure_mechanism(model, direction, **(given | {lacking: []}))
