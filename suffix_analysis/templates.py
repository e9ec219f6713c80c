"""Chat templates as the analysis needs them: the same text on every day, ending where the reply itself begins."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

from suffix_analysis.errors import UserError

TODAY = datetime.date(2024, 7, 26)
"""What templates that print the day are told: Llama 3.1's own default."""

_DAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def prepared(tokenizer: Any, reply_prefix: str = "") -> Any:
    """The tokenizer's chat template so that conversations do not change with the day and end where the reply begins.

    Args:
        tokenizer: what holds the template; it is not changed.
        reply_prefix: text after the template's own, as a part of it: what every reply of the model opens with.

    Raises:
        UserError: a prefix for a tokenizer without one template.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        if reply_prefix:
            raise UserError(
                "The tokenizer has several chat templates; a reply_prefix needs one (tokenizer.chat_template)."
            )
        return template
    template = closing_thought(tokenizer, without_thinking(on_one_day(template)))
    return _and_then(template, reply_prefix) if reply_prefix else template


def on_one_day(template: str) -> str:
    """The template with a fixed day where it asks for the present one.

    Otherwise the prompts of Llama 3.1 and Granite would be others tomorrow, and with them every trace and reply.
    """
    return _DAY.sub(lambda found: json.dumps(TODAY.strftime(found[2])), template)


def without_thinking(template: str) -> str:
    """The template so that it asks for the reply itself, where it can also ask for a reasoning block before it.

    Otherwise chat[-1] would stand before the reasoning, and no refusal could be read there (the paper's figures are
    those of models that answer at once). Templates that know no ``enable_thinking`` stay as they are.
    """
    return "{% set enable_thinking = false %}" + template if "enable_thinking" in template else template


def closing_thought(tokenizer: Any, template: str) -> str:
    """The template with an empty reasoning block where it always opens one, as those of R1's distilled models do."""
    if "<think>" not in template:
        return template
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # whoever renders a conversation says what is wrong with it
        return template
    return _and_then(template, "\n</think>\n\n") if text.rstrip().endswith("<think>") else template


def _and_then(template: str, text: str) -> str:
    """The template with a text after it, where a reply is asked for. Jinja drops a newline at the very end only."""
    said = json.dumps(text, ensure_ascii=False)
    return template.removesuffix("\n") + "{% if add_generation_prompt %}{{ " + said + " }}{% endif %}"
