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

from suffix_analysis.attacking import build_attack, finished, make_attack, run_attack, steps_of
from suffix_analysis.config import StudyConfig
from suffix_analysis.directions import Direction
from suffix_analysis.errors import UserError
from suffix_analysis.models import load_model
from suffix_analysis.parallel import _reach, _require, side_by_side
from suffix_analysis.pool import pool_plans
from suffix_analysis.prompts import Prompt, load_prompts
from suffix_analysis.provenance import model_digests
from suffix_analysis.records import Suffix
from suffix_analysis.replies import Cell, reply_rows
from suffix_analysis.traces import trace
from suffix_analysis.workers import JOURNALS, answer, attack_all, attack_task, trace_all
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


def test_a_failing_attack_is_named(
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
    eight = [{"CPU": 8.0, "GPU": 1.0}] * 8
    with pytest.raises(UserError, match=r"asks for 64 CPUs \(--attack-cpus\).*at most 8 CPUs and 1 GPUs"):
        _require(eight, StudyConfig(attack_cpus=64))
    with pytest.raises(UserError, match=r"and 2 GPUs \(--attack-gpus\)"):
        _require(eight, StudyConfig(attack_gpus=2.0))
    with pytest.raises(UserError, match="which no machine"):
        _require([{"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}], StudyConfig(attack_cpus=4, attack_gpus=1.0))
    _require([{"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}], StudyConfig(attack_cpus=2, attack_gpus=0.5))


def test_tasks_get_what_they_ask_for(config: StudyConfig, tmp_path: Path) -> None:
    """Two processors asked for of two: one task at a time; one each: two."""
    for cpus, at_once in ((2, 1), (1, 2)):

        def task(config: StudyConfig, number: int, folder: Path, company: int) -> tuple[float, float, int]:
            began = time.monotonic()
            (folder / str(number)).touch()
            while len([*folder.iterdir()]) < company and time.monotonic() < began + 60:
                time.sleep(0.05)  # until the other one has begun, however long its worker takes to
            return began, time.monotonic(), torch.get_num_threads()

        def name(number: int) -> str:
            return f"Task {number}"

        some, folder = replace(config, attack_cpus=cpus), tmp_path / str(cpus)
        folder.mkdir()
        found = [own for _, own in side_by_side(task, [(i, folder, at_once) for i in range(4)], some, name)]
        most = max(sum(a <= began < b for a, b, _ in found) for began, _, _ in found)
        assert most == at_once and {threads for _, _, threads in found} == {cpus}


def test_after_a_failure_what_is_under_way_is_kept_and_nothing_more_begins(config: StudyConfig) -> None:
    def task(config: StudyConfig, number: int) -> int:
        if number == 0:
            raise UserError("it cannot be done")
        time.sleep(1)
        return number

    found: list[int] = []
    with pytest.raises(UserError, match="Task 0 failed: it cannot be done"):
        for _, number in side_by_side(task, [(i,) for i in range(3)], config, lambda i: f"Task {i}"):
            found.append(number)
    assert sorted(found) == [1, 2]


def test_an_unfinished_attack_goes_on_and_another_model_is_refused(
    config: StudyConfig, prompts: tuple[list[Prompt], list[Prompt]], expected: list[Suffix], tmp_path: Path
) -> None:
    model = load_model(config.model)
    (plan, *_) = plans = pool_plans(tmp_path, *prompts, config)
    attack, _ = build_attack(model, plan.train, plan.config)
    steps = run_attack(attack, model, plan, TOKENS)
    next(steps), next(steps)
    steps.close()
    seconds = [row["seconds"] for row in steps_of(plan)]
    same(attack_all(plans, TOKENS, config, lambda done: None, weights=model_digests(model)), expected)
    assert [row["seconds"] for row in steps_of(plan)][:2] == seconds, "the first two steps were not made again"
    # where a worker does not see the folder, it is sent what there is
    elsewhere = replace(plan, folder=tmp_path / "not" / "here")
    begun = {name: (tmp_path / name).read_bytes() for name in JOURNALS}
    suffix, rows = attack_task(config, elsewhere, TOKENS, begun)
    assert [row["seconds"] for row in rows] == [row["seconds"] for row in steps_of(plan)] and suffix == finished(plan)
    (tmp_path / "attacks" / "2" / "suffix.jsonl").unlink()
    with pytest.raises(UserError, match=r"Attack 2 of 3 failed: .* is another model than the run's: model.norm"):
        attack_all(plans, TOKENS, config, lambda done: None, weights=model_digests(model) | {"model.norm.weight": "0"})


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(OSError):
            _reach(address)
    _reach(None)
    _reach("auto")
