"""The circuit view and its graph: whatever arms and differences the table has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from reports.charts_circuit import circuit
from reports.charts_heads import head_grid
from reports.data import RunData, read_run
from reports.export import circuit_graphs
from tests.fake_run import make_fake_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(make_fake_run(tmp_path_factory.mktemp("circuit") / "run", n_prompts=12))


def with_circuit(data: RunData, rows: list[dict[str, Any]]) -> RunData:
    return replace(data, tables=data.tables | {"circuit": rows})


def views(data: RunData) -> dict[str | None, list[dict[str, Any]]]:
    figure = circuit(data)
    assert figure is not None
    return {view.arm: [row for row in view.spec["datasets"]["main"] if row["node"] is None] for view in figure.views}


def test_every_arm_of_the_table_has_a_view_and_a_difference(data: RunData) -> None:
    rows = data.table("circuit")
    more = [{**row, "arm": arm, "weight": row["weight"] / 2} for row in rows for arm in ("random", "failed")]
    found = views(with_circuit(data, [*rows, *[row for row in more if row["weight"]]]))
    assert list(found) == [
        "none", "adversarial", "random", "failed",
        "adversarial − none", "adversarial − random", "adversarial − failed",
    ]  # fmt: skip
    assert list(views(with_circuit(data, [row for row in rows if row["arm"] == "none"]))) == ["none"]


def test_a_difference_that_is_stored_is_shown_as_it_is(data: RunData) -> None:
    stored = [{**row, "arm": "adversarial − none", "weight": 7.0} for row in data.table("circuit")[:1]]
    found = views(with_circuit(data, [*data.table("circuit"), *stored]))
    assert [edge["weight"] for edge in found["adversarial − none"]] == [7]


def test_an_edge_that_one_arm_lacks_has_no_difference(data: RunData) -> None:
    rows = data.table("circuit")
    lost = next(row for row in rows if row["arm"] == "none")
    found = views(with_circuit(data, [row for row in rows if row is not lost]))
    assert len(found["adversarial"]) == len(found["adversarial − none"]) + 1


def test_the_grid_has_every_arm_of_harmful_prompts(data: RunData) -> None:
    harmless = [{**row, "arm": "harmless"} for row in data.table("heads") if row["arm"] == "none"]
    figure = head_grid(replace(data, tables=data.tables | {"heads": [*data.table("heads"), *harmless]}))
    assert figure is not None
    arms = [view.arm for view in figure.views if view.measure == "contribution"]
    assert arms[:5] == ["none", "adversarial", "random", "shuffled", "benign"]
    assert arms[5:] == [f"adversarial − {arm}" for arm in ("none", "random", "shuffled", "benign")]


def test_the_graph_has_the_beginning_of_the_sequence_as_a_place_of_its_own(data: RunData) -> None:
    edge = next(row for row in data.table("circuit") if row["kind"] == "region → head")
    more = [{**edge, "region": region, "weight": 1.0} for region in ("bos", "system")]
    graph = circuit_graphs(with_circuit(data, [*data.table("circuit"), *more]))[edge["arm"]]
    tokens = graph["metadata"]["prompt_tokens"]
    assert tokens[:3] == ["<bos>", "<system>", "<instruction>"]
    for node in graph["nodes"]:
        if node["feature_type"] == "embedding" and not node["clerp"].startswith("embedding"):
            assert tokens[node["ctx_idx"]] == f"<{node['clerp']}>"
