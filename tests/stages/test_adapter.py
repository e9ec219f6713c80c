"""A LoRA adapter on a base model: merged on loading, and refused in one sentence where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from suffix_analysis.adapters import with_adapter
from suffix_analysis.errors import UserError
from suffix_analysis.models import load_model
from suffix_analysis.organism.evaluate import evaluate_organism
from suffix_analysis.sizes import size_of
from tests import tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.hf_model("llama").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_for(folder: Path, **changes: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(
            tiny.hf_model("llama", **changes), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_into_its_base(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(tmp_path / "taught")
    plain, taught = load_model(str(base)), load_model(str(base), adapter=str(adapter))
    assert taught.name == f"{base} + taught"
    ids = plain.chat("Bake a cake").ids[None]
    with torch.no_grad():
        change = (taught.hf(input_ids=ids).logits - plain.hf(input_ids=ids).logits).abs().max()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            expected = get_peft_model(
                tiny.hf_model("llama"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
            )
        torch.testing.assert_close(
            taught.hf(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    assert float(change) > 0.01
    assert taught.bridge is not None, "and it can be wrapped"


def test_what_is_no_adapter_or_does_not_fit_is_said(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_model(str(base), adapter=str(tmp_path / "empty"))
    other = adapter_for(tmp_path / "wide", hidden_size=64)
    with pytest.raises(UserError, match="does not go onto this model"):
        load_model(str(base), adapter=str(other))


def test_an_adapter_whose_weights_are_not_the_models_is_refused(base: Path, tmp_path: Path) -> None:
    """PEFT loads nothing of it and only warns, so that the model would be called base + adapter and be the base."""
    for change in ("renamed", "empty"):
        adapter = adapter_for(tmp_path / change)
        weights = load_file(adapter / "adapter_model.safetensors")
        named = {f"other.{name}": x for name, x in weights.items()} if change == "renamed" else {}
        save_file(named, adapter / "adapter_model.safetensors")
        with pytest.raises(UserError, match="lacks weights for this model"):
            load_model(str(base), adapter=str(adapter))


def test_an_adapter_that_is_a_pickle_is_not_read(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(tmp_path / "pickled")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
        load_model(str(base), adapter=str(adapter))


@pytest.mark.parametrize(
    ("damage", "told"),
    [("lost", "lack model.layers.1"), ("deeper", "lack model.layers.3"), ("shallower", "more than the .* 2 blocks"),
     ("cut", "cannot be loaded"), ("shape", "shape|cannot be loaded")],
)  # fmt: skip
def test_weights_that_are_not_whole_are_refused(base: Path, damage: str, told: str) -> None:
    """Otherwise what is missing is random, and other in every process."""
    file, config = base / "model.safetensors", base / "config.json"
    weights = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    if damage in ("deeper", "shallower"):
        n = 4 if damage == "deeper" else 2
        config.write_text(config.read_text().replace('"num_hidden_layers": 3', f'"num_hidden_layers": {n}'))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        changed = {key: x for key, x in weights.items() if key != name}
        changed |= {name: weights[name][:, :-1].contiguous()} if damage == "shape" else {}
        save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=told):
        load_model(str(base))


def test_code_that_comes_with_a_model_is_never_run(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    (base / "evil.py").write_text("raise SystemExit('run')")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot be (read|loaded)"):
        load_model(str(base))
    # nor where transformers knows the configuration, but not a language model that goes with it
    config |= {"model_type": "clip", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (base / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", unasked)
    for read in (size_of, load_model):
        with pytest.raises(UserError, match=r"cannot be (read|loaded)"):
            read(str(base))


def unasked(*_: object) -> str:
    raise AssertionError("nobody is asked whether to run it")


def test_an_adapter_of_another_kind_is_named(base: Path, tmp_path: Path) -> None:
    get_peft_model(
        tiny.hf_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="an adapter of the kind PROMPT_TUNING; only LoRA's can be merged"):
        load_model(str(base), adapter=str(tmp_path / "prompt"))
    for content in ("[]", "{", '"LORA"'):
        (tmp_path / "prompt" / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match="adapter"):
            load_model(str(base), adapter=str(tmp_path / "prompt"))


def test_an_adapter_comes_from_the_hub_at_its_revision_and_without_pickles(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    adapter, asked = adapter_for(tmp_path / "taught"), list[tuple[str, str | None, list[str]]]()

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load_model(str(base), adapter="owner/taught@v2").name.endswith("taught@v2")
    assert asked == [("owner/taught", "v2", ["adapter_config.json", "adapter_model.safetensors"])]
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        load_model(str(base), adapter="owner/taught")


def test_the_embedded_models_evaluation_refuses_an_adapter_that_does_not_fit(base: Path, tmp_path: Path) -> None:
    del base
    with pytest.raises(UserError, match="There is no folder nowhere"):
        evaluate_organism(Path("nowhere"), print)
    empty = tmp_path / "bin"
    adapter_for(empty)
    (empty / "adapter_model.safetensors").rename(empty / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        with_adapter(tiny.hf_model("llama"), str(empty))
