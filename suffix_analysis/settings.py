"""Where the settings of a command come from beside its flags."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from cyclopts.config import Env, Toml

from suffix_analysis.errors import UsageError

# commands that go on in a run folder, and where that is if nothing is said
STAGES = dict.fromkeys(("run", "attack", "direction", "analyze"), "runs/study") | {"campaign": "runs/campaign"}
CONFIG, OUT = "SUFFIX_ANALYSIS_CONFIG", "SUFFIX_ANALYSIS_OUT"  # the flags' own variables


def sources(words: list[str]) -> list[Any]:
    """Where settings come from beside the flags, which win: the environment, then a file.

    The file is the one given with --config, or else what the run folder of a stage command was made with.

    Raises:
        UsageError: the file cannot be read.
    """
    found: list[Any] = [Env("SUFFIX_ANALYSIS_", command=False)]
    command = words[0] if words else ""
    if command not in (*STAGES, "demo"):
        return found  # no other command takes a study's settings
    given = [os.environ[CONFIG]] if CONFIG in os.environ else []
    given += _values(words, "--config")
    if not given and command in STAGES:
        out = _values(words, "--out") or [os.environ.get(OUT) or STAGES[command]]
        made_with = Path(out[-1]) / "config.toml"
        given = [str(made_with)] if made_with.is_file() else []
    for name in given[-1:]:
        try:
            settings = tomllib.loads(Path(name).read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"The config file {name} cannot be read: {error}") from error
        tables = [key for key, value in settings.items() if isinstance(value, dict)]
        if tables:
            raise UsageError(f"The config file {name} has a table [{tables[0]}]; settings stand without one.")
        found.append(Toml(name, must_exist=True, search_parents=False, use_commands_as_keys=False))
    return found


def _values(words: list[str], flag: str) -> list[str]:
    """What is given with a flag, in either of the two ways to write that."""
    apart = [words[i + 1] for i, word in enumerate(words[:-1]) if word == flag]
    return apart + [word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")]
