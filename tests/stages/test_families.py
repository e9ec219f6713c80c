"""Every model family's architecture with its real chat format, tiny and random, through the whole line."""

from __future__ import annotations

import contextlib
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import attacks
from suffix_analysis import models
from suffix_analysis.analysis import analyze
from suffix_analysis.chat import REGIONS
from suffix_analysis.directions import DirectionConfig, find_direction
from suffix_analysis.errors import UserError
from suffix_analysis.families import FAMILIES, Family, support_table
from suffix_analysis.generate import generate
from suffix_analysis.identities import check_identities, first_blocks, require_identities
from suffix_analysis.interventions import ablate, add, set_projection
from suffix_analysis.models import Model, load_model
from suffix_analysis.orthogonalise import NotAvailable, orthogonalised
from suffix_analysis.paper_table import measure_cost, measure_interventions
from suffix_analysis.prompts import Prompt, load_prompts
from suffix_analysis.traces import trace
from tests import tiny

FORMATS = {
    "Yi Chat": "chatml", "Gemma it": "gemma", "Llama 2 Chat": "llama2", "Llama 3 Instruct": "llama3",
    "Llama 3.1 Instruct": "llama3.1", "Qwen1.5, Qwen2.5": "qwen2.5", "Qwen3": "qwen3", "Gemma 2 it": "gemma",
    "Gemma 3 it": "gemma3", "Mistral Instruct": "mistral", "Phi-3": "phi3", "Phi-4": "phi4", "Phi-4 mini": "phi4-mini",
    "OLMo 2 Instruct": "olmo2", "OLMo 3 Instruct": "chatml", "SmolLM2 Instruct": "smollm2", "SmolLM3": "smollm3",
    "Granite Instruct": "granite",
}  # fmt: skip
WINDOW = {"sliding_window": 8}
MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
# what the tiny random models have in common with the real ones, beside the architecture: every kind of block is there,
# and windows are shorter than the prompts
CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"tie_word_embeddings": False} for name in ("Llama 2 Chat", "Phi-3", "Phi-4")},
    "Mistral Instruct": {"tie_word_embeddings": False, **WINDOW},
    "Gemma 2 it": WINDOW,
    "Gemma 3 it": {"num_hidden_layers": 4, "layer_types": MIXED, **WINDOW},
    "OLMo 3 Instruct": {"num_hidden_layers": 4, "layer_types": MIXED, **WINDOW},
    "SmolLM3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "Phi-4 mini": {"partial_rotary_factor": 0.75},
    "Granite Instruct": {
        "residual_multiplier": 0.4, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 2.0,
    },
}  # fmt: skip
CASES = {family.name: family for family in FAMILIES if family.verified}
# random models do not refuse, so no filter may apply
ANY = DirectionConfig(n_fit=10, n_select=4, kl_threshold=math.inf, induce_threshold=-math.inf, keep_by_score=False)
SUFFIX = "x y z"


# the whole line takes seconds a family; in `make test` one without norms behind its blocks, and two with them
FEW = ("Llama 2 Chat", "Gemma 2 it", "OLMo 2 Instruct")


@pytest.fixture(
    params=[pytest.param(name, marks=[] if name in FEW else [pytest.mark.long]) for name in CASES], ids=list(CASES)
)
def line_case(request: pytest.FixtureRequest) -> Family:
    """One family after the other."""
    return CASES[request.param]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Family:
    """One family after the other."""
    return CASES[request.param]


def make(case: Family, dtype: torch.dtype = torch.float32) -> Model:
    changes = CHANGES.get(case.name, {})
    model = tiny.model(case.architecture, dtype=dtype, format_name=FORMATS[case.name], **changes)
    tiny.shake(model.hf)
    return model


def some(kind: str, n: int) -> list[Prompt]:
    return load_prompts("embedded", split="fit", kind=kind)[:n]


def test_the_format_renders_into_regions(case: Family) -> None:
    model = make(case)
    chat = model.chat("Pick a lock", SUFFIX)
    assert torch.stack([chat.regions[name] for name in REGIONS]).sum(dim=0).eq(1).all()
    assert "Pick a lock" in model.tokenizer.decode(chat.ids[chat.regions["instruction"]])
    assert SUFFIX in model.tokenizer.decode(chat.ids[chat.regions["suffix"]])
    assert bool(chat.regions["chat"][-1])
    assert chat.text == model.tokenizer.decode(chat.ids)


