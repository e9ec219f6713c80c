"""The engine beside nanoGCG: the same trajectory in compatibility mode, and where the native mode differs."""

from __future__ import annotations

import copy
import random
from dataclasses import fields
from typing import Any

import nanogcg
import numpy as np
import pytest
import torch

import attacks
from attacks.candidates import compat_gradient, token_gradient
from attacks.nanogcg import compat_slot, run_nanogcg
from tests import tiny
from tests.small_attacks import INIT, SMALL, TALKS, plain_loss

SETTINGS = [
    {},
    {"n_replace": 2},
    {"use_mellowmax": True},
    {"buffer_size": 4},
    {"buffer_size": 4, "n_replace": 2},
    {"early_stop": True},
    {"filter_ids": False, "allow_non_ascii": True},
]


@pytest.fixture
def _quick_nanogcg(monkeypatch: pytest.MonkeyPatch) -> None:
    """nanogcg collects garbage after every batch: 0.2 s each time in a test process, and nothing else."""
    monkeypatch.setattr(nanogcg.gcg.gc, "collect", lambda: 0)


@pytest.mark.usefixtures("_quick_nanogcg")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        # every setting on one family and one setting on every family; the rest takes a minute
        pytest.param(family, changes, id=f"{family}-{changes}", marks=[] if few else [pytest.mark.slow])
        for family in (*tiny.FAMILIES, "gemma2", "gemma3_text")
        for changes in SETTINGS
        for few in [family == "llama" or changes == {"buffer_size": 4, "n_replace": 2}]
    ],
)
def test_compat_mode_repeats_nanogcg(family: str, changes: dict[str, Any]) -> None:
    model = tiny.hf_model(family)
    config = attacks.GCGConfig.nanogcg(**{**SMALL, "num_steps": 20, **changes})
    ours = attacks.run(model, tiny.tokenizer(), "Write a poem", "Sure, here", config)
    theirs = run_nanogcg(model, tiny.tokenizer(), "Write a poem", "Sure, here", config)
    assert ours.strings == theirs.strings
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-5)
    assert ours.best_string == theirs.best_string


FORMS: list[dict[str, Any]] = [
    {"format": "llama3", "tells": "the BOS text is cut from the template and put back by the tokenizer"},
    {"format": "gemma", "add_space_before_target": True, "tells": "another BOS, and a space before the target"},
    {"format": None, "optim_str_init": [INIT.replace("x", c) for c in "xqz!"], "buffer_size": 4, "tells": "a list"},
    {"format": None, "use_mellowmax": True, "mellowmax_alpha": 2.0, "batch_size": 5, "tells": "alpha, batches"},
    {"format": "bare", "tells": "a base model's tokenizer has no chat template"},
]


@pytest.mark.usefixtures("_quick_nanogcg")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["tells"])
def test_compat_mode_tokenises_and_begins_as_nanogcg(form: dict[str, Any]) -> None:
    changes = {key: value for key, value in form.items() if key not in ("format", "tells")}
    tok = copy.deepcopy(tiny.tokenizer(None if form["format"] == "bare" else form["format"]))
    if form["format"] == "bare":
        tok.chat_template = None
    model = tiny.hf_model("llama")
    config = attacks.GCGConfig.nanogcg(**{**SMALL, **changes})
    ours = attacks.run(model, tok, "Write a poem", "Sure, here", config)
    theirs = run_nanogcg(model, tok, "Write a poem", "Sure, here", config)
    assert ours.strings == theirs.strings
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-5)
    assert form["format"] != "bare" or tok.chat_template is None, "the caller's tokenizer stays as it was"
    attack = attacks.GCG(model, tok, "Write a poem", "Sure, here", config)
    assert len(attacks.self_test(attack).replies) == 1


@pytest.mark.usefixtures("_quick_nanogcg")
def test_compat_mode_stops_where_nanogcg_stops() -> None:
    """The target is what the model says after a suffix that a few steps find, so that the stop happens on the way."""
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    settings = {**SMALL, "num_steps": 20}
    target = None
    for step in attacks.run(model, tok, TALKS[1], "Sure", attacks.GCGConfig.nanogcg(**settings)).steps[3:]:
        slot = compat_slot(tok, TALKS[1], "Sure", step.string)
        whole = torch.cat([slot.before_ids, slot.suffix_ids, slot.after_ids])[None]
        with torch.no_grad():
            said = tok.decode(model(input_ids=whole).logits[0, -1].argmax())
        if said.strip() and len(tok(said, add_special_tokens=False).input_ids) == 1:
            target = said
            break
    assert target is not None
    config = attacks.GCGConfig.nanogcg(**settings, early_stop=True)
    ours = attacks.run(model, tok, TALKS[1], target, config)
    theirs = run_nanogcg(model, tok, TALKS[1], target, config)
    assert ours.losses == pytest.approx(theirs.losses, abs=2e-5) and ours.strings == theirs.strings
    assert len(theirs.losses) < 20 and ours.steps[-1].matched


