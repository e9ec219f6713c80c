"""The toolkit's proof: on models whose mechanism is known, every analysis names it, and no other.

The models and their mechanisms are described in tests/planted/models.py. Each test says what was planted and what the
analysis must return. Shares are of the fall in projection; "1" and "0" are meant to 1e-4.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from suffix_analysis import causal
from suffix_analysis.causal import Readout
from suffix_analysis.chat import REGIONS
from suffix_analysis.circuits import find_paths
from suffix_analysis.directions import DirectionConfig, find_direction
from suffix_analysis.factors import split_change
from suffix_analysis.heads import region, top_heads
from suffix_analysis.max_t import sign_flip_max_t
from suffix_analysis.models import Model
from suffix_analysis.prompts import Prompt
from suffix_analysis.replay import Prepared, prepare
from suffix_analysis.stats import ratio_interval
from suffix_analysis.traces import Traces, trace
from tests.planted.models import (
    ANSWER,
    CARRIER,
    D_MODEL,
    OPPONENT,
    READ_LAYER,
    REFUSAL,
    RELAY,
    SCOUT,
    SUFFIX,
    WORDS,
    F,
    instructions,
    planted,
)  # fmt: skip

FAMILIES = ("llama", "qwen3", "gemma2")
MECHANISMS = ("softmax", "query", "opponent", "mlp")
TEXT = " ".join(SUFFIX)
UNIT = torch.nn.functional.one_hot(torch.tensor(F["refuse"]), D_MODEL).float()
READ = Readout(UNIT, READ_LAYER, (WORDS.index(REFUSAL),))
EXACT = 1e-4


def recovered(patched: torch.Tensor, plain: torch.Tensor, source: torch.Tensor) -> float | None:
    """Which share of the way from one run to another an intervention goes."""
    part, whole = ((x - plain).double().numpy()[:, None] for x in (patched, source))
    return ratio_interval(part, whole)[0]


class Case:
    """One planted model and 12 harmful instructions, without and with the suffix."""

    def __init__(self, mechanism: str, family: str) -> None:
        self.mechanism, self.family = mechanism, family
        self.model: Model = planted(mechanism, family)
        self.texts = instructions(12, harmful=True)
        self.plain, self.attacked = (
            prepare(self.model, [self.model.chat(text, suffix) for text in self.texts]) for suffix in ("", TEXT)
        )
        self.traced, self.traced_attacked = (
            trace(self.model, list(run.chats), UNIT) for run in (self.plain, self.attacked)
        )

    @property
    def fall(self) -> torch.Tensor:
        """By how much the suffix lowers the projection where the direction is read, prompt by prompt."""
        return causal.base(self.plain, READ).projection - causal.base(self.attacked, READ).projection

    def back(self, hooks: list[causal.Hook]) -> float:
        """Which share of the fall an intervention on the attacked run undoes."""
        found = causal.measure(self.attacked, hooks, READ).projection
        share = recovered(found, causal.base(self.attacked, READ).projection, causal.base(self.plain, READ).projection)
        assert share is not None
        return share


@functools.cache
def case(mechanism: str, family: str) -> Case:
    return Case(mechanism, family)


@pytest.fixture(params=[(m, f) for f in FAMILIES for m in MECHANISMS], ids=lambda p: f"{p[1]}-{p[0]}")
def planted_case(request: pytest.FixtureRequest) -> Case:
    return case(*request.param)


def shares(found: dict[str, torch.Tensor], whole: torch.Tensor) -> dict[str, float]:
    return {name: float((x / whole).mean()) for name, x in found.items()}


def only(found: dict[str, float], *names: str) -> None:
    """``names`` together have a share of 1, each of them some, and everything else has 0."""
    assert sum(found[name] for name in names) == pytest.approx(1, abs=EXACT), found
    assert all(found[name] > 0.01 for name in names), found
    assert all(abs(x) < EXACT for name, x in found.items() if name not in names), found


# --- without a suffix -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planted_direction_is_found(family: str) -> None:
    model = case("softmax", family).model
    kinds = [
        [Prompt(f"{kind}-{i}", text, kind) for i, text in enumerate(instructions(24, kind == "harmful", seed=1))]
        for kind in ("harmful", "harmless")
    ]
    settings = DirectionConfig(n_fit=16, n_select=8)
    if family == "gemma2":  # its large constant leaves so small a projection that it never refuses
        settings = DirectionConfig(n_fit=16, n_select=8, induce_threshold=-100.0, keep_by_score=False)
    found = find_direction(model, *kinds, settings, refusal_tokens=[WORDS.index(REFUSAL)])
    # before its layer there is nothing to be found, and at <end> neither
    assert (found.position, found.layer) == (-1, READ_LAYER)
    assert float(torch.cosine_similarity(found.vector, UNIT, dim=0)) == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_carrier_brings_all_of_the_projection_from_the_harmful_words(family: str) -> None:
    traces: Traces = case("softmax", family).traced
    first = top_heads(traces, below=READ_LAYER, count=1)[0]
    assert (first.layer, first.head) == CARRIER
    whole = traces.projection[:, READ_LAYER]
    heads = traces.head_contribution / whole[:, None, None]
    assert float(heads[:, *CARRIER].mean()) == pytest.approx(1, abs=EXACT)
    assert float(heads.abs().sum()) / len(whole) == pytest.approx(1, abs=EXACT), "and nobody else writes anything"
    instruction = region(traces.contribution, "instruction")[:, *CARRIER] / whole
    assert float(instruction.mean()) == pytest.approx(1, abs=EXACT)


# --- what the suffix did --------------------------------------------------------------------------------------------


def test_the_fall_is_where_it_was_planted(planted_case: Case) -> None:
    before, after, below = planted_case.traced, planted_case.traced_attacked, slice(0, READ_LAYER)
    lost = (before.contribution - after.contribution)[:, below]
    terms = {
        "carrier": lost[:, *CARRIER].sum(-1),
        "opponent": lost[:, *OPPONENT].sum(-1),
        "scout": lost[:, *SCOUT].sum(-1),
        "mlp": (before.mlp_out - after.mlp_out)[:, below].sum(-1),
        "embedding": before.embedding - after.embedding,
    }
    assert bool((planted_case.fall > 0).all())
    expected = {"softmax": "carrier", "query": "carrier", "opponent": "opponent", "mlp": "mlp"}
    only(shares(terms, planted_case.fall), expected[planted_case.mechanism])
    by_source = {name: region(lost, name)[:, *OPPONENT] for name in ("system", "instruction", "suffix", "chat")}
    if planted_case.mechanism == "opponent":
        only(shares(by_source, planted_case.fall), "suffix")


def test_the_change_of_the_instructions_contribution_has_the_planted_cause(planted_case: Case) -> None:
    split = split_change(planted_case.plain, planted_case.attacked, UNIT)
    change = (split.attacked - split.plain)[:, *CARRIER]
    assert split.error < EXACT
    total = torch.stack(list(split.parts.values())).sum(dim=0)
    torch.testing.assert_close(total, split.attacked - split.plain, atol=1e-5, rtol=1e-5)
    if planted_case.mechanism in ("opponent", "mlp"):
        assert float((change / planted_case.fall).abs().max()) < EXACT, "the instruction's contribution did not change"
        return
    cause = {"softmax": "dilution", "query": "query"}[planted_case.mechanism]
    only(shares({name: part[:, *CARRIER] for name, part in split.parts.items()}, change), cause)
    others = split.attacked - split.plain
    others[:, *CARRIER] = 0
    assert float(others.abs().max()) < EXACT * float(change.abs().max())


@pytest.mark.parametrize(
    ("cause", "family"),
    [*((cause, f) for cause in ("displacement", "chat keys") for f in FAMILIES), ("scale", "gemma2")],
)
def test_every_other_factor_is_told_from_the_rest(cause: str, family: str) -> None:
    """The two of the test above, and these: no two factors can be taken for each other."""
    here = case(cause, family)
    assert bool((here.fall > 0).all())
    split = split_change(here.plain, here.attacked, UNIT)
    change = (split.attacked - split.plain)[:, *CARRIER]
    only(shares({name: part[:, *CARRIER] for name, part in split.parts.items()}, change), cause)
    torch.testing.assert_close(change, -here.fall, atol=1e-4, rtol=EXACT)


def test_knocking_out_the_planted_edge_brings_the_projection_back_and_no_other_does(planted_case: Case) -> None:
    run, mechanism = planted_case.attacked, planted_case.mechanism
    edge = {"softmax": CARRIER, "query": SCOUT, "opponent": OPPONENT, "mlp": SCOUT}[mechanism]
    for head in (CARRIER, OPPONENT, SCOUT, RELAY):
        share = planted_case.back(causal.cut(run, "suffix", [head]))
        assert share == pytest.approx(float(head == edge), abs=EXACT), head
    assert planted_case.back(causal.cut(run, "suffix")) == pytest.approx(1, abs=EXACT)
    # after the softmax the carrier's attention to the suffix is gone but not given back: a different intervention
    destroyed = planted_case.back(causal.cut(run, "suffix", [edge], renormalise=False))
    assert destroyed == pytest.approx(0.0 if mechanism == "softmax" else 1.0, abs=EXACT)


def test_patching_the_planted_head_recovers_the_planted_share(planted_case: Case) -> None:
    plain, attacked, mechanism = planted_case.plain, planted_case.attacked, planted_case.mechanism
    moved = {
        "softmax": {CARRIER}, "query": {SCOUT, CARRIER}, "opponent": {OPPONENT}, "mlp": {SCOUT},
    }[mechanism]  # fmt: skip
    for head in (CARRIER, OPPONENT, SCOUT, RELAY):
        forward = planted_case.back(causal.replaced([head], plain.z))
        assert forward == pytest.approx(float(head in moved), abs=EXACT), head
        # and the other way: the attacked head in the clean run takes the projection away
        taken = causal.measure(plain, causal.replaced([head], attacked.z), READ).projection
        share = recovered(taken, causal.base(plain, READ).projection, causal.base(attacked, READ).projection)
        assert share == pytest.approx(float(head in moved), abs=EXACT), head
    every = [(layer, head) for layer in range(plain.z.shape[1]) for head in range(plain.z.shape[3])]
    assert planted_case.back(causal.replaced(every, plain.z)) == pytest.approx(1, abs=EXACT), "positive control"


def test_the_sweep_finds_the_carrier(planted_case: Case) -> None:
    effects = causal.head_sweep(planted_case.plain, torch.zeros_like(planted_case.plain.z), READ).projection
    whole = causal.base(planted_case.plain, READ).projection
    assert float((effects[:, *CARRIER] / whole).mean()) == pytest.approx(-1, abs=EXACT)
    effects[:, *CARRIER] = 0
    if planted_case.family == "gemma2":
        effects[:, 1, 1] = 0  # without the large constant, the norm behind attention stretches all the rest
    assert float((effects / whole[:, None, None]).abs().max()) < EXACT


def test_giving_the_projection_back_brings_refusal_back(planted_case: Case) -> None:
    if planted_case.family == "gemma2":
        pytest.skip("its large constant leaves so small a projection that the model never refuses")
    plain, attacked = planted_case.plain, planted_case.attacked
    assert bool((plain.logits.argmax(-1) == WORDS.index(REFUSAL)).all())
    assert bool((attacked.logits.argmax(-1) == WORDS.index(ANSWER)).all())
    levels = causal.base(plain, READ).projection
    full = causal.measure(attacked, causal.shifted(READ, levels), READ)
    torch.testing.assert_close(full.projection, levels, atol=1e-4, rtol=1e-4)
    assert bool((full.score > 0).all())
    doses = [
        causal.measure(attacked, causal.shifted(READ, levels, dose), READ).score.mean() for dose in (0.0, 0.5, 1.0)
    ]
    assert doses[0] < doses[1] < doses[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_of_two_hops_is_found(family: str) -> None:
    model = planted("relay", family)
    run = prepare(model, [model.chat(text) for text in instructions(12, harmful=True)])
    paths = find_paths(run, UNIT, [CARRIER])
    whole = causal.base(run, READ).projection
    assert paths.error < EXACT
    at_end = paths.through_heads[:, 0, 0]  # <end> is the first chat token
    through = at_end[:, *RELAY].sum(-1) / whole
    from_instruction = region(at_end[:, *RELAY], "instruction") / whole
    assert float(through.mean()) == pytest.approx(1, abs=EXACT)
    assert float(from_instruction.mean()) == pytest.approx(1, abs=EXACT)
    rest = paths.through_heads.clone()
    rest[:, 0, 0, *RELAY] = 0
    assert float(rest.abs().sum() / whole.sum()) < EXACT
    assert float(paths.through_mlp.abs().sum() / whole.sum()) < EXACT


# --- a suffix that does nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_suffix_without_effect_has_no_mechanism(family: str) -> None:
    """Where the direction is read nothing has changed, so nothing carries a fall, causes one, or undoes it."""
    here = case("nothing", family)
    whole = causal.base(here.plain, READ).projection
    assert float((here.fall / whole).abs().max()) < EXACT
    split = split_change(here.plain, here.attacked, UNIT)
    for part in split.parts.values():
        assert float((part[:, :READ_LAYER] / whole[:, None, None]).abs().max()) < EXACT
    every = [(layer, head) for layer in range(4) for head in range(4)]
    for hooks in (causal.cut(here.attacked, "suffix"), causal.replaced(every, here.plain.z)):
        moved = causal.measure(here.attacked, hooks, READ).projection - causal.base(here.attacked, READ).projection
        assert float((moved / whole).abs().max()) < EXACT
    paths = [find_paths(run, UNIT, [CARRIER], READ_LAYER) for run in (here.plain, here.attacked)]
    assert float(((paths[0].direct - paths[1].direct).sum(dim=2)[:, 0] / whole).abs().max()) < EXACT
    assert float((paths[1].direct[..., REGIONS.index("suffix")][:, 0] / whole).abs().max()) < EXACT


def test_an_effect_of_the_noises_own_size_is_found() -> None:
    """The same test is not blind: shifted by one standard deviation, the map's heads are reported."""
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(30, 3, 4))
    maps[:, 1, 2] += 1.0
    found = sign_flip_max_t(maps)
    assert found.p[1, 2] < 0.01
    assert (found.p > 0.05).sum() >= 10


def test_prepared_runs_keep_their_prompts_apart() -> None:
    one: Prepared = case("softmax", "llama").plain
    alone = prepare(one.model, [one.chats[3]])
    torch.testing.assert_close(alone.logits[0], one.logits[3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mechanism", ["softmax", "query"])
def test_the_attention_of_a_suffix_without_effect_brings_back_what_it_has(mechanism: str, family: str) -> None:
    """Transplanted rows mix the attacked run's values: the instruction's are the same, those of the suffix are 0."""
    here = case(mechanism, family)
    benign = prepare(here.model, [here.model.chat(text, " ".join(["and"] * len(SUFFIX))) for text in here.texts])
    attacked, there = (causal.base(run, READ).projection for run in (here.attacked, benign))
    share = recovered(there, attacked, causal.base(here.plain, READ).projection)
    assert share is not None and share > 0.5, "or the control has the effect itself"
    assert here.back(causal.transplanted(here.attacked, benign, [CARRIER])) == pytest.approx(share, abs=1e-3)
    assert here.back(causal.transplanted(here.attacked, benign, [OPPONENT])) == pytest.approx(0, abs=1e-3)
