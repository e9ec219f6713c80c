"""The one error a reader of reports can meet."""


class ReportError(Exception):
    """A run folder cannot be turned into a report. The message is one sentence: what, where, and what to do."""


AGAIN = "delete it and repeat the stage that wrote it."
"""What to do about a damaged file of a run folder: a stage refuses files that are not as it wrote them."""

ONLY_ONCE = {
    "config.toml": "restore it; a folder without it is no run folder.",
    "steps.jsonl": "restore it, or delete it to do without.",
}
"""The same of files that no finished stage writes again."""


def again(where: object) -> str:
    """Return what to do about the damaged file that ``where`` names."""
    return next((advice for name, advice in ONLY_ONCE.items() if name in str(where)), AGAIN)
