"""A run folder → one HTML file that needs nothing else: no network, no second file."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from reports.attention import circuitsvis_bundle
from reports.charts_more import figures
from reports.data import RunData, read_run
from reports.errors import ReportError
from reports.escape import json_for_html, script_for_html, visible
from reports.page import BUDGETS, assemble

MAX_BYTES = 6 * 1024 * 1024
"""Pages stay under this size; bulky parts are cut first, and the page says so."""


def build_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run folder and return its path (default: ``report.html`` inside the folder).

    The same folder gives the same bytes. The file appears whole or not at all. Raises ReportError, one sentence,
    where the folder cannot be read or the page cannot be written.
    """
    run = Path(run)
    data = read_run(run)
    target = Path(out) if out is not None else run / "report.html"
    _write(target, render(data))
    return target


def render(data: RunData) -> bytes:
    """Return the page as UTF-8 bytes, at most MAX_BYTES long."""
    charts = figures(data)
    template = _template()
    fixed = {"css": _static("report.css"), "scripts": _scripts(), "csp": _policy(_scripts())}
    page = b""
    for budget in BUDGETS:
        context, payload = assemble(data, charts, budget)
        page = template.render(**context, **fixed, payload=json_for_html(payload)).encode("utf-8")
        if len(page) <= MAX_BYTES:
            return page
    raise ReportError(
        f"The report would take {len(page) / 2**20:.1f} MiB even without replies and patterns "
        f"(limit {MAX_BYTES >> 20} MiB): "
        "shorten suffixes.jsonl or the tables in findings/."
    )


@cache
def _scripts() -> tuple[tuple[str, str], ...]:
    """Return (name, source) of the page's scripts in the order in which they run."""
    sources = (
        ("vega", vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        ("circuitsvis", circuitsvis_bundle()),
    )
    own = (("views", _static("views.js")), ("report", _static("report.js")))
    return tuple((name, script_for_html(source)) for name, source in (*sources, *own))


def _policy(scripts: tuple[tuple[str, str], ...]) -> str:
    """Return a content security policy that runs these scripts and nothing else, and lets nothing out."""
    hashes = " ".join(f"'sha256-{_digest(source)}'" for _, source in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode("ascii")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    return environment.get_template("report.html.j2")


def _shown(value: Any) -> Any:
    """Make every string the template prints visible, whoever forgot to; our own CSS and scripts are marked safe."""
    return visible(value, newlines=True) if isinstance(value, str) and not isinstance(value, Markup) else value


def _static(name: str) -> str:
    return (files("reports") / "static" / name).read_text(encoding="utf-8")


def _write(target: Path, page: bytes) -> None:
    """Write through a temporary file beside the target, so that readers see the old page or the new one."""
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ReportError(f"{target} cannot be written ({error.strerror}): give another path with --out.") from None
