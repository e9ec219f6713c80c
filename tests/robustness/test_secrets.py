"""What a process reaches and what it tells, seen from outside: no connection, and no token of the user's anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from suffix_analysis.prompts import load_prompts, to_jsonl
from tests import tiny

SECRET = "hf_thisIsNobodysToken7391"
# every way out of a process that Python knows is reported to the file and refused
WATCHED = """
import sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        address = args[1] if event == "socket.connect" else args
        if isinstance(address, tuple):
            with open({log!r}, "a") as log:
                log.write(f"{{event}} {{address}}\\n")
            raise OSError("no network in this test")
sys.addaudithook(watch)
"""


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user has it: nothing has told the hub's library to stay offline."""
    code = WATCHED.format(log=str(folder / "network.log")) + "from suffix_analysis.cli import main; main()"
    own = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "TRANSFORMERS_"))}
    own = {k: v for k, v in own.items() if not k.lower().endswith("_proxy")}  # whose name would be looked up instead
    own |= {"HF_TOKEN": SECRET, "HUGGING_FACE_HUB_TOKEN": SECRET, "SUFFIX_ANALYSIS_DEBUG": "1", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=own, capture_output=True, text=True, check=False, cwd=folder
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.hf_model("llama").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    for kind in ("harmful", "harmless"):
        own = [p for split in ("fit", "select", "report") for p in load_prompts(kind=kind, split=split)[:16]]
        (folder / f"{kind}.jsonl").write_text(to_jsonl(own))
    return folder


@pytest.mark.long
def test_a_local_model_reaches_nothing_and_tokens_are_told_nowhere(place: Path) -> None:
    done = command(
        place, "attack", "--model", "model", "--harmful", "harmful.jsonl", "--harmless", "harmless.jsonl",
        "--n-instructions", "1", "--steps", "2", "--search-width", "4", "--topk", "8", "--suffix-tokens", "4",
        "--n-controls", "1", "--refusal-tokens", json.dumps(list(range(0, 700, 2))), "--out", "run",
    )  # fmt: skip
    assert done.returncode == 0 and (place / "run" / "suffixes.jsonl").exists(), done.stderr
    assert not (place / "network.log").exists(), (place / "network.log").read_text()
    failed = command(place, "attack", "--model", "owner/none-such", "--out", "other")
    assert failed.returncode == 1 and "owner/none-such" in failed.stderr
    told = (place / "network.log").read_text()  # the watch works: a hub id is looked for there, and nowhere else
    assert {line for line in told.splitlines() if "huggingface.co" not in line} == set()
    for text in (done.stdout, done.stderr, failed.stdout, failed.stderr, command(place, "env").stdout):
        assert SECRET not in text
    written = [path for path in place.rglob("*") if path.is_file()]
    assert len(written) > 8 and not [path for path in written if SECRET.encode() in path.read_bytes()]
