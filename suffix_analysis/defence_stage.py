"""What `suffix-analysis defend` adds to a run: detectors, mitigations, and attacks on the defended model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suffix_analysis.adaptive import budgets
from suffix_analysis.detection import measure_detectors
from suffix_analysis.files import read_table, write_table
from suffix_analysis.mitigations import adaptive_split, attack_defences, measure_mitigations
from suffix_analysis.records import of_each_text
from suffix_analysis.runs import read_suffixes

if TYPE_CHECKING:
    from suffix_analysis.study import Study

Rows = list[dict[str, Any]]


def defence_tables(study: Study, most: int, adaptive_steps: int, renew: Callable[[], None]) -> dict[str, Rows]:
    """Measure and write the tables ``detectors``, ``mitigations``, ``adaptive`` and ``adaptive_budget``.

    Args:
        study: a run with a direction and with several suffixes of the arms adversarial, random and benign.
        most: prompts of each kind.
        adaptive_steps: of the attacks on the model without a defence and with two; 0 for none, then those of an earlier
            call stay if they met the same threshold.
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
    narrator.say("Conversations with every suffix are read for the detectors …")
    fitted, detectors = measure_detectors(study.model, direction, prompts, suffixes, most)
    write_table(findings / "detectors.parquet", detectors)
    attacked = _kept(findings / "adaptive.parquet", fitted.gap)
    if not attacked and (findings / "adaptive.parquet").exists():
        narrator.say("The adaptive attacks of an earlier call met another threshold and are left out.")
        for name in ("adaptive", "adaptive_budget"):
            (findings / f"{name}.parquet").unlink(missing_ok=True)
    mitigations = measure_mitigations(
        study.fast, direction, fitted, prompts, suffixes,
        n_heads=config.n_top_heads, length=config.reply_tokens, most=most, judge=study.judge, seed=config.seed,
        on_line=lambda done, total: narrator.progress(done, total, "defences"),
    )  # fmt: skip
    write_table(findings / "mitigations.parquet", mitigations)
    if adaptive is not None and split is not None:
        renew()
        attacked = attack_defences(
            study.fast, direction, fitted, prompts, suffixes, adaptive, split,
            on_step=lambda done, total: narrator.progress(done, total, "steps of adaptive attacks"),
        )  # fmt: skip
        write_table(findings / "adaptive.parquet", attacked)
    prices = budgets(attacked)
    if prices:
        write_table(findings / "adaptive_budget.parquet", prices)
    renew()
    return {"detectors": detectors, "mitigations": mitigations, "adaptive": attacked, "adaptive_budget": prices}


def _kept(path: Path, cut: float) -> Rows:
    """The adaptive attacks of an earlier call, if they met the threshold that this one has; none else."""
    rows = read_table(path) if path.exists() else []
    return rows if all(row.get("cut") == cut for row in rows) else []
