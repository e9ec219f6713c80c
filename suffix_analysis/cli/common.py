"""What the commands share: the application, their arguments, the run folder, and how results are printed."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from suffix_analysis import __version__
from suffix_analysis.config import CampaignConfig, DemoConfig, StudyConfig
from suffix_analysis.console import Console, shown, tell
from suffix_analysis.errors import UsageError, UserError
from suffix_analysis.settings import require_trusted

if TYPE_CHECKING:
    from suffix_analysis.study import Study

app = App(
    name="suffix-analysis",
    help="Generate adversarial suffixes against open chat models and explain how they work.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # main says what is kept
)
organism = App(name="organism", help="The embedded model: a small chat model taught to refuse.")
app.command(organism)

Flags = Annotated[StudyConfig, Parameter(name="*")]
CampaignFlags = Annotated[CampaignConfig, Parameter(name="*")]
DemoFlags = Annotated[DemoConfig, Parameter(name="*")]
Out = Annotated[Path, Parameter(help="Run folder; the same command with the same folder continues it.")]
ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="TOML file with settings; SUFFIX_ANALYSIS_* and flags win over it.")
]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as JSON.")]


def open_study(config: StudyConfig, out: Path) -> Study:
    """The study of a run folder, with its progress on stderr."""
    from suffix_analysis.study import Study

    return Study(out, config, Console())


@contextlib.contextmanager
def held(out: Path, device: str | None = None, judge: str | None = None) -> Iterator[Study]:
    """The study that made a run folder, which stays locked meanwhile.

    ``device``: another than the run's; ``judge``: the one that its replies may be given.

    Raises:
        UsageError: the folder holds a campaign, or was made by another version.
        UserError: it is no run folder, or another process holds it.
    """
    from suffix_analysis.runs import open_run, read_config

    settings = read_config(out)
    if "vary" in settings:
        raise UsageError(f"{out} holds a campaign; analyse its suffixes with `{study_of_campaign(out, settings)}`.")
    if judge is not None:
        require_trusted(str(out), settings.get("judge", "rules"), judge)
    try:
        config = StudyConfig(**(settings | ({} if device is None else {"device": device})))
    except TypeError as error:
        raise UsageError(f"{out} was made by another version of this tool: {error}.") from error
    with open_run(out, settings):
        yield open_study(config, out)


def study_of_campaign(out: Path, settings: dict[str, Any]) -> str:
    """The command that analyses a campaign's suffixes: with its model and prompts, and another folder."""
    kept = (
        "model", "adapter", "system", "reply_prefix", "harmful", "harmless", "column", "prompts_per_split", "seed",
        "dtype", "four_bit",
    )  # fmt: skip
    words = ["suffix-analysis", "run", "--suffixes", str(out / "suffixes.jsonl"), "--out", f"{out}-study"]
    for name in kept:
        if settings.get(name) not in (None, getattr(StudyConfig(), name)):
            words += [f"--{name.replace('_', '-')}", *([] if settings[name] is True else [str(settings[name])])]
    return shlex.join(words)


EDITS = {"ablated": "ablated", "orthogonalised": "taken out of the weights"}


def finish(study: Study, as_json: bool) -> None:
    """Build the report and print where it is, with the headline numbers."""
    from suffix_analysis.files import read_table
    from suffix_analysis.replies import SUCCESS

    page = build(study.folder)
    rows = read_table(study.folder / "findings" / "refusal.parquet")
    contrasts = read_table(study.folder / "findings" / "contrasts.parquet")
    success = [row for row in contrasts if row["measure"] == SUCCESS]
    result = {"report": str(page), "refusal": rows, "attack_success": success}
    lines = [
        f"{row['arm']:21} refusal phrases {row['refusal_rate']:6.1%} [{row['refusal_lo']:.1%}, {row['refusal_hi']:.1%}]"
        f"  {row['n_prompts']} prompts × {max(1, row['n_suffixes'])}"
        for row in rows
    ]
    lines += [
        f"complied with the suffix, less that with the direction {EDITS[row['against']]}: {row['estimate']:+.1%} "
        f"[{row['lo']:+.1%}, {row['hi']:+.1%}] on the same prompts" + (", descriptive" if row["descriptive"] else "")
        for row in success
    ]
    print_result(result, as_json, lambda: [*lines, f"report: {page}"])


def renew_report(folder: Path) -> None:
    """Build the report again where there is one, for findings that were added to a run."""
    if (folder / "report.html").exists():
        build(folder)


def build(folder: Path) -> Path:
    """Build the report of findings that are there.

    Raises:
        UserError: the report cannot be built.
    """
    from reports import ReportError, build_report

    try:
        return build_report(folder, on_unusable=lambda line: tell(f"suffix-analysis: {line}"))
    except ReportError as error:
        raise UserError(f"The findings are complete, but the report failed: {error}") from error


def print_result(value: Any, as_json: bool, lines: Any) -> None:
    """Print a result as JSON, or as what ``lines()`` makes of it."""
    print(json.dumps(value, indent=1) if as_json else shown("\n".join(lines())))
