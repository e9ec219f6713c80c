"""Results in notebooks: the same page in a frame, made by the same renderer; nothing is asked of the network."""

from __future__ import annotations

import html
from typing import Any

HEIGHT = 860


def findings_html(findings: Any) -> str:
    """Return findings as a page in a frame of its own, where nothing can reach the notebook."""
    from reports.build import render
    from reports.data import RunData
    from reports.schema import COLUMNS, Check, Pattern, Summary
    from reports.tables import usable_rows

    data = RunData(
        name="findings",
        config="",
        summary=Summary.model_validate(findings.summary),
        prompts=(),
        tables={
            name: usable_rows(name, rows, rows[0].keys(), f"The table {name!r} of these findings")
            for name, rows in findings.tables.items()
            if name in COLUMNS and rows
        },
        patterns=tuple(Pattern.model_validate(row) for row in findings.patterns),
        checks=tuple(Check.model_validate(row) for row in findings.checks),
    )
    page = html.escape(render(data).decode("utf-8"), quote=True)
    return (
        f'<iframe sandbox="allow-scripts allow-downloads" title="suffix analysis" srcdoc="{page}" '
        f'style="width:100%;height:{HEIGHT}px;border:0"></iframe>'
    )
