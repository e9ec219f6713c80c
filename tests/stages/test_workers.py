"""A pool of attacks under Ray: the same suffixes as one after the other, whatever happens to the workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from suffix_analysis.attacking import make_attack
from suffix_analysis.config import StudyConfig
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.models import load_model
from suffix_analysis.parallel import _reach, _require
from suffix_analysis.pool import pool_plans
from suffix_analysis.prompts import Prompt, load_prompts
from suffix_analysis.records import Suffix
from suffix_analysis.replies import Cell, reply_rows
from suffix_analysis.traces import trace
from suffix_analysis.workers import answer, attack_all, trace_all
from tests import tiny

pytestmark = pytest.mark.long

ray = pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
TOKENS = [40, 41]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    folder = tmp_path_factory.mktemp("model")
    tiny.hf_model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return StudyConfig(
        model=str(folder), n_attacks=3, steps=3, search_width=8, topk=16, suffix_tokens=4, n_instructions=2,
        executor="ray", score_dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def prompts() -> tuple[list[Prompt], list[Prompt]]:
    found = load_prompts("embedded", split="select", kind="harmful")
    return found[:2], found[2:6]


@pytest.fixture(scope="module")
def expected(
    config: StudyConfig, prompts: tuple[list[Prompt], list[Prompt]], tmp_path_factory: pytest.TempPathFactory
) -> list[Suffix]:
    folder, model = tmp_path_factory.mktemp("local"), load_model(config.model)
    return [make_attack(model, plan, TOKENS) for plan in pool_plans(folder, *prompts, config)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def same(found: list[Suffix], expected: list[Suffix]) -> None:
    assert [(s.text, s.seed, s.arm) for s in found] == [(s.text, s.seed, s.arm) for s in expected]
    assert [s.loss for s in found] == pytest.approx([s.loss for s in expected], rel=1e-4)


def test_side_by_side_gives_what_one_after_the_other_gives(
    config: StudyConfig, prompts: tuple[list[Prompt], list[Prompt]], expected: list[Suffix], tmp_path: Path
) -> None:
    done: list[int] = []
    same(attack_all(pool_plans(tmp_path, *prompts, config), TOKENS, config, done.append), expected)
    assert done == [1, 2, 3]
    assert (tmp_path / "steps.jsonl").exists() and (tmp_path / "attacks" / "3" / "suffix.jsonl").exists()
    # a finished attack never runs again: with one result gone, one task is left
    (tmp_path / "attacks" / "2" / "suffix.jsonl").unlink()
    done.clear()
    same(attack_all(pool_plans(tmp_path, *prompts, config), TOKENS, config, done.append), expected)
    assert done == [3]


def test_a_killed_workers_attack_runs_again(
    config: StudyConfig, prompts: tuple[list[Prompt], list[Prompt]], expected: list[Suffix], tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        for _ in range(400):
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("ray::attack") and not killed:
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one)
    thread.start()
    same(attack_all(pool_plans(tmp_path, *prompts, config), TOKENS, config, lambda done: None), expected)
    thread.join()
    assert killed, "no worker was caught at work"


def test_a_failing_attack_is_named_and_the_others_are_kept(
    config: StudyConfig, prompts: tuple[list[Prompt], list[Prompt]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"Attack \d of 3 failed: There is no model"):
        nowhere = replace(config, model="./no/where/at/all")
        attack_all(pool_plans(tmp_path, *prompts, config), TOKENS, nowhere, lambda done: None)


def test_replies_and_traces_are_those_of_one_process(
    config: StudyConfig, prompts: tuple[list[Prompt], list[Prompt]]
) -> None:
    model, some = load_model(config.model), prompts[1]
    suffix = Suffix(id="adversarial-1", arm="adversarial", text="x y z")
    cells: list[Cell] = [("none", None, some), ("adversarial", suffix, some)]
    for i, rows in answer(cells, TOKENS, 6, config):
        arm, own, _ = cells[i]
        for row, here in zip(rows, reply_rows(model, some, own, arm, TOKENS, 6), strict=True):
            assert row.pop("refusal_score") == pytest.approx(here.pop("refusal_score"), abs=1e-4)
            assert row == here
    zeros = torch.zeros(model.n_layers + 1, model.d_model)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    direction = Direction(vector, -1, 1, [], zeros, zeros, (5,), {})
    texts = ("", "x y z")
    found = dict(trace_all([(some, text) for text in texts], direction, config))
    assert sorted(found) == [0, 1]
    for i, traces in found.items():
        text = texts[i]
        here = trace(model, some, direction, suffix=text)
        assert [chat.text for chat in traces.chats] == [chat.text for chat in here.chats]
        torch.testing.assert_close(traces.contribution, here.contribution, atol=1e-5, rtol=1e-4)


def test_what_a_cluster_can_never_start_is_refused_at_once() -> None:
    """Ray itself waits for it without a word."""
    with pytest.raises(UserError, match=r"asks for 64 CPUs \(--attack-cpus\), and Ray has 2 in all"):
        _require({"CPU": 2.0}, StudyConfig(attack_cpus=64))
    with pytest.raises(UserError, match="asks for 1 GPUs"):
        _require({"CPU": 2.0}, StudyConfig(attack_gpus=1.0))
    _require({"CPU": 2.0, "GPU": 1.0}, StudyConfig(attack_cpus=2, attack_gpus=0.5))


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(OSError):
            _reach(address)
    _reach(None)
    _reach("auto")
