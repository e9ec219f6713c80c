"""The command line: exit codes, one sentence for a user's mistake, nothing heavy before it is needed."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from suffix_analysis import abilities, cli, runs
from suffix_analysis.cli.common import study_of_campaign
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.files import read_table
from suffix_analysis.study import Study


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command as the shell would and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["suffix-analysis", *words])
    try:
        cli.main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0


@pytest.mark.parametrize("words", [["--help"], ["demo", "--help"], ["organism", "--help"], ["--version"]])
def test_help_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert call(monkeypatch, *words) == 0
    assert capsys.readouterr().out.strip()


def test_help_and_import_never_load_torch() -> None:
    code = (
        "import sys, suffix_analysis\n"
        "from suffix_analysis.cli import app\n"
        "app(['demo', '--help'], exit_on_error=False, result_action='return_value')\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'torch was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


MISTAKES = [
    (["fly"], 2, "fly"),
    (["demo", "--steps", "many"], 2, "many"),
    (["demo", "--steps", "0"], 2, "steps is 0"),
    (["demo", "--score-dtype", "float8"], 2, "float8"),
    (["demo", "--no-such-flag"], 2, "no-such-flag"),
    (["run", "--config", "nowhere.toml"], 2, "nowhere.toml"),
    (["run", "--prompts-per-split", "0"], 2, "prompts_per_split is 0"),
    (["defend", "--most", "0"], 2, "--most is 0"),
    (["defend", "--adaptive-steps", "-1"], 2, "--adaptive-steps -1"),
    (["report", "nowhere"], 1, "nowhere"),
    (["run", "--n-controls", "1000000000000"], 2, "n_controls is 1000000000000; it must be at most"),
    (["run", "--out", "x" * 300], 1, "File name too long"),
    (["models", "x" * 300], 1, "File name too long"),
    (["run", "--device", "banana", "--out", "OUT"], 1, "There is no device 'banana' here; there are cpu and auto"),
    (["campaign", "--vary", "steps=" + 2000 * "["], 2, "write it as search_width"),
    (["abilities", "arc_easy", "--out", "nowhere"], 2, "nowhere is no run folder"),
    (["demo", "--dtype", "int8"], 2, "int8"),
    (["demo", "--layer-share", "1.5"], 2, "layer_share is 1.5"),
    (["demo", "--refusal-tokens", "-3"], 2, "-3"),
    (["run", "--harmful", "nowhere.csv"], 1, "nowhere.csv"),
    (["attack", "--steps", "3.7"], 2, "'3.7' is not a whole number"),
    (["attack", "--seed", "1e400"], 2, "'1e400' is not a whole number"),
    (["defend", "--most", "2.5"], 2, "'2.5' is not a whole number"),
    (["campaign", "--vary", "steps=5"], 2, "with all of its values"),
    (["run", "--model", "~nouser"], 1, "no model '~nouser'"),
    (["run", "--adapter", "~nouser"], 1, "~nouser"),
]


@pytest.mark.parametrize(("words", "code", "named"), MISTAKES, ids=[" ".join(w) for w, _, _ in MISTAKES])
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], code: int,
    named: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == code
    err = capsys.readouterr().err
    assert named in err
    assert "Traceback" not in err


@pytest.mark.parametrize("value", ["3.7", "true", '"a"', "[3]", "nan"])
def test_counts_in_a_file_are_whole_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, value: str
) -> None:
    (tmp_path / "c.toml").write_text(f"steps = {value}\n")
    assert call(monkeypatch, "run", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run")) == 2
    assert "steps" in capsys.readouterr().err


def test_a_campaigns_folder_is_no_studys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text('each = true\nvary = ["steps=[5, 6]"]\n')
    assert call(monkeypatch, "defend", str(tmp_path)) == 2
    assert "run --suffixes" in capsys.readouterr().err
    assert call(monkeypatch, "run", "--out", str(tmp_path)) == 2
    assert "holds a campaign; choose another folder" in capsys.readouterr().err


def test_the_command_behind_a_campaign_names_its_model_prompts_and_seed() -> None:
    settings = {"model": "my model", "harmful": "h.csv", "seed": 3, "steps": 9, "dtype": "float32", "vary": []}
    words = shlex.split(study_of_campaign(Path("runs/c"), settings))
    assert words[2:6] == ["--suffixes", "runs/c/suffixes.jsonl", "--out", "runs/c-study"]
    assert words[6:] == ["--model", "my model", "--harmful", "h.csv", "--seed", "3"]


def test_a_judge_that_only_the_folder_names_is_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, seen: list[StudyConfig]
) -> None:
    (tmp_path / "config.toml").write_text('judge = "os:getcwd"\n')
    for words in (["run", "--out"], ["defend"]):
        assert call(monkeypatch, *words, str(tmp_path)) == 2
        assert "names the judge 'os:getcwd', whose code would be run; say --judge" in capsys.readouterr().err
    assert call(monkeypatch, "run", "--out", str(tmp_path), "--judge", "os:getcwd") == 0
    assert call(monkeypatch, "run", "--config", str(tmp_path / "config.toml"), "--out", str(tmp_path)) == 0
    assert [config.judge for config in seen] == ["os:getcwd"] * 2


def test_a_cluster_that_only_the_folder_names_is_not_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, seen: list[StudyConfig]
) -> None:
    (tmp_path / "config.toml").write_text('executor = "ray"\naddress = "ray://elsewhere:10001"\n')
    assert call(monkeypatch, "run", "--out", str(tmp_path)) == 2
    assert "names the Ray cluster 'ray://elsewhere:10001'; say --address" in capsys.readouterr().err
    assert call(monkeypatch, "run", "--out", str(tmp_path), "--address", "ray://elsewhere:10001") == 0
    monkeypatch.setenv("SUFFIX_ANALYSIS_ADDRESS", "ray://elsewhere:10001")
    assert call(monkeypatch, "run", "--out", str(tmp_path)) == 0
    assert [config.address for config in seen] == ["ray://elsewhere:10001"] * 2


def test_what_other_tasks_have_found_stays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    values = iter([0.5, 0.25, 0.75])

    def measured(model: object, vector: object, tasks: list[str], **_: object) -> list[dict[str, Any]]:
        row = {"metric": "acc", "filter": "none", "n": 4, "stderr": None, "change": None, "lo": None, "hi": None}
        return [row | {"task": task, "intervention": "none", "value": next(values), "note": ""} for task in tasks]

    study = SimpleNamespace(fast=None, direction=lambda: SimpleNamespace(vector=None))
    monkeypatch.setattr(cli.findings, "held", lambda out, device: contextlib.nullcontext(study))
    monkeypatch.setattr(cli.findings, "renew_report", lambda out: None)
    monkeypatch.setattr(abilities, "measure_abilities", measured)
    (tmp_path / "findings").mkdir()
    for task in ("arc", "mmlu", "arc"):
        assert call(monkeypatch, "abilities", task, "--out", str(tmp_path)) == 0
    rows = read_table(tmp_path / "findings" / "abilities.parquet")
    assert [(row["task"], row["value"]) for row in rows] == [("mmlu", 0.25), ("arc", 0.75)]


def test_a_variable_that_is_no_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SUFFIX_ANALYSIS_STPS", "5")
    assert call(monkeypatch, "run") == 2
    assert "SUFFIX_ANALYSIS_STPS is no setting of run; is it SUFFIX_ANALYSIS_STEPS?" in capsys.readouterr().err


def test_other_commands_take_nothing_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SUFFIX_ANALYSIS_OUT", str(tmp_path))
    assert call(monkeypatch, "report", str(tmp_path / "nowhere")) == 1
    assert "nowhere" in capsys.readouterr().err


def test_analyze_needs_what_it_analyses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, seen: list[StudyConfig]
) -> None:
    assert call(monkeypatch, "analyze", "--out", str(tmp_path / "typo")) == 1
    assert "has no attack yet; run `suffix-analysis attack --out" in capsys.readouterr().err and not seen


def test_a_page_replaces_nothing_but_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("steps = 3\n")
    assert call(monkeypatch, "report", str(tmp_path), "--out", str(tmp_path / "config.toml")) == 1
    assert "config.toml is there and is no page" in capsys.readouterr().err
    assert (tmp_path / "config.toml").read_text() == "steps = 3\n"


def test_unknown_settings_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text("stepz = 3\n")
    assert call(monkeypatch, "run", "--config", str(tmp_path / "c.toml")) == 2
    assert "stepz" in capsys.readouterr().err


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[StudyConfig]:
    """The settings of the studies that commands would run; none runs."""
    found: list[StudyConfig] = []
    monkeypatch.setattr(Study, "run", lambda self, stages=None: found.append(self.config))
    monkeypatch.setattr(cli.stages, "finish", lambda study, as_json: None)
    return found


def test_flags_win_over_the_environment_over_the_file_over_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[StudyConfig]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text('steps = 7\nsearch_width = 7\ntopk = 7\nmodel = "here"\nrefusal_tokens = [40, 41]\n')
    monkeypatch.setenv("SUFFIX_ANALYSIS_SEARCH_WIDTH", "8")
    monkeypatch.setenv("SUFFIX_ANALYSIS_TOPK", "8")
    monkeypatch.setenv("SUFFIX_ANALYSIS_CACHE", "elsewhere")  # no setting of a study
    # a flag that repeats the default still wins
    assert call(monkeypatch, "run", "--config", str(file), "--topk", "256", "--out", str(tmp_path / "run")) == 0
    (config,) = seen
    assert (config.steps, config.search_width, config.topk, config.model) == (7, 8, 256, "here")
    assert config.refusal_tokens == (40, 41) and config.n_instructions == StudyConfig().n_instructions


def test_the_config_flag_has_a_variable_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SUFFIX_ANALYSIS_CONFIG", str(tmp_path / "none.toml"))
    assert call(monkeypatch, "run") == 2
    assert "none.toml cannot be read" in capsys.readouterr().err


def test_a_run_folder_of_another_version_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text("an_old_setting = 3\n")
    assert call(monkeypatch, "defend", str(tmp_path)) == 2
    assert "another version" in capsys.readouterr().err


def test_a_stage_command_takes_the_settings_of_the_folder_that_it_goes_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seen: list[StudyConfig]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/study", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.toml").write_text(f'model = "{folder}"\nsteps = 7\n')
    (tmp_path / "c.toml").write_text("steps = 9\n")
    monkeypatch.setattr(runs, "is_done", lambda folder, stage: True)
    assert call(monkeypatch, "analyze") == 0
    assert call(monkeypatch, "run", "--out=mine", "--steps", "8") == 0
    assert call(monkeypatch, "run", "--out", "mine", "--config", "c.toml") == 0
    assert call(monkeypatch, "run", "--out", "new") == 0
    monkeypatch.setenv("SUFFIX_ANALYSIS_OUT", "mine")
    assert call(monkeypatch, "run", "--steps", "6") == 0
    assert [(c.model, c.steps) for c in seen] == [
        ("runs/study", 7), ("mine", 8), ("embedded", 9), ("embedded", StudyConfig().steps), ("mine", 6)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept, the same command goes on from there"),
        (UserError("a \x1b[31mred\x1b[0m word"), 1, "red"),
    ],
)
def test_interrupts_and_errors(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fail(self: Study, stages: object = None) -> None:
        raise error

    monkeypatch.setattr(Study, "run", fail)
    assert call(monkeypatch, "demo", "--out", str(tmp_path / "run")) == code
    err = capsys.readouterr().err
    assert "\x1b" not in err and "Traceback" not in err and said in err


def test_too_little_memory_is_said_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(self: Study, stages: object = None) -> None:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Study, "run", fail)
    assert call(monkeypatch, "demo", "--out", str(tmp_path / "run")) == 1
    err = capsys.readouterr().err
    assert "not enough memory" in err and "--dtype bfloat16" in err and "report it" not in err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_model", "not a hub id"),
        ("EMPTY", "no \\*.safetensors weights"),
        ("FILE", "not a .gguf"),
    ],
)
def test_models_that_are_not_there(tmp_path: Path, name: str, expected: str) -> None:
    from suffix_analysis.models import load_model

    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").write_bytes(b"x")
    real = {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file.bin")}.get(name, name)
    with pytest.raises(UserError, match=expected):
        load_model(real)


def test_a_full_disk_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from suffix_analysis import runs

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.Path, "write_bytes", full)
    assert call(monkeypatch, "demo", "--out", str(tmp_path / "run")) == 1
    assert "No space left on device; free space" in capsys.readouterr().err


def test_an_output_folder_of_another_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert call(monkeypatch, "demo", "--out", str(tmp_path)) == 2
    assert "not a run folder" in capsys.readouterr().err
