"""The chat formats of model families as Jinja, written from their public descriptions."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Format:
    """A chat template with the tokens that stand for themselves in it. ``system``: whether it takes a system turn."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    system: bool = True


LOOP, END, REPLY = "{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}"


def _chatml(default: str | None, reply: str = "") -> Format:
    first = (
        ""
        if default is None
        else f"{{% if messages[0]['role'] != 'system' %}}<|im_start|>system\n{default}<|im_end|>\n{{% endif %}}"
    )
    turn = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    # thinking is on where nobody turns it off, as in the published templates
    quiet = f"{{% if enable_thinking is defined and not enable_thinking %}}{reply}{{% endif %}}" if reply else ""
    whole = first + LOOP + turn + END + REPLY + f"<|im_start|>assistant\n{quiet}" + "{% endif %}"
    return Format(whole, ("<|im_start|>", "<|im_end|>"), "<|im_end|>")


def _llama3(before: str, content: str) -> Format:
    """``before`` the turns, and what stands in each behind its header."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = LOOP + header.format("{{ m['role'] }}") + content + END
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    reply = REPLY + header.format("assistant") + "{% endif %}"
    return Format("<|begin_of_text|>" + before + turns + reply, special, "<|eot_id|>", "<|begin_of_text|>")


def _gemma(before: str, content: str, system: bool) -> Format:
    """``before`` the turns, and what stands in each."""
    role = "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    turns = LOOP + role + content + "<end_of_turn>\n" + END + REPLY + "<start_of_turn>model\n{% endif %}"
    special = ("<bos>", "<start_of_turn>", "<end_of_turn>")
    return Format("<bos>" + before + turns, special, "<end_of_turn>", "<bos>", system)


_NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
FORMATS = {
    "chatml": _chatml(None),
    "qwen2.5": _chatml("You are a helpful assistant."),
    "qwen3": _chatml(None, "<think>\n\n</think>\n\n"),
    # its BOS token opens every turn
    "smollm2": replace(
        _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), bos="<|im_start|>"
    ),
    "smollm3": _chatml("## Metadata\n\nReasoning Mode: /no_think", "<think>\n\n</think>\n"),
    "llama2": Format(
        LOOP + "{% if m['role'] == 'system' %}<s>[INST] <<SYS>>\n{{ m['content'] }}\n<</SYS>>\n\n"
        "{% elif m['role'] == 'user' %}"
        "{% if loop.first %}<s>[INST] {% elif messages[loop.index0 - 1]['role'] != 'system' %}<s>[INST] {% endif %}"
        "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}" + END,
        ("<s>", "</s>"),
        "</s>",
        "<s>",
    ),
    "llama3": _llama3("", "{{ m['content'] }}<|eot_id|>"),
    # from 3.1 on there is always a system turn, with two dates in it
    "llama3.1": _llama3(
        "<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
        "{% set messages = messages[1:] %}{% endif %}"
        "<|eot_id|>",
        "{{ m['content'] | trim }}<|eot_id|>",
    ),
    "gemma": _gemma(_NO_SYSTEM, "{{ m['content'] }}", system=False),
    # a system turn stands before the first user's words in the same turn, and turns are trimmed
    "gemma3": _gemma(
        "{% set first = '' %}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% endif %}",
        "{{ first if loop.first }}{{ m['content'] | trim }}",
        system=True,
    ),
    # of the 7B models; no system turn
    "mistral": Format(
        "<s>" + _NO_SYSTEM + LOOP + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}" + END,
        ("<s>", "</s>"),
        "</s>",
        "<s>",
        system=False,
    ),
    "phi3": Format(
        LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n" + END + REPLY + "<|assistant|>\n{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
    ),
    "phi4-mini": Format(
        LOOP + "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>" + END + REPLY + "<|assistant|>{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
    ),
    "phi4": Format(
        LOOP
        + "<|im_start|>{{ m['role'] }}<|im_sep|>{{ m['content'] }}<|im_end|>"
        + END
        + REPLY
        + "<|im_start|>assistant<|im_sep|>{% endif %}",
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "olmo2": Format(
        "<|endoftext|>"
        + LOOP
        + "<|{{ m['role'] }}|>\n{{ m['content'] }}{% if not loop.last %}\n{% endif %}"
        + END
        + REPLY
        + "{{ '\\n' }}<|assistant|>\n{% endif %}",  # a newline behind a tag would be trimmed
        ("<|endoftext|>",),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    # from 3.1 on there is always a system turn, with two dates in it
    "granite": Format(
        "{% if messages[0]['role'] != 'system' %}<|start_of_role|>system<|end_of_role|>"
        "Knowledge Cutoff Date: April 2024.\nToday's Date: November 27, 2026.\n"
        "You are Granite, developed by IBM.<|end_of_text|>\n{% endif %}"
        + LOOP
        + "<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>\n"
        + END
        + REPLY
        + "<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
    ),
}
