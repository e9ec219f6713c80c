"""The run folder: its lock, its settings, the record of its stages, and its suffixes."""

from __future__ import annotations

import contextlib
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict  # pydantic takes the standard library's from Python 3.12 on only

from suffix_analysis import provenance
from suffix_analysis.config import StudyConfig
from suffix_analysis.environment import peak_gib
from suffix_analysis.errors import UsageError, UserError
from suffix_analysis.files import read_as, read_json, read_records, write_atomic, write_json, write_jsonl
from suffix_analysis.records import SCHEMA_VERSION, Suffix


class StageState(TypedDict):
    """A stage in status.json: ``done`` or ``interrupted``, the seconds of all attempts, and the findings it wrote."""

    state: str
    seconds: float
    findings: NotRequired[list[str]]


class Status(TypedDict):
    """status.json."""

    schema_version: int
    state: str
    stages: dict[str, StageState]
    peak_gib: float
    sizes: NotRequired[dict[str, int]]  # bytes of what finished stages wrote, by path


# what a stage is not done without, so that a file that was deleted is made again
FILES = {
    "prompts": ("prompts.jsonl",),
    "attack": ("suffixes.jsonl",),
    "campaign": ("suffixes.jsonl", "findings/campaign.parquet"),
    "replies": ("findings/replies.parquet", "findings/refusal.parquet"),
    "direction": ("direction.safetensors", "findings/candidates.parquet", "findings/interventions.parquet"),
    "analysis": ("findings/top_heads.parquet", "findings/summary.json", "findings/checks.json"),
}
# what stages write again after the one that is named above
SHARED = ("findings/summary.json", "findings/checks.json")
# what is made again when a pool of attacks has grown; the direction knows nothing of suffixes
AFTER_ATTACKS = ("attack", "replies", "analysis", "mechanism")
# settings of where a run is worked on, which may change from one part of it to the next
ELSEWHERE = ("executor", "address", "attack_cpus", "attack_gpus", "device")


def write_suffixes(path: Path, suffixes: Sequence[Suffix]) -> None:
    """Write suffix records as JSONL."""
    write_jsonl(path, [asdict(suffix) for suffix in suffixes])


