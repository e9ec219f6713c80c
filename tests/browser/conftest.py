"""Chromium, and reports of invented runs, once for all browser tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from reports import build_report
from tests.browser.pages import CHROMIUM
from tests.fake_run import make_fake_run

if TYPE_CHECKING:
    from playwright import sync_api


@pytest.fixture(scope="session")
def browser() -> Iterator[sync_api.Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(make_fake_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_report(make_fake_run(tmp_path_factory.mktemp("hostile"), hostile=True, n_prompts=40))


@pytest.fixture(autouse=True)
def closed_pages(browser: sync_api.Browser) -> Iterator[None]:
    yield
    for context in browser.contexts:
        context.close()
