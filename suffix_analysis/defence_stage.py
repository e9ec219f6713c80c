"""What `suffix-analysis defend` adds to a run: detectors, mitigations, and attacks on the defended model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from suffix_analysis import __version__
from suffix_analysis.adaptive import budgets
from suffix_analysis.detection import fit, measure_detectors
from suffix_analysis.files import read_as, read_table, write_json, write_table
from suffix_analysis.mitigations import adaptive_split, attack_defences, measure_mitigations
from suffix_analysis.records import of_each_text
from suffix_analysis.runs import read_suffixes

if TYPE_CHECKING:
    from suffix_analysis.study import Study

Rows = list[dict[str, Any]]
MEASURED = ("detectors", "mitigations")
SETTINGS = (
    "n_top_heads", "reply_tokens", "judge", "seed", "n_instructions", "n_traced", "search_width", "topk", "target",
    "device",
)  # fmt: skip
# what decides how anything is measured
CODE = ("detectors", "detector_table", "detection", "defences", "mitigations", "adaptive")
READ = ("prompts.jsonl", "suffixes.jsonl", "direction.safetensors", "weights.json", "fast_dtype.json")


class Record(TypedDict):
    """Digests of what the tables and the adaptive attacks were measured with ("": not wholly), and their settings."""

    inputs: str
    attacked: str
    adaptive_steps: int


def defence_tables(study: Study, most: int, adaptive_steps: int, renew: Callable[[], None]) -> dict[str, Rows]:
    """Measure and write the tables ``detectors``, ``mitigations``, ``adaptive`` and ``adaptive_budget``.

    What an earlier call has measured with the same prompts, suffixes, direction, weights and settings is read; a table
    that was deleted is measured again.

    Args:
        study: a run with a direction and with several suffixes of the arms adversarial, random and benign.
        most: prompts of each kind.
        adaptive_steps: of the attacks on the model without a defence and with two; 0 for none, then those of an earlier
            call with the same inputs stay.
        renew: builds the report again; called before the attacks, which may be interrupted, and at the end.

    Raises:
        UserError: too few suffixes or prompts.
    """
    narrator, config, findings = study.narrator, study.config, study.folder / "findings"
    # what fits and what measures must not hold one text in two orders
    suffixes = of_each_text(read_suffixes(study.folder / "suffixes.jsonl"))
    direction, prompts = study.direction(), study.prompts()
    adaptive = replace(config, steps=adaptive_steps) if adaptive_steps else None
    # says now, and not at the end, what is too few
    split = None if adaptive is None else adaptive_split(study.fast, direction, prompts, adaptive)
    inputs, tables = _inputs(study, most), [findings / f"{name}.parquet" for name in MEASURED]
    told, fitted = study.folder / "defences.json", None
    nothing: Record = {"inputs": "", "attacked": "", "adaptive_steps": 0}
    record: Record = read_as(told, Record) if told.exists() else nothing
    if record["inputs"] == inputs and all(table.exists() for table in tables):
        narrator.say("Detectors and mitigations were measured before and are read.")
        detectors, mitigations = map(read_table, tables)
    else:
        narrator.say("Conversations with every suffix are read for the detectors …")
        record["inputs"] = ""  # until both tables are of these
        write_json(told, record)
        fitted, detectors = measure_detectors(study.model, direction, prompts, suffixes, most)
        write_table(tables[0], detectors)
        mitigations = measure_mitigations(
            study.fast, direction, fitted, prompts, suffixes,
            n_heads=config.n_top_heads, length=config.reply_tokens, most=most, judge=study.judge, seed=config.seed,
            on_line=lambda done, total: narrator.progress(done, total, "defences"),
        )  # fmt: skip
        write_table(tables[1], mitigations)
        record["inputs"] = inputs
        write_json(told, record)
    kept, attacked = findings / "adaptive.parquet", Rows()
    if kept.exists() and record["attacked"] == inputs:
        attacked = read_table(kept)
    elif kept.exists():
        narrator.say("The adaptive attacks of an earlier call were made with other inputs and are left out.")
        for name in ("adaptive", "adaptive_budget"):
            (findings / f"{name}.parquet").unlink(missing_ok=True)
    made = attacked and record["adaptive_steps"] == adaptive_steps
    if adaptive is not None and split is not None and made:
        narrator.say("The adaptive attacks were made before and are read.")
    elif adaptive is not None and split is not None:
        renew()
        fitted = fitted or fit(study.model, direction, prompts, suffixes, most)
        attacked = attack_defences(
            study.fast, direction, fitted, prompts, adaptive, split,
            on_step=lambda done, total: narrator.progress(done, total, "steps of adaptive attacks"),
        )  # fmt: skip
        write_table(kept, attacked)
        write_json(told, record | {"attacked": inputs, "adaptive_steps": adaptive_steps})
    prices = budgets(attacked)
    if prices:
        write_table(findings / "adaptive_budget.parquet", prices)
    renew()
    return {"detectors": detectors, "mitigations": mitigations, "adaptive": attacked, "adaptive_budget": prices}


def _inputs(study: Study, most: int) -> str:
    """What the tables depend on, as a digest: files of the run, settings, where it runs (times), and this code."""
    settings = [getattr(study.config, name) for name in SETTINGS]
    digest = hashlib.sha256(json.dumps([__version__, most, *settings], default=str).encode())
    code = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    for path in (*code, *(study.folder / name for name in READ)):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()
