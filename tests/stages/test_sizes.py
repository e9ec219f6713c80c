"""Memory estimates from a configuration alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from suffix_analysis.cli import app
from suffix_analysis.errors import UserError
from suffix_analysis.sizes import GIB, size_of, verdict
from tests import tiny


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}])
def test_parameters_are_counted_as_the_loaded_model_has_them(tmp_path: Path, changes: dict[str, bool]) -> None:
    hf = tiny.hf_model("qwen2", **changes)
    hf.save_pretrained(tmp_path)
    size = size_of(str(tmp_path))
    assert size.n_parameters == sum(p.numel() for p in hf.parameters())
    assert size.float32 == 4 * size.n_parameters / GIB and size.architecture == "qwen2"


def test_the_verdict_names_the_best_precision_that_fits(tmp_path: Path) -> None:
    tiny.hf_model("llama").save_pretrained(tmp_path)
    size = replace(size_of(str(tmp_path)), free_gpu=None, free_ram=100.0)
    assert "fits in float32" in verdict(size)
    large = replace(size, needed_float32=430.0, needed_bfloat16=90.0)
    assert "fits in bfloat16: about 90.0 GiB of 100.0 GiB" in verdict(large)
    assert verdict(replace(large, free_gpu=80.0)) == (
        "It does not fit: even in bfloat16 it needs about 90.0 GiB; 80.0 GiB of GPU memory are free."
    )


def test_the_command_prints_the_table_or_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.hf_model("llama").save_pretrained(tmp_path)
    app(["models", str(tmp_path)], result_action="return_value")
    assert "It fits in float32" in capsys.readouterr().out
    app(["models"], result_action="return_value")
    assert "| Gemma 2 it |" in capsys.readouterr().out


def test_a_model_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="no model 'nothing'"):
        size_of("nothing")
