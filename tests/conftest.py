"""Fixtures for all tests; shapes written in jaxtyping are checked while tests run."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a model hub

from jaxtyping import install_import_hook

# must stand before the packages are imported for the first time
install_import_hook(["attacks", "suffix_analysis"], "beartype.beartype")

import pytest

from tests import tiny


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """One architecture after the other."""
    return str(request.param)
