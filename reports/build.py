"""A run folder → one HTML file that needs nothing else: no network, no second file."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup
from platformdirs import user_cache_path

from reports.attention import circuitsvis_bundle
from reports.charts_more import figures
from reports.data import RunData, read_run
from reports.errors import ReportError
from reports.escape import json_bytes, script_for_html, visible
from reports.page import BUDGETS, assemble
from reports.redact import redact as redacted

MAX_BYTES = 6 * 1024 * 1024
"""Pages stay under this size; bulky parts are cut first, and the page says so."""


def build_report(
    run: Path,
    out: Path | None = None,
    *,
    redact: bool = False,
    on_unusable: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the report of a run folder and return its path (default: ``report.html`` inside the folder).

    With ``redact`` suffixes, targets and replies are lengths and hashes (default: ``report-redacted.html``). The same
    folder gives the same bytes. The file appears whole or not at all. ``on_unusable`` is told of every file that is
    damaged and so not shown. Raises ReportError, one sentence, where the folder cannot be read or the page cannot be
    written.
    """
    run = Path(run)
    if out is not None:
        prepare(Path(out))
    data = redacted(read_run(run)) if redact else read_run(run)
    target = Path(out) if out is not None else run / ("report-redacted.html" if redact else "report.html")
    write(target, render(data))
    for name, why in data.unusable.items():
        on_unusable(f"{name}: {why}")
    return target


def prepare(target: Path) -> None:
    """Make the folder of a page that is asked for, and refuse a file in its place that is no page.

    Raises ReportError.
    """
    try:
        if target.is_file() and target.read_bytes()[:15].lower() != b"<!doctype html>":
            raise ReportError(f"{target} is there and is no page: give another path with --out.")
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{target} cannot be written ({error.strerror}): give another path with --out.") from None


def render(data: RunData) -> bytes:
    """Return the page as UTF-8 bytes, at most MAX_BYTES long.

    Raises ReportError where it would be longer even without replies and patterns.
    """
    charts = figures(data)
    made = b""
    for budget in BUDGETS:
        made = page("report.html.j2", *assemble(data, charts, budget))
        if len(made) <= MAX_BYTES:
            return made
    raise ReportError(
        f"The report would take {len(made) / 2**20:.1f} MiB even without replies and patterns "
        f"(limit {MAX_BYTES >> 20} MiB): "
        "shorten suffixes.jsonl or the tables in findings/."
    )


def page(template: str, variables: dict[str, Any], payload: dict[str, Any]) -> bytes:
    """Return a template filled with ``variables``, our style sheet and scripts, and the packed payload."""
    fixed = {"css": _static("report.css"), "scripts": _scripts(), "csp": _policy(_scripts())}
    return _template(template).render(**variables, **fixed, payload=packed(payload)).encode("utf-8")


def packed(payload: dict[str, Any]) -> str:
    """Return the payload as base64 of its gzipped JSON: small, and free of anything a parser could take for markup.

    Level 9 takes three times as long as 6, for a twenty-fifth less.
    """
    return base64.b64encode(gzip.compress(json_bytes(payload), compresslevel=6, mtime=0)).decode("ascii")


@cache
def _scripts() -> tuple[tuple[str, str], ...]:
    """Return (name, source) of the page's scripts in the order in which they run."""
    sources = (
        ("vega", _vega_bundle("window.vegaEmbed = vegaEmbed;")),
        ("circuitsvis", circuitsvis_bundle()),
    )
    return tuple((name, script_for_html(source)) for name, source in (*sources, ("report", _static("report.js"))))


def _vega_bundle(snippet: str) -> str:
    """Return Vega's JavaScript with ``snippet``: bundling takes seconds, so it is kept in the user's cache."""
    folder = Path(os.environ.get("SUFFIX_ANALYSIS_CACHE") or user_cache_path("suffix-analysis"))
    kept = folder / f"vega-{version('vl-convert-python')}-{hashlib.sha256(snippet.encode()).hexdigest()[:12]}.js.gz"
    with contextlib.suppress(OSError, EOFError, zlib.error, UnicodeDecodeError):  # not there, or damaged
        return gzip.decompress(kept.read_bytes()).decode("utf-8")
    made = vl_convert.javascript_bundle(snippet)
    with contextlib.suppress(OSError, ReportError):  # a cache that cannot be written costs time only
        folder.mkdir(parents=True, exist_ok=True)
        write(kept, gzip.compress(made.encode("utf-8"), mtime=0))
    return made


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
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """Make every string the template prints visible, whoever forgot to; our own CSS and scripts are marked safe."""
    return visible(value, newlines=True) if isinstance(value, str) and not isinstance(value, Markup) else value


def _static(name: str) -> str:
    return (files("reports") / "static" / name).read_text(encoding="utf-8")


def write(target: Path, page: bytes) -> None:
    """Write through a temporary file beside the target, so that readers see the old page or the new one.

    Raises ReportError where it cannot be written.
    """
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
