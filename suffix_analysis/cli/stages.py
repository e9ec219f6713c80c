"""The commands that make a run folder, a stage or all at a time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from suffix_analysis.cli.common import (
    AsJson,
    CampaignFlags,
    ConfigFile,
    DemoFlags,
    Flags,
    Out,
    app,
    finish,
    open_study,
    print_result,
)
from suffix_analysis.config import CampaignConfig, DemoConfig, StudyConfig
from suffix_analysis.console import campaign_lines, direction_lines
from suffix_analysis.errors import UserError


@app.command
def demo(config: DemoFlags = DemoConfig(), *, out: Out = Path("runs/demo"), as_json: AsJson = False) -> None:
    """The whole line on the embedded model: attack, direction, replies, analysis, report."""
    study = open_study(config, out)
    study.run()
    finish(study, as_json)


@app.command(name="run")
def run_all(
    config: Flags = StudyConfig(),
    *,
    out: Out = Path("runs/study"),
    file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """All stages on any model, from a TOML file or flags."""
    study = open_study(config, out)
    study.run()
    finish(study, as_json)


@app.command
def attack(
    config: Flags = StudyConfig(), *, out: Out = Path("runs/study"), file: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Find a universal suffix with GCG, and make its control suffixes."""
    study = open_study(config, out)
    study.run(("prompts", "attack"))
    from suffix_analysis.runs import read_suffixes

    rows = [asdict(suffix) for suffix in read_suffixes(out / "suffixes.jsonl")]
    print_result(rows, as_json, lambda: [f"{row['id']}\t{row['text']!r}" for row in rows])


@app.command
def campaign(
    config: CampaignFlags = CampaignConfig(),
    *,
    out: Out = Path("runs/campaign"),
    file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Make many attacks: on instructions one by one or together, with several seeds and settings."""
    study = open_study(config, out)
    study.run(("prompts", "campaign"))
    from suffix_analysis.campaign import by_settings
    from suffix_analysis.files import read_table

    rows = read_table(out / "findings" / "campaign.parquet")
    result = {"attacks": rows, "settings": by_settings(rows), "suffixes": str(out / "suffixes.jsonl")}
    print_result(result, as_json, lambda: campaign_lines(result))


@app.command
def direction(
    config: Flags = StudyConfig(), *, out: Out = Path("runs/study"), file: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Find the refusal direction and check it by ablation and addition."""
    study = open_study(config, out)
    study.run(("prompts", "direction"))
    from suffix_analysis.files import read_table

    found = study.direction()
    rows = read_table(out / "findings" / "interventions.parquet")
    cost = read_table(out / "findings" / "cost.parquet")
    names = ("stability", "cascade", "two_directions", "separation")
    more = {name: read_table(out / "findings" / f"{name}.parquet") for name in names}
    tokens = [{"id": i, "text": study.model.tokenizer.decode([i])} for i in found.refusal_tokens]
    result = {
        "position": found.position, "layer": found.layer, "norm": float(found.vector.norm()), "n": found.n,
        "refusal_tokens": tokens, "candidates": found.scores, "interventions": rows, "cost": cost, **more,
        "replies": str(out / "findings" / "intervention_replies.parquet"),
    }  # fmt: skip
    print_result(result, as_json, lambda: direction_lines(result))


@app.command
def analyze(
    config: Flags = StudyConfig(), *, out: Out = Path("runs/study"), file: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Trace every arm and tabulate what the suffix does (needs the attack and the direction)."""
    from suffix_analysis.runs import is_done

    for stage in ("attack", "direction"):
        if not is_done(out, stage):
            raise UserError(f"{out} has no {stage} yet; run `suffix-analysis {stage} --out {out}` first.")
    study = open_study(config, out)
    study.run()
    finish(study, as_json)
