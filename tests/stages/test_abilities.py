"""lm-eval's tasks under interventions, on a small local task (extra ``eval``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")

from suffix_analysis.abilities import measure_abilities
from suffix_analysis.errors import UserError
from suffix_analysis.interventions import ablate
from tests import tiny

ITEMS = [
    ("Snow is", [" white", " hot"], 0), ("Fire is", [" cold", " hot"], 1), ("A week has seven", [" days", " moons"], 0),
    ("Two and two is", [" four", " nine", " six"], 0), ("The sky is", [" blue", " wooden"], 0),
]  # fmt: skip
TASK = """task: five_facts
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in ITEMS]
    (tmp_path / "items.jsonl").write_text("\n".join(rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "five_facts.yaml").write_text(TASK.format(file=tmp_path / "items.jsonl"))
    return tmp_path / "tasks"


def accuracy(model: object, tokenizer: object) -> list[float]:
    """By definition: the choice with the largest summed log-probability after the question."""
    right = []
    for question, choices, answer in ITEMS:
        scores = []
        for choice in choices:
            before = tokenizer(question, add_special_tokens=False).input_ids  # type: ignore[operator]
            whole = torch.tensor(tokenizer(question + choice, add_special_tokens=False).input_ids)  # type: ignore[operator]
            with torch.no_grad():
                logits = torch.log_softmax(model(input_ids=whole[None]).logits[0], dim=-1)  # type: ignore[operator]
            n = len(before)
            scores.append(float(logits[n - 1 : -1].gather(1, whole[n:, None]).sum()))
        right.append(float(scores.index(max(scores)) == answer))
    return right


def test_the_table_is_the_definition_under_every_intervention(folder: Path) -> None:
    model = tiny.model("llama")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3)) * 10
    rows = {row["intervention"]: row for row in measure_abilities(model, vector, ["five_facts"], folder=folder)}
    plain = accuracy(model.hf, model.tokenizer)
    with ablate(model, vector):
        changed = accuracy(model.hf, model.tokenizer)
    assert rows["none"]["value"] == pytest.approx(sum(plain) / 5) and rows["none"]["change"] is None
    for name in ("ablated", "orthogonalised"):
        assert rows[name]["value"] == pytest.approx(sum(changed) / 5)
        assert rows[name]["change"] == pytest.approx((sum(changed) - sum(plain)) / 5)
        assert rows[name]["lo"] <= rows[name]["change"] <= rows[name]["hi"]
    assert all(row["n"] == 5 and row["metric"] == "acc" for row in rows.values())


def test_a_model_that_cannot_be_orthogonalised_says_so(folder: Path) -> None:
    rows = measure_abilities(tiny.model("gemma2"), torch.ones(32), ["five_facts"], folder=folder, limit=2)
    last = rows[-1]
    assert last["intervention"] == "orthogonalised" and last["value"] is None and "not available" in last["note"]
    assert rows[0]["n"] == 2


def test_an_unknown_task_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match="no task 'six_facts'"):
        measure_abilities(tiny.model("llama"), torch.ones(32), ["six_facts"], folder=folder)


def test_a_group_has_its_tasks_questions_and_no_change_of_its_own(folder: Path) -> None:
    """As `mmlu` is one."""
    task = (folder / "five_facts.yaml").read_text()
    (folder / "more_facts.yaml").write_text(task.replace("task: five_facts", "task: more_facts"))
    (folder / "group.yaml").write_text(
        "group: facts\ntask: [five_facts, more_facts]\naggregate_metric_list:\n  - metric: acc\n    aggregation: mean\n"
        "    weight_by_size: true\n"
    )
    rows = measure_abilities(tiny.model("llama"), torch.ones(32), ["facts"], folder=folder, limit=3)
    group = [row for row in rows if row["task"] == "facts"]
    assert [row["n"] for row in group] == [6, 6, 6] and all(row["change"] is None for row in group)
    assert {row["task"] for row in rows} == {"facts", "five_facts", "more_facts"}