def test_the_whole_line(line_case: Family) -> None:
    case = line_case
    model = make(case)
    config = attacks.GCGConfig(num_steps=2, search_width=8, topk=32, optim_str_init=SUFFIX + " x", seed=0)
    suffix = attacks.run(model.hf, model.tokenizer, ["Pick a lock {optim_str}"], "Sure", config).best_string
    harmful, harmless = some("harmful", 14), some("harmless", 14)
    plain = generate(model.hf, model.tokenizer, [model.chat("Sing").ids], 4)
    direction = find_direction(model, harmful, harmless, ANY, refusal_tokens=[40, 41])
    assert generate(model.hf, model.tokenizer, [model.chat("Sing").ids], 4) == plain
    report = [
        Prompt(p.id, p.text, p.kind, "select" if i < 4 else "report")
        for prompts in (harmful[:8], harmless[:8])
        for i, p in enumerate(prompts)
    ]
    table, _ = measure_interventions(model, direction, report, 3)
    available = {row["intervention"]: row["note"] is None for row in table}
    assert available.pop("orthogonalised") is case.orthogonalises and all(available.values())
    (cost,) = measure_cost(model, direction, report)
    assert math.isfinite(cost["change"]) and cost["none"] > 0
    found = analyze(model, direction, report, [suffix])
    passed = {check["name"]: check["passed"] for check in found.checks}
    assert passed.pop("several suffixes per arm") is False  # one adversarial suffix is descriptive
    assert passed and all(passed.values())
    assert set(found.frame("profile")["arm"]) >= {"none", "adversarial", "harmless"}


def test_the_check_at_load_finds_nothing_wrong(case: Family) -> None:
    found = check_identities(make(case))
    assert len(found) == 8
    assert all(identity.holds for identity in found), found


@pytest.mark.parametrize("name", ["SmolLM3", "Gemma 3 it", "OLMo 3 Instruct", "Gemma 2 it", "Qwen1.5, Qwen2.5"])
def test_what_differs_in_a_family_is_in_its_tiny_model(name: str) -> None:
    hf = make(CASES[name]).hf
    if name == "SmolLM3":
        assert sorted({layer.self_attn.use_rope for layer in hf.model.layers}) == [0, 1]
    elif name.startswith("Qwen"):
        assert float(hf.model.layers[0].self_attn.q_proj.bias.detach().abs().min()) > 0
    else:
        assert {"sliding_attention", "full_attention"} == set(hf.config.layer_types) and hf.config.sliding_window == 8


def test_identities_in_float64(case: Family) -> None:
    """To rounding, so that no term of a block's mathematics can be missing (METHODS §2)."""
    model = make(case, torch.float64)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = model.chat("Pick a lock", SUFFIX).ids[None]
    states: list[torch.Tensor] = []
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.n_layers)]
    names.append(f"blocks.{model.n_layers - 1}.hook_resid_post")
    hooks = [(name, lambda x, hook: states.append(x)) for name in names]
    with torch.no_grad(), ablate(model, vector):
        with model.bridge.hooks(fwd_hooks=hooks):
            wanted = model.hf(input_ids=ids).logits
        assert len(states) == model.n_layers + 1
        for x in states:
            assert float((x @ (vector / vector.norm())).abs().max()) < 1e-12 * float(x.norm(dim=-1).max())
    if case.orthogonalises:
        with torch.no_grad(), orthogonalised(model, vector):
            torch.testing.assert_close(model.hf(input_ids=ids).logits, wanted, atol=1e-8, rtol=1e-8)