def read_suffixes(path: Path) -> list[Suffix]:
    """Read suffix records.

    Raises:
        UserError: missing, damaged, or of another layout.
    """
    return read_records(path, Suffix)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings that a run folder was made with.

    Raises:
        UsageError: it is no run folder, or its settings are damaged.
    """
    try:
        return tomllib.loads((folder / "config.toml").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder} is no run folder (its config.toml cannot be read: {error}).") from error


@contextlib.contextmanager
def open_run(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Hold a run folder: make it, or check that it was made by the same settings, and lock out other processes.

    A pool of attacks may grow: with a larger ``n_attacks`` the further ones are made, and what comes after them again.

    Raises:
        UsageError: the folder belongs to other settings or is no run folder.
        UserError: another process works in it, or it cannot be written.
    """
    import tomli_w

    # TOML knows neither None nor tuples
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if v is not None}
    config = folder / "config.toml"
    foreign = folder.exists() and (not folder.is_dir() or any(not _begun(path) for path in folder.iterdir()))
    if foreign and not config.exists():
        raise UsageError(f"{folder} exists and is not a run folder; choose another with --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as handle:
            _lock(handle, folder)
            if config.exists():
                if _require_same(folder, settings):
                    _forget(folder, AFTER_ATTACKS)
                if provenance.knows_model(folder) and has_begun(folder):  # another name counts once it is loaded
                    own = {key: value for key, value in read_config(folder).items() if key in provenance.MODEL}
                    settings = {k: v for k, v in settings.items() if k not in provenance.MODEL} | own
            if not config.exists() or read_config(folder) != settings:
                write_atomic(config, tomli_w.dumps(settings))
            yield
    except ConnectionError:  # a closed pipe behind progress or results, among others: not the folder's fault
        raise
    except OSError as error:
        told = error.strerror or error
        if error.filename is not None and not Path(error.filename).absolute().is_relative_to(folder.absolute()):
            raise UserError(f"{error.filename} cannot be used: {told}.") from error
        raise UserError(f"{folder} cannot be used: {told}; choose another with --out.") from error


def _require_same(folder: Path, settings: dict[str, Any]) -> bool:
    """Refuse other settings than a folder was made with, where something was made with them.

    True where a pool is to grow. Of the model and the input files their contents decide, not their names (see
    `suffix_analysis.provenance`).

    Raises:
        UsageError: names the first setting that differs.
        UserError: names an input file with another content.
    """
    there = read_config(folder)
    if ("vary" in there) != ("vary" in settings):
        holds, commands = ("a campaign", "campaign") if "vary" in there else ("a study", "run, attack, …")
        raise UsageError(f"{folder} holds {holds} (suffix-analysis {commands}); choose another folder with --out.")
    # settings that are younger than the folder had their defaults
    younger = {f.name: f.default for f in fields(StudyConfig) if f.name in settings and f.default is not None}
    there = younger | there
    keys = (there.keys() | settings.keys()) - set(ELSEWHERE)
    changed = sorted(key for key in keys if there.get(key) != settings.get(key))
    if not has_begun(folder):  # a first mistake can be mended
        if changed:
            for name in ("fast_dtype.json", "origin.json", "weights.json", "skipped.json", "refusal_tokens.json"):
                (folder / name).unlink(missing_ok=True)
        return False
    told = provenance.same_inputs(folder, settings)
    told |= {*provenance.MODEL} if provenance.knows_model(folder) else set()
    changed = [key for key in changed if key not in told]
    if changed == ["n_attacks"] and "vary" not in there and 1 < there["n_attacks"] < settings["n_attacks"]:
        return True
    if changed:
        key = changed[0]
        raise UsageError(
            f"{folder} was made with {key} = {there.get(key)!r}, not {settings.get(key)!r}; use those settings or "
            "another folder (--out)."
        )
    return False


def _forget(folder: Path, stages: Sequence[str]) -> None:
    """Take stages for not done, and remove the findings that they alone have written."""
    now = status(folder)
    for name in stages:
        for file in {*_written_by(now, name)} - {*SHARED, *FILES["attack"]}:
            (folder / file).unlink(missing_ok=True)
        now["stages"].pop(name, None)
    now["sizes"] = {file: size for file, size in now.get("sizes", {}).items() if (folder / file).exists()}
    write_json(folder / "status.json", dict(now))


def _begun(path: Path) -> bool:
    """Whether a file is what a process leaves that was stopped before it had written the settings."""
    return path.name.startswith((".lock", ".config.toml"))


def _lock(handle: Any, folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows has no fcntl; two processes are then the user's own care
        return
    except BlockingIOError as error:
        raise UserError(f"Another process is working in {folder}; wait for it or choose another --out.") from error


def status(folder: Path) -> Status:
    """The status record; an empty one for a new folder.

    Raises:
        UserError: it is damaged, or of another schema_version.
    """
    path = folder / "status.json"
    if path.exists():
        found: Any = read_json(path)
        version = found.get("schema_version") if isinstance(found, dict) else None
        if version is not None and version != SCHEMA_VERSION:
            raise UserError(
                f"{folder} was written with schema_version {version}, this is {SCHEMA_VERSION}; "
                "run it again in a new folder."
            )
        known: Status = read_as(path, Status)
        return known
    return {"schema_version": SCHEMA_VERSION, "state": "running", "stages": {}, "peak_gib": 0.0}


def findings_now(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of ``findings``, each with what changes when it is written again."""
    found = [(path.name, path.stat()) for path in (folder / "findings").glob("[!.]*")]
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def add_seconds(
    folder: Path, name: str, seconds: float, state: str = "interrupted", findings: Sequence[str] = ()
) -> None:
    """Record a stage's state, ``done`` when its files are complete. Seconds of interrupted attempts add up.

    ``findings`` are what it wrote into the folder of that name: without one of them it is not done any more.
    """
    now = status(folder)
    before = now["stages"].get(name, StageState(state=state, seconds=0.0))
    now["stages"][name] = {
        "state": state,
        "seconds": round(before["seconds"] + seconds, 2),
        "findings": sorted({*before.get("findings", []), *findings}),
    }
    if state == "done":
        files = sorted({*_written_by(now, name)} - {*SHARED})
        found = {file: (folder / file).stat().st_size for file in files if (folder / file).exists()}
        now["sizes"] = now.get("sizes", {}) | found
    now["peak_gib"] = max(now["peak_gib"], round(peak_gib(), 2))
    write_json(folder / "status.json", dict(now))


def set_state(folder: Path, state: str) -> None:
    """Record the run's state: running, partly done or done."""
    now = status(folder)
    now["state"] = state
    write_json(folder / "status.json", dict(now))


def has_begun(folder: Path) -> bool:
    """Whether any stage has finished in this folder."""
    return any(stage["state"] == "done" for stage in status(folder)["stages"].values())


def keep_model(folder: Path, settings: dict[str, Any]) -> None:
    """Write where the model is now into the folder's settings, once it is known to be the same."""
    import tomli_w

    there = read_config(folder)
    own = {key: settings[key] for key in provenance.MODEL if settings.get(key) is not None}
    wanted = {key: value for key, value in there.items() if key not in provenance.MODEL} | own
    if wanted != there:
        write_atomic(folder / "config.toml", tomli_w.dumps(wanted))


def _written_by(now: Status, name: str) -> list[str]:
    """The files that a stage is not done without, and what else it has written, as paths in the folder."""
    findings = now["stages"][name].get("findings", []) if name in now["stages"] else []
    return [*FILES.get(name, ()), *(f"findings/{file}" for file in findings)]


def is_done(folder: Path, name: str) -> bool:
    """Whether a stage has finished in this folder and its files are still there.

    Raises:
        UserError: one of them is not as it was written.
    """
    now = status(folder)
    stages = now["stages"]
    if name not in stages or stages[name]["state"] != "done":
        return False
    files = [folder / file for file in _written_by(now, name)]
    if not all(file.exists() for file in files):
        return False
    for file in files:
        size = now.get("sizes", {}).get(str(file.relative_to(folder)))
        if size is not None and file.stat().st_size != size:
            raise UserError(
                f"{file} is not as the {name} stage wrote it ({file.stat().st_size} bytes, then {size}); delete it, "
                "and the stage makes it again."
            )
    return True


def begin(folder: Path, name: str) -> None:
    """Forget the sizes of what a stage wrote before it writes it again."""
    now = status(folder)
    gone = {*_written_by(now, name)} & {*now.get("sizes", {})}
    if gone:
        now["sizes"] = {file: size for file, size in now["sizes"].items() if file not in gone}
        write_json(folder / "status.json", dict(now))
