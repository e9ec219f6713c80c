"""Findings of a run folder → one self-contained HTML page. Imports no torch.

``build_report(run)`` writes ``run/report.html``; ``ReportError`` says in one sentence why it could not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reports.build import build_report
    from reports.compare import build_comparison
    from reports.errors import ReportError
    from reports.export import save_figures

__all__ = ["ReportError", "build_comparison", "build_report", "save_figures"]
_HOMES = {
    "ReportError": "reports.errors",
    "build_comparison": "reports.compare",
    "build_report": "reports.build",
    "save_figures": "reports.export",
}


def __getattr__(name: str) -> Any:
    """Load the public names on first use, so that ``import reports`` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reports' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
