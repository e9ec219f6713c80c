"""Likely mistakes in calls from Python: told in a sentence. In a process without the tests' type checks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from suffix_analysis.attacking import FILLERS, initial_suffix
from suffix_analysis.errors import UserError
from suffix_analysis.prompts import to_prompts
from suffix_analysis.records import to_suffixes
from tests import tiny

MISTAKES = {
    "load_model('embedded', dtype='bfloat16')": "UserError dtype is 'bfloat16'; give a torch.dtype",
    "load_model(7)": "UserError The model is 7; give 'embedded', a folder",
    "load_model(Path('no/such/model'))": "UserError There is no model 'no/such/model'",
    "attacks.GCGConfig(num_steps=2.5)": "AttackError num_steps is 2.5; it must be a whole number.",
    "attacks.GCGConfig(search_width='8')": "AttackError search_width is '8'; it must be a whole number.",
    "attacks.GCGConfig(topk=True)": "AttackError topk is True; it must be a whole number.",
    "attacks.run(m.hf, m.tokenizer, 'x', 'Sure', nanogcg.GCGConfig())": "AttackError The settings are a nanogcg",
    "trace(m, 'Sing', torch.ones(m.d_model))": "UserError The prompts are the text 'Sing'; give a list",
    "analyze(m, found, ['a cake', 'a song'], 'one two')": "UserError The suffixes are the text 'one two'; give a list",
    "analyze(m, found, 'a cake', ['one two'])": "UserError The prompts are the text 'a cake'; give a list",
    "enter(damped(m, [(16, 4)], 0.9))": "UserError There is no head (16, 4); ",
    "enter(damped(m, [(1, -1)], 0.9))": "UserError There is no head (1, -1); ",
}
BEGIN = """
from pathlib import Path
import torch, nanogcg, attacks
from suffix_analysis import Direction, analyze, load_model, trace
from suffix_analysis.defences import damped
from tests import tiny
m = tiny.model("llama")
means = torch.zeros(m.n_layers + 1, m.d_model)
found = Direction(torch.ones(m.d_model), -1, 1, [], means + 1, means, (5,), {})
def enter(context):
    with context: pass
"""


def test_likely_mistakes_are_told_in_a_sentence() -> None:
    code = BEGIN + "".join(
        f"try:\n    {call}\n    print('no error')\nexcept Exception as e:\n    print(type(e).__name__, e)\n"
        for call in MISTAKES
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(told) == len(MISTAKES), told
    for line, wanted in zip(told, MISTAKES.values(), strict=True):
        assert line.startswith(wanted), line


def test_one_text_is_no_list_of_texts() -> None:
    with pytest.raises(UserError, match=r"give a list, e.g. \[prompt\]"):
        to_prompts("Sing")
    with pytest.raises(UserError, match=r"give a list, e.g. \[suffix\]"):
        to_suffixes("!!")


def test_a_suffix_begins_with_as_many_tokens_as_asked_for_or_as_near_below() -> None:
    model = tiny.model("llama")
    told = []
    for n in (1, 4, 5):
        text, size = initial_suffix(model, n, "Sure")
        chat = model.chat("Sing", text)
        assert int(chat.regions["suffix"].sum()) == size <= n, "counted where it stands"
        assert set(text.split()) < {*FILLERS, "x"} and len(set(text.split())) == 1
        told.append(size)
    assert told[0] <= 1 and 3 <= told[1] <= 4 and 4 <= told[2] <= 5
