"""The circuit view and its graph, whatever arms the table has, and the head grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from reports.charts import Figure
from reports.charts_circuit import circuit, circuit_control, largest_edge
from reports.charts_heads import grid_bounds, head_grid
from reports.data import RunData, read_run
from reports.export import circuit_graphs
from tests.fake_run import make_fake_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return read_run(make_fake_run(tmp_path_factory.mktemp("circuit") / "run", n_prompts=12))


def with_circuit(data: RunData, rows: list[dict[str, Any]]) -> RunData:
    return replace(data, tables=data.tables | {"circuit": rows})


def views(figure: Figure | None) -> dict[str | None, list[dict[str, Any]]]:
    """The edges of every view."""
    assert figure is not None
    return {view.arm: [row for row in view.spec["datasets"]["main"] if row["node"] is None] for view in figure.views}


def test_every_arm_of_the_table_has_a_view_and_stands_beside_the_adversarial_one(data: RunData) -> None:
    rows = [row for row in data.table("circuit") if row["arm"] in ("none", "adversarial")]
    more = [{**row, "arm": arm, "weight": row["weight"] / 2} for row in rows for arm in ("random", "failed")]
    three = with_circuit(data, [*rows, *[row for row in more if row["weight"]]])
    compared = ["adversarial − none", "adversarial − random", "adversarial − failed"]
    found, beside = views(circuit(three)), views(circuit_control(three))
    assert list(found) == ["none", "adversarial", "random", "failed", *compared]
    assert list(beside) == compared
    for name, arm in zip(compared, ("none", "random", "failed"), strict=True):
        assert [e["weight"] for e in found[name]] == [e["weight"] for e in found["adversarial"]]
        assert [e["weight"] for e in beside[name]] == [e["weight"] for e in found[arm]]
    only = with_circuit(data, [row for row in rows if row["arm"] == "none"])
    assert list(views(circuit(only))) == ["none"] and circuit_control(only) is None


def test_widths_of_both_sides_have_one_scale(data: RunData) -> None:
    for name in ("adversarial − none", "adversarial − random"):
        for edge in (*views(circuit(data))[name], *views(circuit_control(data))[name]):
            most = max(abs(row["weight"]) for row in data.table("circuit"))
            assert edge["share"] == pytest.approx((abs(edge["weight"]) / most) ** 0.5, abs=1e-3)


def test_an_edge_tells_its_interval_and_what_it_is_in_the_other_arm(data: RunData) -> None:
    rows = [{**row, "lo": row["weight"] - 1, "hi": row["weight"] + 1} for row in data.table("circuit")]
    lost = next(row for row in rows if row["arm"] == "none")
    tips = [edge["tip"] for edge in views(circuit(with_circuit(data, rows)))["adversarial − none"]]
    assert all("(CI " in tip and "\nwithout suffix: " in tip for tip in tips)
    fewer = views(circuit(with_circuit(data, [row for row in rows if row is not lost])))["adversarial − none"]
    assert sum(edge["tip"].endswith("without suffix: no such edge") for edge in fewer) == 1


def test_an_edge_between_heads_belongs_to_both(data: RunData) -> None:
    early = next(row for row in data.table("circuit") if row["kind"] == "early → head")
    names = {f"L{early[f'{end}_layer']}.H{early[f'{end}_head']}" for end in ("source", "target")}
    assert any({edge["name"], edge["also"]} == names for edge in views(circuit(data))["none"])


def test_heads_behind_the_directions_layer_are_faded_and_set_no_scale(data: RunData) -> None:
    direction = data.summary.direction
    assert direction is not None
    late = [{**row, "contribution": 1e6} if row["layer"] >= direction.layer else row for row in data.table("heads")]
    changed = replace(data, tables=data.tables | {"heads": late})
    assert grid_bounds(changed)["contribution"] == grid_bounds(data)["contribution"] < 1e5
    figure = head_grid(changed)
    assert figure is not None and f"layers from {direction.layer} on" in figure.caption
    cells = figure.views[0].spec["datasets"]["main"]
    assert {cell["layer"] >= direction.layer for cell in cells if cell["late"]} == {True}


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


def test_the_graph_has_what_neuronpedias_schema_asks_for(data: RunData) -> None:
    """Required keys and their types as in Neuronpedia's graph-schema.json; what is optional there is never null."""
    for graph in circuit_graphs(data).values():
        assert {key: type(value) for key, value in graph["metadata"].items()} == {
            "slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str,
            "schema_version": int,
        }  # fmt: skip
        assert {"linkType", "pinnedIds", "clickedId", "supernodes", "sg_pos"} <= set(graph["qParams"])
        known = {node["node_id"] for node in graph["nodes"]}
        assert all(link["source"] in known and link["target"] in known for link in graph["links"])


def test_what_is_nothing_is_no_edge(data: RunData) -> None:
    rows = [row for row in data.table("circuit") if row["arm"] == "none"][:5]
    some = with_circuit(data, [*rows[1:], {**rows[0], "weight": 0.0}])
    assert len(views(circuit(some))["none"]) == 4


def test_widths_of_two_runs_have_one_scale(data: RunData) -> None:
    alone, beside = (views(circuit(data, most))["none"] for most in (0.0, 4 * largest_edge(data)))
    for edge, other in zip(alone, beside, strict=True):
        assert other["share"] == pytest.approx(edge["share"] / 2, rel=1e-3)
