"""Hostile text made harmless: visible control characters, JSON and scripts that cannot leave their element."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_CONTROL_NAMES = (
    "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US"
)
_CONTROLS = dict(enumerate(_CONTROL_NAMES.split()))
_MARKS_IN_A_ROW = 4
# what has a category of visible characters and shows nothing all the same (Unicode's Default_Ignorable_Code_Point, and
# the Braille blank): such characters can carry an attack
_BLANKS = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0x180B, 0x1810)}
_BLANKS |= {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}


def visible(text: str, *, newlines: bool = False) -> str:
    """Return the text with every invisible or reordering character spelled out.

    Control characters become ⟨ESC⟩ and the like, newline ↵, tab ⇥; format characters, lone surrogates, unassigned code
    points and what shows nothing become ⟨U+202E⟩ and the like; of long stacks of combining marks the number that is cut
    is told. With ``newlines`` true, newline and tab stay as they are. The result is valid UTF-8 whatever went in.
    """
    if text.isascii() and text.isprintable():  # nearly all of a page
        return text
    out: list[str] = []
    marks = 0
    for char in text:
        code = ord(char)
        category = unicodedata.category(char)
        marks = marks + 1 if category in ("Mn", "Me") and code not in _BLANKS else 0
        if marks > _MARKS_IN_A_ROW:
            if marks > _MARKS_IN_A_ROW + 1:
                out.pop()
            out.append(f"⟨{marks - _MARKS_IN_A_ROW} more marks⟩")
        elif newlines and char in "\n\t":
            out.append(char)
        elif code < 0x20:
            out.append({"\n": "↵", "\t": "⇥"}.get(char, f"⟨{_CONTROLS[code]}⟩"))
        elif category in _HIDDEN or code in _BLANKS:
            out.append(f"⟨U+{code:04X}⟩")
        else:
            out.append(char)
    return "".join(out)


def token_text(token: str) -> str:
    """Return a token as shown in strips and axes: blanks at its ends as ·, everything else as in ``visible``."""
    core = token.strip(" ")
    if not core:
        return "·" * len(token) or "∅"
    left = len(token) - len(token.lstrip(" "))
    right = len(token) - len(token.rstrip(" "))
    return "·" * left + visible(core) + "·" * right


def lean(value: Any, digits: int = 4) -> Any:
    """Return JSON-ready data with floats rounded to significant digits; NaN and infinities become null.

    Raises TypeError where a value has no form in JSON.
    """
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.{digits}g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    if isinstance(value, dict):
        return {str(key): lean(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [lean(item, digits) for item in value]
    raise TypeError(f"not JSON-ready: {type(value).__name__}")


def json_bytes(value: Any) -> bytes:
    """Return JSON as ASCII bytes: lone surrogates and line separators are escapes that parse to themselves."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def script_for_html(source: str) -> str:
    r"""Return JavaScript that cannot end its ``<script>`` element early.

    ``</script`` and ``<!--`` occur in working code only inside strings and patterns, where ``\x3c`` means the same.
    Line ends become LF, as the HTML parser makes them: the policy's hashes are over what the browser sees.
    Source-map comments go: a browser's developer tools would try to fetch them.
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    source = re.sub(r"<(?=/script|!--)", r"\\x3c", source, flags=re.IGNORECASE)
    return re.sub(r"^//[#@] sourceMappingURL=.*$", "", source, flags=re.MULTILINE).strip() + "\n"
