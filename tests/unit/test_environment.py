"""What a bug report is told of the machine: no tokens, no paths, and something also where torch is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from suffix_analysis import environment


def test_another_projects_revision_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(tmp_path), *words], capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs")
    inside = tmp_path / "site-packages" / "suffix_analysis" / "runs.py"
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(inside))
    assert environment._revision() == ""
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "suffix_analysis" / "runs.py"))
    assert environment._revision() == git("rev-parse", "--short", "HEAD").strip()


def test_no_token_stands_in_the_environments_record(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "secret-7391")
    found = environment.environment()
    assert "secret-7391" not in json.dumps(found)
    assert found["packages"]["torch"] and found["memory_gib"] > 0 and found["cores"] >= 1
    assert found["gpus"] == [] or all("GiB" in name for name in found["gpus"])
    assert str(Path.home()) not in json.dumps(found)


def test_a_broken_torch_is_told_beside_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    found = environment.environment()
    assert found["torch"].startswith("cannot be imported: ") and found["packages"]["torch"] and "gpus" not in found
