"""The run folder: atomic, locked, resumable, and refusing what is not its own."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from suffix_analysis import files, provenance, runs, study
from suffix_analysis.config import StudyConfig
from suffix_analysis.console import Console
from suffix_analysis.errors import UsageError, UserError
from suffix_analysis.models import Model
from suffix_analysis.records import Suffix
from tests import tiny


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; free space"):
        files.replace_with(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": [math.nan, math.inf, 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, None, 1.5]}


def test_journal_survives_a_cut_off_line_but_not_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    for i in range(3):
        files.append_jsonl(path, {"i": i})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert [row["i"] for row in files.read_jsonl(path, journal=True)] == [0, 1]
    path.write_bytes(b'{"i": 0}\nnonsense\n{"i": 2}\n')
    with pytest.raises(UserError, match="line 2 is damaged"):
        files.read_jsonl(path, journal=True)


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with runs.open_run(tmp_path / "run", {"steps": 10, "suffixes": None}):
        pass
    finish(tmp_path / "run", "prompts")
    with runs.open_run(tmp_path / "run", {"steps": 10, "suffixes": None, "device": "cpu"}):
        pass
    assert runs.read_config(tmp_path / "run")["device"] == "cpu", "where it is worked on may change, and is kept"
    with pytest.raises(UsageError, match=r"steps = 10, not 20"), runs.open_run(tmp_path / "run", {"steps": 20}):
        pass
    with pytest.raises(UsageError, match=r"holds a study"), runs.open_run(tmp_path / "run", {"steps": 10, "vary": ()}):
        pass


def test_a_pool_may_grow_and_what_comes_after_its_attacks_is_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with runs.open_run(folder, {"n_attacks": 2, "steps": 10}):
        for stage in ("prompts", "attack", "replies", "direction"):
            finish(folder, stage)
    with runs.open_run(folder, {"n_attacks": 3, "steps": 10}):
        assert [*runs.status(folder)["stages"]] == ["prompts", "direction"]
    assert runs.read_config(folder)["n_attacks"] == 3 and (folder / "suffixes.jsonl").exists()
    assert not (folder / "findings" / "replies.parquet").exists()
    assert runs.is_done(folder, "direction")
    for other in ({"n_attacks": 2, "steps": 10}, {"n_attacks": 4, "steps": 20}):
        with pytest.raises(UsageError, match="was made with"), runs.open_run(folder, other):
            pass
    with runs.open_run(tmp_path / "alone", {"n_attacks": 1}):
        finish(tmp_path / "alone", "prompts")
    with pytest.raises(UsageError, match="n_attacks = 1, not 2"), runs.open_run(tmp_path / "alone", {"n_attacks": 2}):
        pass  # it may have stopped early


def test_a_first_mistake_can_be_mended(tmp_path: Path) -> None:
    for settings in ({"harmful": "nosuch.csv"}, {"harmful": "mine.csv"}):
        with runs.open_run(tmp_path / "run", settings):
            (tmp_path / "run" / "fast_dtype.json").touch()
    assert runs.read_config(tmp_path / "run") == {"harmful": "mine.csv"}


def finish(folder: Path, stage: str) -> None:
    """As if a stage had written its files."""
    for file in runs.FILES[stage]:
        files.write_atomic(folder / file, "x\n")
    runs.add_seconds(folder, stage, 1.0, "done")


def test_input_files_are_known_by_what_they_hold(tmp_path: Path) -> None:
    here, there = tmp_path / "a.csv", tmp_path / "b.csv"
    here.write_text("text\nSing\n")
    with runs.open_run(tmp_path / "run", {"harmful": str(here)}):
        provenance.remember(tmp_path / "run", provenance.input_digests({"harmful": str(here)}))
        finish(tmp_path / "run", "prompts")
    there.write_text(here.read_text())
    with runs.open_run(tmp_path / "run", {"harmful": str(there)}):  # the same file elsewhere
        pass
    there.write_text("text\nCry\n")
    with (
        pytest.raises(UserError, match=r"b.csv \(harmful\) is another file than when"),
        runs.open_run(tmp_path / "run", {"harmful": str(there)}),
    ):
        pass
    there.unlink()
    with runs.open_run(tmp_path / "run", {"harmful": str(there)}):  # its prompts are in the folder
        pass


def test_a_model_is_known_by_what_it_is(tmp_path: Path) -> None:
    def check(model: Model, begun: bool = True) -> None:
        provenance.require_same_model(tmp_path, model, begun)

    check(tiny.model("llama"), begun=False)
    check(tiny.model("llama"))  # wherever it comes from
    other = tiny.model("llama")
    with torch.no_grad():
        other.hf.model.layers[1].mlp.up_proj.weight += 1e-4
    with pytest.raises(UserError, match=r"tiny-llama is another model than when .*layers.1.mlp.up_proj.weight differs"):
        check(other)
    with pytest.raises(UserError, match="the tokenizer differs"):
        check(tiny.model("llama", format_name="chatml"))
    part = tiny.model("llama")  # as accelerate offloads: what is not in memory is not compared
    part.hf.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(48, 32, device="meta"))
    check(part)
    check(other, begun=False)  # nothing has been made yet
    check(other)


def test_another_name_for_the_model_is_kept_once_it_is_known_to_be_the_same(tmp_path: Path) -> None:
    with runs.open_run(tmp_path, {"model": "a", "steps": 3}):
        provenance.require_same_model(tmp_path, tiny.model("llama"), begun=False)
        finish(tmp_path, "prompts")
    with runs.open_run(tmp_path, {"model": "b", "steps": 3}):
        assert runs.read_config(tmp_path)["model"] == "a", "b has not been loaded"
        runs.keep_model(tmp_path, {"model": "b", "adapter": None})
    assert runs.read_config(tmp_path) == {"model": "b", "steps": 3}


def test_a_folder_that_has_begun_keeps_its_settings_whatever_is_deleted(tmp_path: Path) -> None:
    with runs.open_run(tmp_path, {"steps": 3}):
        finish(tmp_path, "prompts")
        finish(tmp_path, "attack")
    (tmp_path / "prompts.jsonl").unlink()
    with pytest.raises(UsageError, match="made with steps = 3, not 4"), runs.open_run(tmp_path, {"steps": 4}):
        pass


def test_a_second_process_changes_nothing(tmp_path: Path) -> None:
    with runs.open_run(tmp_path, {"steps": 3}):
        files.write_json(tmp_path / "fast_dtype.json", "float32")
        with pytest.raises(UserError, match="Another process"), runs.open_run(tmp_path, {"steps": 4}):
            pass
    assert (tmp_path / "fast_dtype.json").exists() and runs.read_config(tmp_path) == {"steps": 3}


def test_a_file_that_is_not_as_it_was_written_is_named(tmp_path: Path) -> None:
    runs.set_state(tmp_path, "running")
    finish(tmp_path, "attack")
    assert runs.is_done(tmp_path, "attack")
    (tmp_path / "suffixes.jsonl").write_text("x")
    with pytest.raises(UserError, match=r"suffixes.jsonl is not as the attack stage wrote it \(1 bytes, then 2\)"):
        runs.is_done(tmp_path, "attack")
    (tmp_path / "suffixes.jsonl").unlink()
    assert not runs.is_done(tmp_path, "attack")
    runs.begin(tmp_path, "attack")  # and killed before it ends
    (tmp_path / "suffixes.jsonl").write_text("longer than before\n")
    assert runs.is_done(tmp_path, "attack")


def test_settings_that_toml_cannot_hold_come_back_the_same(tmp_path: Path) -> None:
    settings = asdict(StudyConfig(refusal_tokens=(5, 7)))
    with runs.open_run(tmp_path / "r", settings):
        pass
    with runs.open_run(tmp_path / "r", settings):
        pass
    assert StudyConfig(**runs.read_config(tmp_path / "r")) == StudyConfig(refusal_tokens=(5, 7))
    with pytest.raises(UsageError, match="nowhere is no run folder"):
        runs.read_config(tmp_path / "nowhere")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="not a run folder"), runs.open_run(tmp_path, {"steps": 1}):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    with (
        runs.open_run(tmp_path / "run", {"steps": 1}),
        pytest.raises(UserError, match="Another process"),
        runs.open_run(tmp_path / "run", {"steps": 1}),
    ):
        pass


def test_another_schema_is_refused(tmp_path: Path) -> None:
    files.write_json(tmp_path / "status.json", {"schema_version": 99})
    with pytest.raises(UserError, match="schema_version 99"):
        runs.status(tmp_path)


def test_suffixes_round_trip(tmp_path: Path) -> None:
    suffixes = [Suffix("a-1", "adversarial", "</script> \x1b[31m \u202e", (1, 2), 2, ("p-1",), 0.5, 3)]
    runs.write_suffixes(tmp_path / "s.jsonl", suffixes)
    assert runs.read_suffixes(tmp_path / "s.jsonl") == suffixes


def test_stage_record_adds_up_seconds(tmp_path: Path) -> None:
    (tmp_path / "suffixes.jsonl").touch()
    runs.add_seconds(tmp_path, "attack", 1.0)
    assert not runs.is_done(tmp_path, "attack")
    runs.add_seconds(tmp_path, "attack", 2.0, "done")
    assert runs.status(tmp_path)["stages"]["attack"] == {"state": "done", "seconds": 3.0, "findings": []}
    assert runs.is_done(tmp_path, "attack") and not runs.is_done(tmp_path, "replies")


def test_only_a_folders_own_trouble_is_called_its_trouble(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(BrokenPipeError), runs.open_run(run, {}):
        raise BrokenPipeError
    with pytest.raises(UserError, match=r"^/elsewhere/x cannot be used: Permission denied\.$"), runs.open_run(run, {}):
        raise PermissionError(13, "Permission denied", "/elsewhere/x")
    with pytest.raises(UserError, match=r"run cannot be used: No space left.*--out"), runs.open_run(run, {}):
        raise OSError(28, "No space left on device")


def test_a_folder_that_is_older_than_a_setting_goes_on_with_its_default(tmp_path: Path) -> None:
    settings = asdict(StudyConfig())
    with runs.open_run(tmp_path / "r", settings):
        runs.begin(tmp_path / "r", "prompts")
        runs.add_seconds(tmp_path / "r", "prompts", 1.0, "done", [])
    config = tmp_path / "r" / "config.toml"
    config.write_text("".join(line for line in config.open() if not line.startswith(("keep_by_score", "rescore"))))
    other = settings | {"keep_by_score": False}
    with pytest.raises(UsageError, match="keep_by_score = True, not False"), runs.open_run(tmp_path / "r", other):
        pass
    with runs.open_run(tmp_path / "r", settings):
        assert "keep_by_score = true" in config.read_text()


def test_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    files.write_table(path, [{"a": 1, "b": None}, {"a": 2, "b": "x"}])
    assert files.read_table(path)[1] == {"a": 2, "b": "x"}
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"t\.parquet cannot be read"):
        files.read_table(path)


def test_a_finished_file_whose_last_line_is_cut_off_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "suffixes.jsonl"
    files.write_jsonl(path, [{"id": "a"}, {"id": "b"}])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="line 2 is damaged"):
        files.read_jsonl(path)
    assert files.read_jsonl(path, journal=True) == [{"id": "a"}]


def test_a_run_may_go_on_elsewhere(tmp_path: Path) -> None:
    with runs.open_run(tmp_path / "run", {"model": "m", "executor": "ray", "address": "10.0.0.1:1"}):
        pass
    with runs.open_run(tmp_path / "run", {"model": "m", "executor": "local"}):
        pass


def test_a_stage_is_not_done_without_its_files(tmp_path: Path) -> None:
    runs.add_seconds(tmp_path, "attack", 1.0, "done")
    assert not runs.is_done(tmp_path, "attack")
    (tmp_path / "suffixes.jsonl").write_text("")
    assert runs.is_done(tmp_path, "attack")


def test_what_a_stopped_start_leaves_is_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.toml.abc").touch()
    with runs.open_run(tmp_path, {"model": "m"}):
        pass


@pytest.mark.parametrize("content", ["[]", "5", '{"schema_version": 1}'])
def test_a_status_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    with pytest.raises(UserError, match=r"status\.json holds something else than this tool writes"):
        runs.is_done(tmp_path, "attack")


def test_a_stage_without_one_of_its_findings_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "findings").mkdir()
    before = runs.findings_now(tmp_path)
    files.write_table(tmp_path / "findings" / "sweep.parquet", [{"layer": 1}])
    now = runs.findings_now(tmp_path)
    assert [name for name in now if now[name] != before.get(name)] == ["sweep.parquet"]
    runs.add_seconds(tmp_path, "mechanism", 1.0, "done", ["sweep.parquet"])
    assert runs.is_done(tmp_path, "mechanism")
    files.write_table(tmp_path / "findings" / "sweep.parquet", [{"layer": 1}])
    assert runs.findings_now(tmp_path) != now, "the same rows written again are seen"
    (tmp_path / "findings" / "sweep.parquet").unlink()
    assert not runs.is_done(tmp_path, "mechanism")


def test_a_table_of_something_else_is_named(tmp_path: Path) -> None:
    files.write_table(tmp_path / "t.parquet", [{"a": 1}])
    with pytest.raises(UserError, match=r"t\.parquet has no column layer; delete it"):
        files.read_table(tmp_path / "t.parquet", ["a", "layer"])


def test_another_model_ends_the_run_and_is_not_a_mechanism_that_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(config: StudyConfig) -> Model:
        raise UserError("another model than when")

    monkeypatch.setattr(study, "study_model", other)
    runs.write_suffixes(tmp_path / "suffixes.jsonl", [Suffix("adversarial-1", "adversarial", "x y", ids=(1, 2))])
    files.write_jsonl(tmp_path / "prompts.jsonl", [])
    files.write_table(tmp_path / "findings" / "top_heads.parquet", [{"layer": 0, "head": 0}])
    run = study.Study(tmp_path, StudyConfig(), Console())
    with pytest.raises(UserError, match="another model"):
        run._mechanism()
    assert not (tmp_path / "skipped.json").exists()
