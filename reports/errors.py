"""The one error a reader of reports can meet."""


class ReportError(Exception):
    """A run folder cannot be turned into a report. The message is one sentence: what, where, and what to do."""


AGAIN = "delete it and repeat the stage that wrote it."
"""What to do about a damaged file of a run folder: a stage refuses files that are not as it wrote them."""
