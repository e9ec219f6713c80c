"""What the browser tests share: an opened page that is watched, and where Chromium is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright import sync_api

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDED = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]


@dataclass
class Seen:
    """What the page did: console messages, requests, dialogs, uncaught errors."""

    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def quiet(self) -> None:
        """Assert that the page was silent, asked for nothing but itself, and ran nothing foreign."""
        assert self.errors == [] and self.dialogs == []
        assert self.console == []
        # data: and blob: stay inside the page
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert len([url for url in self.requests if url.startswith("file:")]) == 1


def open_page(
    browser: sync_api.Browser,
    path: Path,
    width: int = 1280,
    scheme: str = "light",
    fragment: str = "",
) -> tuple[sync_api.Page, Seen]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page, seen = context.new_page(), Seen()
    page.on("console", lambda message: seen.console.append(message.text))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))

    def dismiss(dialog: sync_api.Dialog) -> None:
        seen.dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.goto(path.as_uri() + (f"#{fragment}" if fragment else ""))
    page.wait_for_selector("html[data-drawn-ms]", timeout=60_000)
    return page, seen


def draw_patterns(page: sync_api.Page) -> None:
    page.evaluate("document.getElementById('cv').scrollIntoView({behavior: 'instant'})")
    page.wait_for_selector("#cv canvas", timeout=60_000)


def pinned_in(page: sync_api.Page) -> str:
    return page.locator("#pinned h3").inner_text() if page.locator("#pinned h3").count() else ""
