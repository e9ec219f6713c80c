"""The command line: the composition root, and the only module that prints results.

stdout carries results, stderr progress. Exit codes: 0 ok, 1 failed, 2 usage, 3 partly done, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from suffix_analysis import __version__
from suffix_analysis.config import DemoConfig, StudyConfig
from suffix_analysis.console import (
    Console,
    ability_line,
    any_character,
    defence_lines,
    direction_lines,
    shown,
    tell,
)
from suffix_analysis.errors import UsageError, UserError, first_line
from suffix_analysis.settings import sources

if TYPE_CHECKING:
    from suffix_analysis.study import Study

app = App(
    name="suffix-analysis",
    help="Generate adversarial suffixes against open chat models and explain how they work.",
    version=__version__,
    help_format="plaintext",
)
organism = App(name="organism", help="The embedded model: a small chat model taught to refuse.")
app.command(organism)

Flags = Annotated[StudyConfig, Parameter(name="*")]
DemoFlags = Annotated[DemoConfig, Parameter(name="*")]
Out = Annotated[Path, Parameter(help="Run folder; the same command with the same folder continues it.")]
ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="TOML file with settings; SUFFIX_ANALYSIS_* and flags win over it.")
]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as JSON.")]


@app.command
def demo(config: DemoFlags = DemoConfig(), *, out: Out = Path("runs/demo"), as_json: AsJson = False) -> None:
    """The whole line on the embedded model: attack, direction, replies, analysis, report."""
    study = _study(config, out)
    study.run()
    _finish(study, as_json)


@app.command(name="run")
def run_all(
    config: Flags = StudyConfig(),
    *,
    out: Out = Path("runs/study"),
    file: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """All stages on any model, from a TOML file or flags."""
    study = _study(config, out)
    study.run()
    _finish(study, as_json)


@app.command
def attack(
    config: Flags = StudyConfig(), *, out: Out = Path("runs/study"), file: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Find a universal suffix with GCG, and make its control suffixes."""
    study = _study(config, out)
    study.run(("prompts", "attack"))
    from suffix_analysis.runs import read_suffixes

    rows = [asdict(suffix) for suffix in read_suffixes(out / "suffixes.jsonl")]
    _print_result(rows, as_json, lambda: [f"{row['id']}\t{row['text']!r}" for row in rows])


