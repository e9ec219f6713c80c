"""Conversations: every token in one region, ids the template's own, the suffix where it stands."""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attacks.slot import build_slot
from suffix_analysis.chat import REGIONS, render_chat, survives_decoding
from suffix_analysis.errors import UserError
from suffix_analysis.templates import prepared, without_thinking
from tests import tiny

WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda t: t.strip() != "")


@settings(max_examples=150, deadline=None)
@example(instruction="0", suffix="", system="\ue000\ue001\ue000")  # what once marked the user's place
@given(instruction=WORDS, suffix=st.just("") | WORDS, system=st.none() | WORDS)
def test_regions_partition_and_ids_are_the_templates_own(instruction: str, suffix: str, system: str | None) -> None:
    tok = tiny.tokenizer()
    chat = render_chat(tok, instruction, suffix, system)
    total = torch.stack([chat.regions[name] for name in REGIONS]).sum(dim=0)
    assert bool((total == 1).all())
    turns = [{"role": "user", "content": instruction + (" " + suffix if suffix else "")}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    text = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat.ids.tolist() == tok(text, add_special_tokens=False).input_ids
    assert chat.text == text
    assert chat.n_chat >= 1 and bool(chat.regions["chat"][-1])
    assert bool(chat.regions["suffix"].any()) == bool(suffix)


def test_region_texts() -> None:
    tok = tiny.tokenizer()
    chat = render_chat(tok, "Write a poem", "x y z")
    text = {name: tok.decode(chat.ids[chat.regions[name]]) for name in REGIONS}
    assert text == {
        "bos": "",
        "system": "<|sys|>You are tiny.<|end|>\n<|user|>",
        "instruction": "Write a poem",
        "suffix": " x y z",
        "chat": "<|end|>\n<|reply|>\n",
    }
    assert [name for name, _ in __import__("itertools").groupby(chat.region_names)] == list(REGIONS[1:])


def test_a_bos_that_opens_every_turn_is_not_the_bos_region() -> None:
    tok = copy.deepcopy(tiny.tokenizer())
    tok.bos_token = "<|sys|>"
    assert int(render_chat(tok, "Hello").regions["bos"].sum()) == 1
    tok.bos_token = "<|end|>"
    assert int(render_chat(tok, "Hello").regions["bos"].sum()) == 0


def test_a_template_that_strips_is_followed() -> None:
    tok = copy.deepcopy(tiny.tokenizer())
    tok.chat_template = tok.chat_template.replace("m['content']", "m['content'] | trim")
    chat = render_chat(tok, "Write a poem ", "")
    assert tok.decode(chat.ids[chat.regions["instruction"]]) == "Write a poem"


def test_two_suffixes_share_the_instructions_ids() -> None:
    tok = tiny.tokenizer()
    bare, long = render_chat(tok, "Write a poem."), render_chat(tok, "Write a poem.", "x y")
    n = int((bare.regions["system"] | bare.regions["instruction"]).sum())
    assert bare.ids[:n].tolist() == long.ids[:n].tolist()
    assert survives_decoding(tok, long)


def test_bad_input_names_the_mend() -> None:
    tok = copy.deepcopy(tiny.tokenizer())
    with pytest.raises(UserError, match="instruction is empty"):
        render_chat(tok, "  ")
    tok.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render_chat(tok, "Hello")
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="2 times"):
        render_chat(tok, "Hello")


def test_a_template_that_can_think_is_told_not_to() -> None:
    """As the published templates of Qwen3 and SmolLM3 say it: with thinking off an empty block is opened and closed."""
    tok = copy.deepcopy(tiny.tokenizer())
    plain = tok.chat_template
    assert without_thinking(plain) == plain
    tok.chat_template = plain + (
        "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}"
    )
    assert render_chat(tok, "Sing").text.endswith("<|reply|>\n")
    tok.chat_template = without_thinking(tok.chat_template)
    assert render_chat(tok, "Sing").text.endswith("<|reply|>\n<think>\n\n</think>\n\n")
    assert build_slot(tok, "Sing {optim_str}", "Sure", "x").after_text.endswith("</think>\n\n")


def test_a_reasoning_block_that_is_always_opened_is_closed() -> None:
    """As the templates of R1's distilled models open it."""
    tok = copy.deepcopy(tiny.tokenizer())
    plain = tok.chat_template
    tok.chat_template = plain + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    assert render_chat(tok, "Sing").text.endswith("<|reply|>\n<think>\n")
    tok.chat_template = prepared(tok)
    assert render_chat(tok, "Sing").text.endswith("<|reply|>\n<think>\n\n</think>\n\n")
    tok.chat_template = plain + "{# <think> #}"
    assert prepared(tok) == tok.chat_template


def test_prompts_are_the_same_on_every_day() -> None:
    """As the templates of Llama 3.1 and Granite ask for the day."""
    tok = copy.deepcopy(tiny.tokenizer())
    plain = tok.chat_template
    tok.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        'Today: {{ date_string }}, {{ strftime_now("%B %d, %Y") }}. ' + plain
    )
    assert str(datetime.date.today().year) in render_chat(tok, "Sing").text
    tok.chat_template = prepared(tok)
    assert render_chat(tok, "Sing").text.startswith("Today: 26 Jul 2024, July 26, 2024. ")


def test_a_reply_prefix_is_part_of_the_template() -> None:
    """As the authors' template of Llama 2 has a space at its end."""
    tok = copy.deepcopy(tiny.tokenizer())
    tok.chat_template = prepared(tok, " \"I'")
    chat = render_chat(tok, "Sing")
    assert chat.text.endswith("<|reply|>\n \"I'") and bool(chat.regions["chat"][-1])
    assert build_slot(tok, "Sing {optim_str}", "Sure", "x").after_text.endswith(" \"I'")
    tok.chat_template = "{% for m in messages %}{{ m['content'] }} [/INST]{% endfor %}\n"  # Jinja drops this newline
    tok.chat_template = prepared(tok, " \N{WAVING HAND SIGN}")
    assert render_chat(tok, "Sing").text == "Sing [/INST] \N{WAVING HAND SIGN}"
    tok.chat_template = {"default": "", "tool": ""}
    with pytest.raises(UserError, match="several chat templates"):
        prepared(tok, " ")