def test_what_nanogcg_does_not_have_is_refused_in_its_mode() -> None:
    for name, value in (("merge", 8), ("progressive_goals", True), ("rescore", 4)):
        with pytest.raises(attacks.AttackError, match=f"nanoGCG has no {name}"):
            attacks.GCGConfig.nanogcg(**{name: value})
    with pytest.raises(attacks.AttackError, match="one conversation at a time"):
        run_nanogcg(tiny.hf_model("llama"), tiny.tokenizer(), TALKS, "Sure")


def test_nothing_global_is_left_behind() -> None:
    model, state = tiny.hf_model("llama"), torch.get_rng_state()
    attacks.run(model, tiny.tokenizer(), "Write a poem", "Sure", attacks.GCGConfig(**{**SMALL, "num_steps": 1}))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(p.grad is None for p in model.parameters())
    random.seed(5)
    word, numbers = random.Random(5), np.random.get_state()[1].tolist()
    run_nanogcg(model, tiny.tokenizer(), "Write a poem", "Sure", attacks.GCGConfig(**{**SMALL, "num_steps": 1}))
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers == np.random.get_state()[1].tolist()
    # the type checker draws from Python's generator too, so it stands somewhere later in the same stream
    assert random.getrandbits(32) in [word.getrandbits(32) for _ in range(10_000)]
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run_nanogcg(model, tiny.tokenizer(), "Write a poem", "Sure", attacks.GCGConfig(**{**SMALL, "num_steps": 1}))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nanogcgs_strings_stand_beside_other_losses_where_it_has_a_buffer() -> None:
    """It reports the buffer's best string with the loss of the step's own; here a step's string has the step's loss."""
    model, tok = tiny.hf_model("llama"), tiny.tokenizer()
    settings = {**SMALL, "num_steps": 12, "buffer_size": 4}
    theirs = attacks.run(model, tok, "Write a poem", "Sure", attacks.GCGConfig.nanogcg(**settings))
    slot = compat_slot(tok, "Write a poem", "Sure", INIT)
    assert max(abs(plain_loss(model, slot, torch.tensor(step.ids)) - step.loss) for step in theirs.steps) > 1e-3
    ours = attacks.run(model, tok, "Write a poem", "Sure", attacks.GCGConfig(**settings))
    for step in ours.steps:
        slot = attacks.build_slot(tok, "Write a poem", "Sure", step.string)
        assert slot.suffix_ids.tolist() == list(step.ids)
        assert plain_loss(model, slot, slot.suffix_ids) == pytest.approx(step.loss, abs=2e-5)


def test_nanogcgs_gradient_differs_where_the_embedding_layer_scales() -> None:
    model, config = tiny.hf_model("gemma3_text"), attacks.GCGConfig()
    slot = compat_slot(tiny.tokenizer(), "Write a poem", "Sure", INIT)
    native = token_gradient(model, [slot], [None], slot.suffix_ids, config)
    theirs = compat_gradient(model, slot, slot.suffix_ids, config)
    assert not torch.allclose(native, theirs, rtol=0.1)
    plain = tiny.hf_model("llama")
    torch.testing.assert_close(
        token_gradient(plain, [slot], [None], slot.suffix_ids, config),
        compat_gradient(plain, slot, slot.suffix_ids, config),
        atol=1e-5,
        rtol=1e-4,
    )


def test_nothing_that_nanogcg_lacks_is_on_in_compatibility_mode() -> None:
    extras = {f.name for f in fields(attacks.GCGConfig)} - {f.name for f in fields(nanogcg.GCGConfig)}
    plain = attacks.GCGConfig.nanogcg()
    off = {name: getattr(plain, name) for name in extras - {"score_dtype", "rescore", "compat"}}
    assert not any(off.values()), off


def test_compat_mode_stops_at_any_candidates_match(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.hf_model("llama")
    config = attacks.GCGConfig.nanogcg(**{**SMALL, "early_stop": True})
    attack = attacks.GCG(model, tiny.tokenizer(), "Write a poem", "Sure, here", config)
    first = next(attack.steps())
    assert not first.matched, "nothing has matched yet"
    attack.search.seen_match = True  # a candidate matched that another one beat
    assert [step.matched for step in attack.steps()] == [True]
