"""Fixtures for all tests; shapes written in jaxtyping are checked while tests run."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a model hub

from jaxtyping import install_import_hook

# must stand before the packages are imported for the first time
install_import_hook(["attacks", "suffix_analysis"], "beartype.beartype")

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """No test may open a connection that leaves this machine: what needs a download says so instead of trying."""
    original = socket.socket.connect
    here = {"127.0.0.1", "::1", "localhost", "0.0.0.0", socket.gethostbyname(socket.gethostname())}

    def connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in here:
            raise AssertionError(f"a test reached for the network: {address}")
        original(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """One architecture after the other."""
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file, the embedded model's, first: begun last, it would keep one of two workers waiting."""
    items.sort(key=lambda item: item.get_closest_marker("embedded") is None)
