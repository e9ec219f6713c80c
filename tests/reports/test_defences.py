"""Tables and figures of defences, on invented findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reports import defences
from reports.data import RunData, read_run
from reports.numbers import NBSP, percent
from tests.fake_mechanism import detectors, mitigations
from tests.fake_run import make_fake_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    made = read_run(make_fake_run(tmp_path_factory.mktemp("defences") / "run", n_prompts=4))
    return replace(made, tables={**made.tables, "detectors": detectors(), "mitigations": mitigations()})


def test_the_frontier_joins_what_no_other_defence_beats_in_both(data: RunData) -> None:
    figure = defences.trade_off(data)
    assert figure is not None
    rows = {row["defence"]: row for row in figure.views[0].spec["datasets"]["main"]}
    # success and refused look-alikes: none 0.7, 0.08; damped 0.3, 0.1; other heads 0.68, 0.08; filter 0.1, 0.08
    assert {name for name, row in rows.items() if row["best"]} == {"perplexity filter"}
    damped, *_ = (row for row in mitigations() if "top heads" in row["defence"])
    better = [row if row != damped else row | {"lookalike": 0.02} for row in mitigations()]
    figure = defences.trade_off(replace(data, tables={**data.tables, "mitigations": better}))
    assert figure is not None
    best = {row["defence"] for row in figure.views[0].spec["datasets"]["main"] if row["best"]}
    assert best == {"perplexity filter", damped["defence"]}, "a control is none, and no defence beats these"


def test_harmless_prompts_take_the_place_of_look_alikes_where_there_are_none(data: RunData) -> None:
    own = [row | {"lookalike": None, "lookalike_lo": None, "lookalike_hi": None} for row in mitigations()]
    figure = defences.trade_off(replace(data, tables={**data.tables, "mitigations": own}))
    assert figure is not None and "harmless prompts refused" in str(figure.views[0].spec)
    assert defences.trade_off(replace(data, tables={})) is None


def test_what_was_not_measured_is_a_dash_and_times_say_beside_what(data: RunData) -> None:
    shown = defences.context(data)
    benign = [row for row in shown["detectors"] if "benign" in row["against"]]
    assert {row["caught_1"] for row in benign} == {row["false"] for row in benign} == {"–"}
    assert {row["marks"] for row in shown["detectors"]} == {"60"}
    assert {row["fires"] for row in shown["mitigations"]} == {"–"}
    assert (
        shown["timing"].replace(NBSP, " ")
        == "Slower: time a token, 8 replies at once, beside the model as it was loaded. "
    )
    (first, *rest) = mitigations()
    wrapped = [first | {"wrapped": True, "fires_attacked": 0.5, "fires_lookalike": 0.1, "fires_harmless": 0.0}, *rest]
    shown = defences.context(replace(data, tables={**data.tables, "mitigations": wrapped}))
    assert "as TransformerLens had wrapped it already" in shown["timing"]
    assert shown["mitigations"][0]["fires"].split(", ") == [percent(0.5), percent(0.1), percent(0.0)]


def test_a_run_folders_own_tables_are_read(tmp_path: Path) -> None:
    made = read_run(make_fake_run(tmp_path / "run", n_prompts=4))
    assert defences.context(made)["mitigations"] and defences.trade_off(made) is not None
