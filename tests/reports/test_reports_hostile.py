"""Suffixes and replies are hostile text: none of it may come alive in the page."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports import build
from reports.data import RunData, read_run
from reports.escape import json_bytes, lean, script_for_html, token_text, visible
from reports.schema import Check, Pattern, Prompt, Suffix, Summary
from suffix_analysis.console import shown
from tests.fake_run import HOSTILE, make_fake_run


class Markup(HTMLParser):
    """Collects what a browser would see as live: tags, event handlers, script texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def parsed(page: str) -> Markup:
    found = Markup()
    found.feed(page)
    return found


def page_of(data: RunData) -> str:
    """Return the page without the libraries' scripts, which are large and the same every time."""
    text = build.render(data).decode("utf-8")
    return re.sub(r'(<script data-name="\w+">).*?(</script>)', r"\1\2", text, flags=re.DOTALL)


def test_hostile_folders_make_no_live_markup(tmp_path: Path) -> None:
    data = read_run(make_fake_run(tmp_path / "run", hostile=True, n_prompts=20))
    found = parsed(page_of(data))
    assert found.handlers == []
    assert found.tags["script"] == 4 and "img" not in found.tags


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(), max_size=60) | st.sampled_from(HOSTILE), st.sampled_from(HOSTILE))
def test_generated_text_never_becomes_markup(text: str, second: str) -> None:
    data = _small(text + second)
    page = page_of(data)
    found = parsed(page)
    assert found.handlers == []
    assert found.tags["script"] == 4
    assert {"img", "iframe", "object", "embed", "form", "base"}.isdisjoint(found.tags)
    packed = page.split('id="payload">')[1].split("</script>")[0]
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", packed)
    json.loads(gzip.decompress(base64.b64decode(packed)))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)


def _small(text: str) -> RunData:
    reply = {
        "arm": text,
        "split": "report",
        "kind": text,
        "prompt_id": "a",
        "suffix_id": text,
        "refused": True,
        "verdict": text,
        "refusal_score": float("nan"),
        "reply": text,
    }
    rate = {"arm": text, "split": "report", "refusal_rate": 0.5, "refusal_lo": 0.4, "refusal_hi": 0.6}
    return RunData(
        name=text,
        config=text,
        summary=Summary(schema_version=1, model=text, n_layers=2, n_heads=2, d_model=8, target=text, skipped=[text]),
        prompts=(Prompt(id="a", kind="harmful", split="report", topic=text, text=text),),
        suffixes=(Suffix(id=text, arm="adversarial", text=text, n_tokens=3),),
        env={"git": text, "packages": {text: text}},
        tables={"replies": [reply], "refusal": [rate | {"n_prompts": 1, "n_suffixes": 1}]},
        patterns=(
            Pattern(prompt_id="a", arm=text, tokens=[text], regions=[text], heads=[(0, 0)], attention=[[[1.0]]]),
        ),
        checks=(Check(name=text, value=text, bound=text, passed=None, sentence=text),),
    )


@given(st.text(st.characters()))
def test_visible_text_is_valid_and_shows_everything(text: str) -> None:
    found = visible(text)
    found.encode("utf-8")
    assert visible(found) == found
    assert not re.search(r"[\x00-\x1f\x7f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]", found)
    assert bool(found) == bool(text)
    token_text(text).encode("utf-8")


def test_visible_examples() -> None:
    assert visible("a\x1b[0m\u202e\ud800\n") == "a⟨ESC⟩[0m⟨U+202E⟩⟨U+D800⟩↵"
    assert visible("a\n\tb", newlines=True) == "a\n\tb"
    assert token_text("  the") == "··the" and token_text("") == "∅"


@pytest.mark.parametrize("code", [0x3164, 0x115F, 0x2800, 0x034F, 0x17B4, 0xFE0F, 0xE0101, 0xFFA0, 0x180B])
def test_what_shows_nothing_is_spelled_out_wherever_it_stands(code: int) -> None:
    """Category says letter, mark or symbol; nothing is to be seen of them, and they can carry a message."""
    for show in (visible, shown):
        assert show(f"a{chr(code) * 7}b") == f"a{f'⟨U+{code:04X}⟩' * 7}b"


def test_marks_that_are_cut_are_counted() -> None:
    assert visible("a" + "\u0301" * 9 + "b") == "a" + "\u0301" * 4 + "⟨5 more marks⟩b"


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(st.characters()), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_json_round_trips_and_cannot_leave_its_element(value: Any) -> None:
    text = json_bytes(value)
    assert text.isascii()
    assert json.loads(text) == json.loads(json.dumps(value))
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", build.packed({"x": value}))


def test_lean_rounds_and_drops_what_json_lacks() -> None:
    assert lean({"a": [1.23456, float("nan"), float("inf"), 3.0, True, 12345678]}) == {
        "a": [1.235, None, None, 3, True, 12345678]
    }
    with pytest.raises(TypeError, match="not JSON-ready"):
        lean({1, 2})


def test_scripts_cannot_end_early() -> None:
    source = script_for_html('x = "</SCRIPT><!--";\r\n//# sourceMappingURL=x.map')
    assert source == 'x = "\\x3c/SCRIPT>\\x3c!--";\n'
    for _, text in build._scripts():
        assert "</script" not in text.lower() and "<!--" not in text and "\r" not in text


def test_the_policy_lets_only_our_scripts_run() -> None:
    page = build.render(_small("x")).decode("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    said = policy.group(1).replace("&#39;", "'")
    assert "default-src 'none'" in said and "connect-src 'none'" in said
    assert "unsafe-eval" not in said and "script-src 'sha256-" in said
    assert said.count("sha256-") == 3
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
