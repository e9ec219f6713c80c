"""Out of the page: figures as SVG and PNG without a browser, tables as CSV, the circuit as a Neuronpedia graph."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import vl_convert

from reports import theme
from reports.charts_more import figures
from reports.data import RunData, read_run
from reports.errors import ReportError
from reports.page import shown_spec
from reports.schema import REGIONS

WIDTH = 720
PNG_SCALE = 2


def save_figures(run: Path, folder: Path) -> list[Path]:
    """Write every view of every figure as SVG and PNG, the tables as CSV and the circuit as JSON; return the paths.

    Raises ReportError where the run cannot be read, the folder cannot be written or a table cannot be read; in the last
    case everything else is written.
    """
    data = read_run(Path(run))
    written: list[Path] = []
    left_out: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures(data).values():
            for view in figure.views:
                stem = figure.id if len(figure.views) == 1 else f"{figure.id}-{_slug(view.label)}"
                spec = _fixed(view.spec)
                written.append(folder / f"{stem}.svg")
                written[-1].write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
                written.append(folder / f"{stem}.png")
                written[-1].write_bytes(vl_convert.vegalite_to_png(spec, scale=PNG_SCALE))
        for path in sorted((Path(run) / "findings").glob("*.parquet")):
            try:
                pyarrow.csv.write_csv(_as_text(pq.read_table(path)), folder / f"{path.stem}.csv")
                written.append(folder / f"{path.stem}.csv")
            except (pa.ArrowException, UnicodeDecodeError) as error:
                (folder / f"{path.stem}.csv").unlink(missing_ok=True)
                left_out.append(f"{path.name} ({(str(error) or type(error).__name__).splitlines()[0][:80]})")
        for arm, graph in circuit_graphs(data).items():
            written.append(folder / f"circuit-{_slug(arm)}.json")
            written[-1].write_text(json.dumps(graph, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{folder} cannot be written ({error.strerror}): give another folder.") from None
    if left_out:
        raise ReportError(
            f"{folder} has {len(written)} files, but is without {', '.join(left_out)}: repeat the stage that wrote it."
        )
    return written


def _as_text(table: pa.Table) -> pa.Table:
    """The table with text that a spreadsheet would run as a formula marked as text by an apostrophe."""

    def marked(column: pa.ChunkedArray) -> pa.ChunkedArray:
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return column
        return pc.replace_substring_regex(column, r"^([=+\-@\t\r])", r"'\1")

    names = [re.sub(r"^([=+\-@\t\r])", r"'\1", name) for name in table.column_names]
    return pa.table([marked(column) for column in table.columns], names=names)


def _slug(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("−", "minus")).strip("-")


def _fixed(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec that stands by itself: a width in pixels, the light theme, white paper."""
    own: dict[str, Any] = shown_spec(spec)  # control characters would make the SVG invalid
    own["width"] = WIDTH
    own["config"] = theme.vega_config("light") | {"background": "#ffffff"}
    own["$schema"] = "https://vega.github.io/schema/vega-lite/v5.json"
    return own


def circuit_graphs(data: RunData) -> dict[str, dict[str, Any]]:
    """Return the circuit of each arm in the graph format that Neuronpedia and circuit-tracer read.

    Their nodes are features at a token; ours are heads (``feature_type`` "attention head", the head's number as its
    feature), MLPs, regions of the prompt as embeddings, and the refusal direction in the place of the output. Positions
    are those of the regions in order, then of the chat tokens.
    """
    rows = [row for row in data.table("circuit") if row["weight"] is not None]
    named = {row["region"] for row in rows} - {None}
    regions = [name for name in REGIONS if name in named] + sorted(named - set(REGIONS))
    n_chat = -min((row["position"] for row in rows if row["position"] is not None), default=-1)
    tokens = [f"<{name}>" for name in regions] + [f"chat[{i - n_chat}]" for i in range(n_chat)]
    graphs = {}
    for arm in sorted({row["arm"] for row in rows}):
        nodes: dict[str, dict[str, Any]] = {}
        links = []
        for row in (row for row in rows if row["arm"] == arm):
            ends = _ends(row, regions, n_chat, data.summary.n_layers)
            nodes |= {node["node_id"]: node for node in ends}
            links.append({"source": ends[0]["node_id"], "target": ends[1]["node_id"], "weight": row["weight"]})
        graphs[arm] = {
            "metadata": {
                "slug": f"{data.name}-{arm}", "scan": data.summary.model, "transcoder_list": [],
                "prompt_tokens": tokens, "prompt": " ".join(tokens), "schema_version": 1,
            },
            "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": list(nodes.values()),
            "links": links,
        }  # fmt: skip
    return graphs


def _ends(row: dict[str, Any], regions: list[str], n_chat: int, n_layers: int) -> list[dict[str, Any]]:
    """The two nodes of an edge."""
    last = len(regions) + n_chat - 1
    place = last if row["position"] is None else len(regions) + n_chat + row["position"]
    kind = row["kind"]

    def head(layer: int, index: int, at: int) -> dict[str, Any]:
        return _node(str(layer), index, at, "attention head", f"L{layer}.H{index}")

    if kind == "head → direction":
        end = _node(str(n_layers + 1), 0, last, "logit", "refusal direction")
        return [head(row["source_layer"], row["source_head"], last), end | {"is_target_logit": True}]
    if kind == "mlp → direction":
        layer = row["source_layer"]
        end = _node(str(n_layers + 1), 0, last, "logit", "refusal direction")
        start = _node(str(layer), -1, last, "mlp reconstruction error", f"MLP {layer}")
        return [start, end | {"is_target_logit": True}]
    target = head(row["target_layer"], row["target_head"], place if kind == "region → early" else last)
    if kind.startswith("region"):
        at = regions.index(row["region"])
        return [_node("E", at, at, "embedding", str(row["region"])), target]
    if kind == "early → head":
        return [head(row["source_layer"], row["source_head"], place), target]
    if kind == "mlp → head":
        return [
            _node(str(row["source_layer"]), -1, place, "mlp reconstruction error", f"MLP {row['source_layer']}"),
            target,
        ]
    return [_node("E", place, place, "embedding", f"embedding of chat[{row['position']}]"), target]


def _node(layer: str, feature: int, at: int, kind: str, words: str) -> dict[str, Any]:
    return {
        "node_id": f"{layer}_{feature}_{at}", "feature": feature, "layer": layer, "ctx_idx": at, "feature_type": kind,
        "token_prob": 0.0, "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{feature}-{at}", "clerp": words, "influence": None, "activation": None,
    }  # fmt: skip
