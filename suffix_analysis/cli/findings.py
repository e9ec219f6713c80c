"""The commands on a run folder that is there: abilities, defences, the report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from suffix_analysis.cli.common import AsJson, Out, app, held, print_result, renew_report
from suffix_analysis.config import Whole
from suffix_analysis.console import Console, ability_line, defence_lines, shown, tell
from suffix_analysis.errors import UsageError, UserError


@app.command
def abilities(
    *tasks: str,
    out: Out = Path("runs/study"),
    tasks_folder: Annotated[
        Path | None,
        Parameter(help="Folder with task files (YAML) of your own, instead of lm-eval's; functions they name are run."),
    ] = None,
    device: Annotated[str | None, Parameter(help="Another than the run's: cpu, cuda or auto.")] = None,
    limit: Annotated[Whole | None, Parameter(help="Questions of each task at most.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run lm-eval's TASKS on a run's model as it is, with the direction ablated, and taken out of the weights.

    What other tasks have found in the folder stays.
    """
    from suffix_analysis.abilities import measure_abilities
    from suffix_analysis.files import read_table, write_table

    console = Console()
    with held(out, device) as study:
        path = out / "findings" / "abilities.parquet"
        before = read_table(path) if path.exists() else []
        rows = measure_abilities(
            study.fast, study.direction().vector, tasks, folder=tasks_folder, limit=limit,
            on_run=lambda done, total: console.progress(done, total, "interventions"),
        )  # fmt: skip
        named = {row["task"] for row in rows}
        write_table(path, [row for row in before if row["task"] not in named] + rows)
        renew_report(out)
    print_result(rows, as_json, lambda: [ability_line(row) for row in rows])


@app.command
def defend(
    out: Annotated[Path, Parameter(help="Run folder with several adversarial suffixes (--n-attacks).")] = Path(
        "runs/study"
    ),
    *,
    most: Annotated[Whole, Parameter(help="Prompts of each kind.")] = 32,
    adaptive_steps: Annotated[Whole, Parameter(help="Steps of attacks without and with two defences; 0: none.")] = 0,
    device: Annotated[str | None, Parameter(help="Another than the run's: cpu, cuda or auto.")] = None,
    judge: Annotated[str, Parameter(help="The run's judge, said again where it is a function of one's own.")] = "rules",
    as_json: AsJson = False,
) -> None:
    """Detect and damp a run's suffixes: detectors on unseen prompts and suffixes, mitigations and what they cost."""
    if most < 2 or adaptive_steps < 0:
        raise UsageError(f"--most is {most} and --adaptive-steps {adaptive_steps}; at least 2 and 0 are needed.")
    from suffix_analysis.defence_stage import defence_tables

    with held(out, device, judge) as study:
        found = defence_tables(study, most, adaptive_steps, lambda: renew_report(out))
    print_result(found | {"adaptive": found["adaptive"] or "not tested"}, as_json, lambda: defence_lines(**found))


@app.command
def report(
    run: Path,
    other: Path | None = None,
    *,
    out: Annotated[Path | None, Parameter(help="Where to write the page.")] = None,
    redact: Annotated[bool, Parameter(help="Replace suffixes, targets and replies by lengths and hashes.")] = False,
    figures: Annotated[
        Path | None, Parameter(help="Folder for figures (SVG, PNG), tables (CSV) and the circuit (JSON) instead.")
    ] = None,
) -> None:
    """Build the HTML report of a RUN folder; with an OTHER one, a page that shows the two side by side."""
    from reports import ReportError, build_comparison, build_report, save_figures

    if figures is not None and (other is not None or redact or out is not None):
        raise UsageError("--figures writes files of one run as they are; leave the other run, --redact and --out out.")
    try:
        if figures is not None:
            written = save_figures(run, figures)
            print(shown(f"{len(written)} files in {figures}"))
        else:
            damaged: list[str] = []
            if other is not None:
                page = build_comparison(run, other, out, redact=redact, on_unusable=damaged.append)
            else:
                page = build_report(run, out, redact=redact, on_unusable=damaged.append)
            print(shown(str(page)))
            for line in damaged:
                tell(f"suffix-analysis: {line}")
            if damaged:
                sys.exit(3)  # a page of what is there
    except ReportError as error:
        raise UserError(str(error)) from error
