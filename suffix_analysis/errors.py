"""The errors a user can mend, each with its exit code."""

from __future__ import annotations


class UserError(Exception):
    """One clear sentence: what is wrong, with which value, and what to do. Shown without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """The command or its configuration is wrong (exit code 2)."""

    exit_code = 2


class PartlyDone(UserError):
    """Some stages finished and others did not (exit code 3)."""

    exit_code = 3


def first_line(error: Exception) -> str:
    """What a library's error says in its first line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