def test_identities(case: Family) -> None:
    model = make(case)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    unit = vector / vector.norm()
    traces = trace(model, ["Pick a lock", "Sing"], vector, suffix=SUFFIX)
    assert traces.identity < 1e-5 and traces.closure < 1e-5
    inputs: list[torch.Tensor] = []
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.n_layers)]
    ids = model.chat("Pick a lock").ids[None]
    with torch.no_grad():
        plain = model.hf(input_ids=ids).logits
        hooks = [(name, lambda x, hook: inputs.append(x)) for name in names]
        with ablate(model, vector), model.bridge.hooks(fwd_hooks=hooks):
            wanted = model.hf(input_ids=ids).logits
        assert len(inputs) == model.n_layers
        for x in inputs:
            assert float((x @ unit).abs().max()) < 1e-5 * float(x.norm(dim=-1).max())
        if case.orthogonalises:
            with orthogonalised(model, vector):
                torch.testing.assert_close(model.hf(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(NotAvailable), orthogonalised(model, vector):
                pass
        assert torch.equal(model.hf(input_ids=ids).logits, plain)


def test_nothing_is_left_behind_by_an_exception(case: Family) -> None:
    model = make(case)
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    ids = model.chat("Pick a lock").ids[None]
    assert model.bridge is not None
    with torch.no_grad():
        plain = model.hf(input_ids=ids).logits
        level = torch.zeros(model.n_layers + 1)
        for context in (ablate(model, vector), add(model, vector, 1), set_projection(model, vector, level)):
            with pytest.raises(RuntimeError, match="on purpose"), context:
                assert not torch.equal(model.hf(input_ids=ids).logits, plain)
                raise RuntimeError("on purpose")
            assert torch.equal(model.hf(input_ids=ids).logits, plain)
        if case.orthogonalises:
            with pytest.raises(RuntimeError, match="on purpose"), orthogonalised(model, vector):
                raise RuntimeError("on purpose")
            assert torch.equal(model.hf(input_ids=ids).logits, plain)


def test_the_readme_shows_the_table() -> None:
    assert support_table() in Path("README.md").read_text("utf-8")


def test_an_architecture_that_is_not_in_the_table_is_checked_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr("suffix_analysis.identities.require_identities", lambda model: checked.append(model.name))
    for architecture in ("llama", "stablelm"):
        folder = tmp_path / architecture
        tiny.hf_model(architecture).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        load_model(str(folder))
    assert checked == [str(tmp_path / "stablelm")]
    # its text model is one that is known, and the whole is another
    real = models._load_hf

    def with_images(*args: Any) -> Any:
        hf, tok, source = real(*args)
        hf.config.model_type = "llama_with_images"
        monkeypatch.setattr(type(hf.config), "get_text_config", lambda self: SimpleNamespace(model_type="llama"))
        return hf, tok, source

    monkeypatch.setattr(models, "_load_hf", with_images)
    load_model(str(tmp_path / "llama"))
    assert checked[1:] == [str(tmp_path / "llama")]


@pytest.mark.parametrize("architecture", ["stablelm", "starcoder2", "mixtral", "cohere", "olmo", "falcon"])
def test_an_unknown_architecture_that_satisfies_the_identities_is_taken(architecture: str) -> None:
    model = tiny.model(architecture) if architecture != "falcon" else tiny.falcon()
    before = [model.hf(input_ids=torch.tensor([[5, 6, 7]])).logits, "bridge" in model.__dict__]
    require_identities(model)
    assert torch.equal(model.hf(input_ids=torch.tensor([[5, 6, 7]])).logits, before[0])
    assert "bridge" not in model.__dict__, "only the copy of the first blocks may be wrapped"


def test_an_unknown_architecture_that_fails_an_identity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suffix_analysis.traces.multiplier", lambda model: 1.0)
    with pytest.raises(UserError, match=r"does not hold that head contributions add up .*granite"):
        require_identities(tiny.model("granite", residual_multiplier=0.4))


@pytest.mark.parametrize(
    ("architecture", "why"), [("mpt", "prompts in one batch behind"), ("bloom", "the blocks below are left out")]
)
def test_an_architecture_whose_positions_are_lost_in_batches_or_replays_is_refused(architecture: str, why: str) -> None:
    with pytest.raises(UserError, match=f"does not hold that .*{why}"):
        require_identities(tiny.model(architecture))


@pytest.mark.parametrize("wrong", ["multiplier", "ablate"])
def test_the_check_sees_through_bfloat16(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along one direction of a wide model bfloat16 rounds by as much as what is missing here."""
    model = tiny.model("granite", dtype=torch.bfloat16, residual_multiplier=0.4, hidden_size=1024)
    require_identities(model)
    if wrong == "multiplier":
        monkeypatch.setattr("suffix_analysis.traces.multiplier", lambda model: 1.0)
    else:
        monkeypatch.setattr("suffix_analysis.identities.ablate", lambda model, vector: contextlib.nullcontext())
    with pytest.raises(UserError, match=r"does not hold that"):
        require_identities(model)


def test_norms_behind_the_writes_leave_no_orthogonalised_weights_however_little_they_would_change() -> None:
    model = tiny.model("gemma2", dtype=torch.bfloat16, hidden_size=512)
    quiet = torch.zeros(512)
    quiet[7] = 1.0
    with torch.no_grad():
        model.hf.model.embed_tokens.weight[:, 7] = 0  # hardly anything is written along it
        for block in model.hf.model.layers:
            block.self_attn.o_proj.weight[7] *= 0.01
            block.mlp.down_proj.weight[7] *= 0.01
    with pytest.raises(NotAvailable, match="a norm stands between"), orthogonalised(model, quiet):
        pass


def test_an_architecture_that_the_bridge_does_not_know_is_refused_with_a_sentence() -> None:
    with pytest.raises(UserError, match=r"\(persimmon\) is not known here"):
        require_identities(tiny.model("persimmon"))


def test_a_model_that_takes_images_too_installs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens would run pip for torchvision."""
    ran: list[Any] = []
    monkeypatch.setattr(subprocess, "check_call", ran.append)
    config = CONFIG_MAPPING["gemma3"](
        text_config={**tiny.SIZES, "vocab_size": 700, "head_dim": 8}, image_token_index=699, boi_token_index=698,
        eoi_token_index=697,
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                       "image_size": 32, "patch_size": 16},
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = Model("gemma-3-4b", AutoModelForCausalLM.from_config(config).eval(), tiny.tokenizer())
    require_identities(model)
    assert model.bridge is not None and not ran


def test_weights_that_are_packed_are_random_in_the_copy_that_is_checked() -> None:
    model = tiny.model("stablelm")
    packed = model.hf.model.layers[0].mlp.down_proj
    packed.weight = torch.nn.Parameter(torch.zeros(packed.weight.numel() // 2, 1, dtype=torch.uint8), False)
    assert first_blocks(model).hf.model.layers[0].mlp.down_proj.weight.shape == (32, 48)


def test_the_check_looks_at_every_kind_of_block() -> None:
    """Gemma 2's second block attends to everything, Qwen 2's third here has other weights than the first two."""
    assert first_blocks(tiny.model("llama")).n_layers == 2
    odd = tiny.hf_model("qwen2", num_hidden_layers=4)
    odd.model.layers[2].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(32))
    assert first_blocks(Model("odd", odd, tiny.tokenizer(), None)).n_layers == 3
