"""Where the settings of a command come from beside its flags."""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from cyclopts.config import Env, Toml

from suffix_analysis.errors import UsageError

# commands that go on in a run folder, and where that is if nothing is said
STAGES = dict.fromkeys(("run", "attack", "direction", "analyze"), "runs/study") | {"campaign": "runs/campaign"}
CONFIG, OUT = "SUFFIX_ANALYSIS_CONFIG", "SUFFIX_ANALYSIS_OUT"  # the flags' own variables
JUDGE, ADDRESS = "SUFFIX_ANALYSIS_JUDGE", "SUFFIX_ANALYSIS_ADDRESS"
OTHERS = (CONFIG, OUT, "SUFFIX_ANALYSIS_JSON", "SUFFIX_ANALYSIS_DEBUG", "SUFFIX_ANALYSIS_CACHE")


def sources(words: list[str]) -> list[Any]:
    """Where settings come from beside the flags, which win: the environment, then a file.

    The file is the one given with --config, or else what the run folder of a stage command was made with.

    Raises:
        UsageError: the file cannot be read.
    """
    command = words[0] if words else ""
    if command not in (*STAGES, "demo"):
        return []  # no other command takes a study's settings
    _require_known(command)
    found: list[Any] = [Env("SUFFIX_ANALYSIS_", command=False)]
    given = [os.environ[CONFIG]] if CONFIG in os.environ and command != "demo" else []
    given += _values(words, "--config")
    implied = not given
    if not given and command in STAGES:
        out = _values(words, "--out") or [os.environ.get(OUT) or STAGES[command]]
        made_with = Path(out[-1]) / "config.toml"
        given = [str(made_with)] if made_with.is_file() else []
    for name in given[-1:]:
        try:
            settings = tomllib.loads(Path(name).read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no TOML, too long a number
            raise UsageError(f"The config file {name} cannot be read: {error}") from error
        tables = [key for key, value in settings.items() if isinstance(value, dict)]
        if tables:
            raise UsageError(f"The config file {name} has a table [{tables[0]}]; settings stand without one.")
        if implied and command != "campaign" and "vary" in settings:
            raise UsageError(f"{Path(name).parent} holds a campaign; choose another folder with --out.")
        judge = settings.get("judge", "rules")
        if implied and judge != "rules" and not _said(words, "--judge", JUDGE):
            require_trusted(name, judge, None)
        address = settings.get("address")
        if implied and address is not None and not _said(words, "--address", ADDRESS):
            raise UsageError(  # what answers there is trusted with pickles: the folder may be another's
                f"{name} names the Ray cluster {address!r}; say --address {address} if that is what you want to reach, "
                "or take the line out."
            )
        found.append(Toml(name, must_exist=True, search_parents=False, use_commands_as_keys=False))
    return found


def require_trusted(where: str, judge: str, said: str | None) -> None:
    """Refuse to run a judge's code only because a run folder names it: the folder may be another's.

    Raises:
        UsageError: it was not said again.
    """
    if judge != said:
        raise UsageError(
            f"{where} names the judge {judge!r}, whose code would be run; say --judge {judge} if that is what you want."
        )


def _require_known(command: str) -> None:
    """Refuse environment variables of ours that no setting has.

    Raises:
        UsageError: names the variable.
    """
    from suffix_analysis.config import CampaignConfig, DemoConfig, StudyConfig

    kind = {"campaign": CampaignConfig, "demo": DemoConfig}.get(command, StudyConfig)
    known = {f"SUFFIX_ANALYSIS_{field.name.upper()}" for field in fields(kind)} | {*OTHERS}
    for name in os.environ:
        if name.startswith("SUFFIX_ANALYSIS_") and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise UsageError(f"{name} is no setting of {command}{f'; is it {close[0]}?' if close else '.'}")


def _said(words: list[str], flag: str, variable: str) -> bool:
    """Whether a setting is given by its flag or in the environment."""
    return bool(_values(words, flag)) or variable in os.environ


def _values(words: list[str], flag: str) -> list[str]:
    """What is given with a flag, in either of the two ways to write that."""
    apart = [words[i + 1] for i, word in enumerate(words[:-1]) if word == flag]
    return apart + [word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")]
