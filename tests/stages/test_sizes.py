"""Memory estimates from a configuration alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from suffix_analysis.batching import REPLY_BUDGET
from suffix_analysis.cli import app
from suffix_analysis.config import StudyConfig
from suffix_analysis.errors import UserError
from suffix_analysis.inputs import fast_dtype
from suffix_analysis.models import load_model
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
    large = replace(large, free_gpu=80.0, free_gpus=80.0, free_disk=1000.0, needed_four_bit=30.0)
    told = "It does not fit as it is: in bfloat16 it needs about 90.0 GiB, and 80.0 GiB of GPU memory are free; "
    assert verdict(large) == told + "with --four-bit it needs about 30.0."
    large = replace(large, needed_four_bit=85.0)
    assert verdict(large) == told + "--device auto spreads it over 180.0 GiB of GPU memory and memory."
    assert verdict(replace(large, free_ram=5.0)) == told + "--device auto puts what is left on disk, which is slow."
    assert verdict(replace(large, free_ram=5.0, free_disk=1.0)).endswith("take a smaller model or a larger machine.")


def test_a_copy_that_has_no_place_in_memory_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    monkeypatch.setattr("suffix_analysis.inputs.resolve_dtype", lambda *_: torch.bfloat16)
    needed = 2 * sum(p.numel() for p in model.hf.parameters())
    for free, wanted in ((needed + 1, torch.bfloat16), (needed - 1, torch.float32)):
        monkeypatch.setattr("suffix_analysis.inputs.free_bytes", lambda device, free=free: free)
        assert fast_dtype(StudyConfig(), model) == wanted
    assert fast_dtype(StudyConfig(score_dtype="bfloat16"), model) == torch.bfloat16, "as it was asked for"
    model.twin(torch.bfloat16)
    assert fast_dtype(StudyConfig(), model) == torch.bfloat16, "which is there already"


def test_a_configuration_without_weights_is_enough(tmp_path: Path) -> None:
    tiny.hf_model("llama").config.save_pretrained(tmp_path)
    assert size_of(str(tmp_path)).n_parameters == sum(p.numel() for p in tiny.hf_model("llama").parameters())


def test_four_bits_leave_embedding_and_head_and_a_study_holds_its_largest_batch(tmp_path: Path) -> None:
    hf = tiny.hf_model("llama", tie_word_embeddings=False)
    hf.save_pretrained(tmp_path)
    size, config = size_of(str(tmp_path)), hf.config
    outer = 2 * config.vocab_size * config.hidden_size
    assert size.four_bit * GIB == pytest.approx(2 * outer + 0.5625 * (size.n_parameters - outer))
    keys = 2 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert (size.needed_bfloat16 - size.bfloat16 - 2) * GIB >= REPLY_BUDGET * keys


def test_what_is_larger_than_all_memories_and_the_disk_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.hf_model("llama").save_pretrained(tmp_path)
    size = replace(size_of(str(tmp_path)), free_ram=0.0, free_disk=0.0)
    monkeypatch.setattr("suffix_analysis.sizes.size_of", lambda name: size)
    with pytest.raises(UserError, match="GPU memory, memory and disk together"):
        load_model(str(tmp_path), device="auto")


def test_the_command_prints_the_table_or_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.hf_model("llama").save_pretrained(tmp_path)
    app(["models", str(tmp_path)], result_action="return_value")
    assert "It fits in float32" in capsys.readouterr().out
    app(["models"], result_action="return_value")
    assert "| Gemma 2 it |" in capsys.readouterr().out


def test_a_model_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="no model 'nothing'"):
        size_of("nothing")


@pytest.mark.parametrize(
    ("stored", "bits"),
    [({"quant_method": "gptq", "bits": 4}, 4), ({"quant_method": "fp8"}, 8), ({"load_in_4bit": True}, 4)],
)
def test_weights_that_are_quantised_in_their_files_count_as_they_are(
    tmp_path: Path, stored: dict[str, object], bits: int
) -> None:
    config = tiny.hf_model("llama").config
    config.quantization_config = stored
    config.save_pretrained(tmp_path)
    size = size_of(str(tmp_path))
    outer = config.vocab_size * config.hidden_size
    assert size.float32 == size.bfloat16 == size.four_bit
    assert size.bfloat16 * GIB == pytest.approx(2 * outer + (bits / 8 + 0.0625) * (size.n_parameters - outer))
    assert size.needed_float32 == size.needed_bfloat16
