"""The one error a reader of reports can meet."""


class ReportError(Exception):
    """A run folder cannot be turned into a report. The message is one sentence: what, where, and what to do."""
