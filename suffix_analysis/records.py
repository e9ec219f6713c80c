"""Records that cross a stage boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from suffix_analysis.errors import UserError

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION = 1
Arm = Literal["adversarial", "random", "shuffled", "failed", "benign"]
SUFFIX_ARMS: tuple[Arm, ...] = ("adversarial", "random", "shuffled", "failed", "benign")


@dataclass(frozen=True)
class Suffix:
    """A suffix and where it comes from. ``ids`` are its tokens after an instruction, the joining space included.

    ``trained_on`` is None where nobody said what it was trained on.
    """

    id: str
    arm: str
    text: str
    ids: tuple[int, ...] = ()
    n_tokens: int = 0
    trained_on: tuple[str, ...] | None = ()
    loss: float | None = None
    seed: int | None = None

    @property
    def number(self) -> int:
        """The number that the id ends in; 0 where it ends otherwise."""
        tail = self.id.rsplit("-", 1)[-1]
        return int(tail) if tail.isascii() and tail.isdigit() else 0


def by_text(suffixes: Sequence[Suffix]) -> list[list[int]]:
    """The numbers of an arm's suffixes that hold the same tokens in any order, together, in the order of their first.

    Permutations of one text are not independent draws of what shuffled suffixes do: statistics count texts.
    """
    groups: dict[Any, list[int]] = {}
    for number, suffix in enumerate(suffixes):
        groups.setdefault((suffix.arm, *sorted(suffix.ids or suffix.text)), []).append(number)
    return list(groups.values())


def of_each_text(suffixes: Sequence[Suffix]) -> list[Suffix]:
    """The first suffix of each text in each arm (see `by_text`)."""
    return [suffixes[numbers[0]] for numbers in by_text(suffixes)]


def to_suffixes(suffixes: Sequence[Suffix | str]) -> list[Suffix]:
    """Suffix records; plain strings become the adversarial arm.

    Raises:
        UserError: they are one string, which is no list of them.
    """
    if isinstance(suffixes, str):
        raise UserError(f"The suffixes are the text {suffixes[:40]!r}; give a list, e.g. [suffix].")
    return [
        s if isinstance(s, Suffix) else Suffix(id=f"adversarial-{i}", arm="adversarial", text=s)
        for i, s in enumerate(suffixes, 1)
    ]


@dataclass(frozen=True)
class Findings:
    """Everything the analysis found, as flat tables (docs/run-folder.md names their columns)."""

    tables: dict[str, list[dict[str, Any]]]
    summary: dict[str, Any]
    checks: list[dict[str, Any]] = field(default_factory=list)
    patterns: list[dict[str, Any]] = field(default_factory=list)

    def _repr_html_(self) -> str:
        """The report, for notebooks: a page in a frame of its own."""
        from reports.notebook import findings_html

        return findings_html(self)

    def frame(self, table: str) -> pandas.DataFrame:
        """One table as a data frame.

        Raises:
            KeyError: there is no such table; the existing ones are named.
        """
        import pandas

        if table not in self.tables:
            raise KeyError(f"no table {table!r}; there are {', '.join(sorted(self.tables))}")
        return pandas.DataFrame(self.tables[table])
