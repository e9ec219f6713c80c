"""What a machine does to a run: a full disk, a folder that cannot be written, a second process."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny

pytestmark = pytest.mark.slow
MOUNTS = ["unshare", "--map-root-user", "--mount"]  # mounts of its own, which end with the command
NEEDS_MOUNTS = pytest.mark.skipif(
    subprocess.run([*MOUNTS, "true"], check=False, capture_output=True).returncode != 0,
    reason="mounting is barred here",
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small campaign, without its folder."""
    model = tmp_path_factory.mktemp("model")
    tiny.hf_model("llama").save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    tokens = [word for i in range(0, 700, 2) for word in ("--refusal-tokens", str(i))]
    return [
        sys.executable, "-m", "suffix_analysis.cli", "campaign", "--model", str(model), "--n-instructions", "2",
        "--n-attacks", "2", "--steps", "3", "--search-width", "4", "--topk", "8", "--suffix-tokens", "3",
        "--prompts-per-split", "6", "--score-dtype", "float32", *tokens,
    ]  # fmt: skip


def suffixes(folder: Path) -> list[str]:
    return (folder / "suffixes.jsonl").read_text("utf-8").splitlines()


@NEEDS_MOUNTS
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(words: list[str], tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    subprocess.run([*words, "--out", str(tmp_path / "roomy")], check=True, capture_output=True)
    pages = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "roomy").rglob("*") if path.is_file())
    command = shlex.join([*words, "--out", str(disk / "run")])
    script = f"""
        mount -t tmpfs -o size={4 * (pages - 4)}k none {disk}
        {command} >{tmp_path}/first.out 2>{tmp_path}/first.err; echo $?
        mount -o remount,size=50m {disk}
        {command} >{tmp_path}/second.out 2>{tmp_path}/second.err; echo $?
        cp -r {disk}/run {kept}
    """
    done = subprocess.run([*MOUNTS, "sh", "-c", script], check=False, capture_output=True, text=True)
    first, second = done.stdout.split()
    said = (tmp_path / "first.err").read_text("utf-8")
    assert first == "1" and "No space left on device; free space or choose --out." in said and "Traceback" not in said
    assert second == "0", (tmp_path / "second.err").read_text("utf-8")
    assert suffixes(kept) == suffixes(tmp_path / "roomy"), "as if the disk had never been full"


@NEEDS_MOUNTS
def test_a_folder_that_cannot_be_written_is_said(words: list[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = shlex.join([*words, "--out", str(disk / "run")])
    script = f"mount -t tmpfs -o ro none {disk}; {command}"
    done = subprocess.run([*MOUNTS, "sh", "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be used: Read-only file system; choose another with --out." in done.stderr


def test_a_second_process_on_the_same_folder_is_refused(words: list[str], tmp_path: Path) -> None:
    command = [*words, "--out", str(tmp_path / "run")]
    command[command.index("--steps") + 1] = "1000000"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while first.poll() is None and not (tmp_path / "run" / "status.json").exists():
            time.sleep(0.05)
        second = subprocess.run(command, check=False, capture_output=True, text=True)
        assert first.poll() is None
        assert second.returncode == 1 and "Another process is working in" in second.stderr
    finally:
        first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) == 130