@app.command
def direction(
    config: Flags = StudyConfig(), *, out: Out = Path("runs/study"), file: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Find the refusal direction and check it by ablation and addition."""
    study = _study(config, out)
    study.run(("prompts", "direction"))
    from suffix_analysis.runs import read_table

    found = study.direction()
    rows = read_table(out / "findings" / "interventions.parquet")
    cost = read_table(out / "findings" / "cost.parquet")
    more = {
        name: read_table(out / "findings" / f"{name}.parquet") for name in ("stability", "cascade", "two_directions")
    }
    result = {
        "position": found.position, "layer": found.layer, "norm": float(found.vector.norm()), "n": found.n,
        "candidates": found.scores, "interventions": rows, "cost": cost, **more,
    }  # fmt: skip
    _print_result(result, as_json, lambda: direction_lines(result))


@app.command
def analyze(
    config: Flags = StudyConfig(), *, out: Out = Path("runs/study"), file: ConfigFile = None, as_json: AsJson = False
) -> None:
    """Trace every arm and tabulate what the suffix does (needs the attack and the direction)."""
    study = _study(config, out)
    study.run()
    _finish(study, as_json)


@app.command
def abilities(
    *tasks: str,
    out: Out = Path("runs/study"),
    tasks_folder: Annotated[Path | None, Parameter(help="Folder with task files (YAML) of your own.")] = None,
    limit: Annotated[int | None, Parameter(help="Questions of each task at most.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run lm-eval's TASKS on a run's model as it is, with the direction ablated, and taken out of the weights."""
    from suffix_analysis.abilities import measure_abilities
    from suffix_analysis.runs import write_table

    console = Console()
    with _held(out) as study:
        rows = measure_abilities(
            study.fast, study.direction().vector, tasks, folder=tasks_folder, limit=limit,
            on_run=lambda done, total: console.progress(done, total, "interventions"),
        )  # fmt: skip
        write_table(out / "findings" / "abilities.parquet", rows)
        _renew_report(out)
    _print_result(rows, as_json, lambda: [ability_line(row) for row in rows])


@app.command
def defend(
    out: Annotated[Path, Parameter(help="Run folder with several adversarial suffixes (--n-attacks).")] = Path(
        "runs/study"
    ),
    *,
    most: Annotated[int, Parameter(help="Prompts of each kind.")] = 32,
    adaptive_steps: Annotated[int, Parameter(help="Steps of attacks without and with two defences; 0: none.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Detect and damp a run's suffixes: detectors on unseen prompts and suffixes, mitigations and what they cost."""
    if most < 2 or adaptive_steps < 0:
        raise UsageError(f"--most is {most} and --adaptive-steps {adaptive_steps}; at least 2 and 0 are needed.")
    from suffix_analysis.detection import measure_detectors
    from suffix_analysis.mitigations import attack_defences, measure_mitigations
    from suffix_analysis.runs import read_suffixes, read_table, write_table

    console, findings = Console(), out / "findings"
    adapted: list[dict[str, Any]] = []
    with _held(out) as study:
        suffixes = read_suffixes(out / "suffixes.jsonl")
        config, direction, prompts = study.config, study.direction(), study.prompts()
        fitted, detectors = measure_detectors(study.model, direction, prompts, suffixes, most)
        write_table(findings / "detectors.parquet", detectors)
        rows = measure_mitigations(
            study.fast, direction, fitted, prompts, suffixes,
            n_heads=config.n_top_heads, length=config.reply_tokens, most=most, seed=config.seed,
            on_line=lambda done, total: console.progress(done, total, "defences"),
        )  # fmt: skip
        write_table(findings / "mitigations.parquet", rows)
        if adaptive_steps:
            adapted = attack_defences(
                study.fast, direction, fitted, prompts, suffixes, replace(config, steps=adaptive_steps),
                on_step=lambda done, total: console.progress(done, total, "steps of adaptive attacks"),
            )  # fmt: skip
            write_table(findings / "adaptive.parquet", adapted)
        elif (findings / "adaptive.parquet").exists():  # of an earlier call, on the same suffixes and settings
            adapted = read_table(findings / "adaptive.parquet")
        _renew_report(out)
    result = {"detectors": detectors, "mitigations": rows, "adaptive": adapted or "not tested"}
    _print_result(result, as_json, lambda: defence_lines(detectors, rows, adapted))


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
            print(f"{len(written)} files in {figures}")
        elif other is not None:
            print(build_comparison(run, other, out, redact=redact))
        else:
            print(build_report(run, out, redact=redact))
    except ReportError as error:
        raise UserError(str(error)) from error


@app.command
def models(name: str | None = None, *, as_json: AsJson = False) -> None:
    """Without a NAME the families that are known; with one, how much memory that model needs here."""
    from suffix_analysis.families import FAMILIES, support_table

    if name is None:
        _print_result([asdict(family) for family in FAMILIES], as_json, lambda: [support_table()])
        return
    from suffix_analysis.sizes import size_of, verdict

    size = size_of(name)
    told = [
        f"{name}: {size.architecture}, {size.n_parameters / 1e6:.0f} million parameters",
        f"weights: float32 {size.float32:.2f} GiB, bfloat16 {size.bfloat16:.2f}, 4 bits {size.four_bit:.2f}",
        verdict(size),
    ]
    _print_result(asdict(size) | {"verdict": told[-1]}, as_json, lambda: told)


@app.command
def env() -> None:
    """Print versions and machine: what a bug report needs."""
    from suffix_analysis.runs import environment

    print(json.dumps(environment(), indent=1))


@organism.command
def train(*, out: Path = Path("adapter"), seed: int = 0) -> None:
    """Train the adapter anew into a folder, with its training record."""
    from suffix_analysis.organism.train import train_adapter

    console = Console()
    console.stage(f"training into {out}", skipped=False)
    record = train_adapter(out, seed, console.progress)
    print(json.dumps(record, indent=1))


@organism.command(name="eval")
def evaluate(
    *, adapter: Annotated[Path | None, Parameter(help="Another adapter; the shipped one if left out.")] = None
) -> None:
    """Measure the embedded model: refusals per kind and style, and what the adapter costs on harmless replies."""
    from suffix_analysis.organism.evaluate import evaluate_organism

    print(json.dumps(evaluate_organism(adapter, tell), indent=1))


def _study(config: StudyConfig, out: Path) -> Study:
    from suffix_analysis.study import Study

    return Study(out, config, Console())


@contextlib.contextmanager
def _held(out: Path) -> Iterator[Study]:
    """The study that made a run folder, which stays locked meanwhile."""
    from suffix_analysis.runs import open_run, read_config

    settings = read_config(out)
    try:
        config = StudyConfig(**settings)
    except TypeError as error:
        raise UsageError(f"{out} was made by another version of this tool: {error}.") from error
    with open_run(out, settings):
        yield _study(config, out)


def _finish(study: Study, as_json: bool) -> None:
    """Build the report and print where it is, with the headline numbers."""
    from suffix_analysis.runs import read_table

    page = _build(study.folder)
    rows = read_table(study.folder / "findings" / "refusal.parquet")
    result = {"report": str(page), "refusal": rows}
    lines = [
        f"{row['arm']:21} refusal phrases {row['refusal_rate']:6.1%} [{row['refusal_lo']:.1%}, {row['refusal_hi']:.1%}]"
        f"  {row['n_prompts']} prompts × {max(1, row['n_suffixes'])}"
        for row in rows
    ]
    _print_result(result, as_json, lambda: [*lines, f"report: {page}"])


def _renew_report(folder: Path) -> None:
    """Build the report again where there is one, for findings that were added to a run."""
    if (folder / "report.html").exists():
        _build(folder)


def _build(folder: Path) -> Path:
    """Build the report of findings that are there."""
    from reports import ReportError, build_report

    try:
        return build_report(folder)
    except ReportError as error:
        raise UserError(f"The findings are complete, but the report failed: {error}") from error


def _print_result(value: Any, as_json: bool, lines: Any) -> None:
    print(json.dumps(value, indent=1) if as_json else shown("\n".join(lines())))


def main() -> None:
    """Run a command; a user's mistake is one sentence on stderr and an exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    any_character()
    try:
        app.config = sources(sys.argv[1:])
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        tell(f"suffix-analysis: {error}")
        sys.exit(2)
    except UserError as error:
        tell(f"suffix-analysis: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # nobody reads any more, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        sys.exit(1)
    except KeyboardInterrupt:
        tell("suffix-analysis: interrupted; what was finished is kept, the same command goes on from there")
        sys.exit(130)
    except Exception as error:
        from attacks import AttackError

        if isinstance(error, AttackError):
            tell(f"suffix-analysis: {error}")
        elif os.environ.get("SUFFIX_ANALYSIS_DEBUG"):
            raise
        else:
            tell(
                f"suffix-analysis: unexpected {type(error).__name__}: {first_line(error)}; what was finished is kept. "
                "Please report it with what SUFFIX_ANALYSIS_DEBUG=1 and `suffix-analysis env` print."
            )
        sys.exit(1)


if __name__ == "__main__":
    main()
