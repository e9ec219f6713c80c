"""What reaches the terminal: hostile text is shown literally and cannot move, colour or reorder anything."""

from __future__ import annotations

import contextlib
import io
import re

from hypothesis import example, given
from hypothesis import strategies as st

from suffix_analysis.console import Console, shown, tell

# control characters, marks that reorder or hide, lone surrogates
LIVE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
TEXT = st.text(st.characters(categories=None), max_size=80)


@given(TEXT)
@example("\x1b[2J\x1b]0;title\x07 \u202egpj.exe \ud800 \r\x9b31m")
def test_lines_hold_no_character_that_acts(text: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        tell(text)
    assert not LIVE.search(out.getvalue())
    out.getvalue().encode("utf-8")
    assert out.getvalue().count("\n") == text.count("\n") + 1


@given(TEXT)
def test_plain_words_stay_as_they_are_and_nothing_is_lost(text: str) -> None:
    kept = "".join(c for c in text if c.isprintable())
    assert shown(kept) == kept
    assert len(shown(text)) >= len(text)


@given(TEXT)
def test_progress_away_from_a_terminal_is_as_safe(text: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        console = Console()
        console.stage(text, skipped=False)
        console.progress(1, 1, text)
        console.say(text)
    assert not LIVE.search(out.getvalue())
