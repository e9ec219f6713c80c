"""The README's Python lines run as they stand there, with a shorter attack and a quicker search for the direction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from suffix_analysis import DirectionConfig


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(2400)
def test_the_readmes_python_runs() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    short = code.replace("num_steps=50, search_width=64", "num_steps=1, search_width=8")
    assert short != code
    quick = short.replace("(model, harmful, harmless)", "(model, harmful[:80], harmless[:80], QUICK)")
    assert quick != short
    names: dict[str, Any] = {"QUICK": DirectionConfig(n_fit=64, n_select=16, score_excluded=False)}
    exec(compile(quick, "README.md", "exec"), names)
    frame = names["findings"].frame("heads")
    assert {"adversarial", "none"} <= set(frame.arm) and set(frame.split) == {"select", "report"}
    assert names["direction"].position < 0 <= names["direction"].layer
