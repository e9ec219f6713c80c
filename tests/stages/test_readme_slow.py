"""The README's Python lines run as they stand there, with a shorter attack."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(2400)
def test_the_readmes_python_runs() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    short = code.replace("num_steps=50, search_width=64", "num_steps=1, search_width=8")
    assert short != code
    names: dict[str, Any] = {}
    exec(compile(short, "README.md", "exec"), names)
    frame = names["findings"].frame("heads")
    assert {"adversarial", "none"} <= set(frame.arm) and set(frame.split) == {"select", "report"}
    assert names["direction"].position < 0 <= names["direction"].layer
