"""Numbers as words: percentages, decimals and intervals with the right blanks and signs."""

from __future__ import annotations

import math

NARROW = "\u202f"
"""Narrow no-break space, between a number and its unit."""
NBSP = "\u00a0"


def plain(value: float | None, digits: int = 2) -> str:
    """Return a decimal number with a true minus sign; a missing value is an en dash."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def percent(share: float | None) -> str:
    """Return a fraction (0–1) as a percentage: whole numbers, one decimal within a percent of either end."""
    return "–" if share is None else f"{_percent_number(share)}{NARROW}%"


def _percent_number(share: float) -> str:
    hundred = 100 * share
    near_end = 0.05 <= abs(hundred) < 1 or 99 < abs(hundred) <= 99.95
    return plain(hundred, 1 if near_end else 0)


def percent_ci(share: float | None, lo: float | None, hi: float | None) -> str:
    """Return ``41 % (CI 33–50 %)``, with ``to`` where a bound is negative; without bounds the percentage alone."""
    if lo is None or hi is None or share is None:
        return percent(share)
    dash = f"{NBSP}to{NBSP}" if lo < 0 else "–"
    return f"{percent(share)} (CI{NBSP}{_percent_number(lo)}{dash}{percent(hi)})"


def digits_of(value: float | None) -> int:
    """Return how many decimals show two significant digits, from 2 on."""
    return max(2, 1 - math.floor(math.log10(abs(value)))) if value else 2


def plain_ci(value: float | None, lo: float | None, hi: float | None, digits: int = 2) -> str:
    """Return ``0.31 (CI 0.25 to 0.37)``; without bounds the number alone."""
    if lo is None or hi is None or value is None:
        return plain(value, digits)
    return f"{plain(value, digits)} (CI{NBSP}{plain(lo, digits)}{NBSP}to{NBSP}{plain(hi, digits)})"


def seconds(value: float | None) -> str:
    """Return a duration given in seconds as seconds, minutes or hours."""
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f}{NARROW}s" if value < 10 else f"{value:.0f}{NARROW}s"
    if value < 7200:
        return f"{value / 60:.0f}{NARROW}min"
    return f"{value / 3600:.1f}{NARROW}h"


def count(number: int, one: str, many: str | None = None) -> str:
    """Return ``1 suffix`` or ``8 suffixes``, number and word kept on one line."""
    return f"{number}{NBSP}{one if number == 1 else (many or one + 's')}"
