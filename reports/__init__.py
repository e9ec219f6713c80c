"""Findings of a run folder → one self-contained HTML page. Imports no torch.

Importing it lets notebooks show findings as a report. ``build_report(run)`` writes ``run/report.html``; ``ReportError``
says in one sentence why it could not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reports.build import build_report
    from reports.errors import ReportError

__all__ = ["ReportError", "build_report"]


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that ``import reports`` stays cheap."""
    if name == "build_report":
        from reports.build import build_report

        return build_report
    if name == "ReportError":
        from reports.errors import ReportError

        return ReportError
    raise AttributeError(f"module 'reports' has no attribute {name!r}")


def _register() -> None:
    from reports.notebook import register

    register()


def __dir__() -> list[str]:
    return __all__


_register()
