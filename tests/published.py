"""What is published, built from the tree, and installed where the tree is not."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("attacks", "suffix_analysis", "reports")


def build_package(source: Path, out: Path) -> Path:
    """The folder ``out`` with a source archive, made from a copy in ``source``, and the wheel that comes of it."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for kind, folder in (("sdist", source), ("wheel", source / "unpacked")):
        if kind == "wheel":
            (archive,) = out.glob("*.tar.gz")
            shutil.unpack_archive(archive, folder, filter="data")
            (folder,) = folder.iterdir()
        code = f"from setuptools import build_meta as b; b.build_{kind}({str(out)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return out


def install(wheel: Path, folder: Path) -> Path:
    """The programs of a new environment with the wheel and nothing but what it asks for."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, str(wheel)], check=True)
    return folder / "bin"


def without_network() -> list[str]:
    """What, before a command, takes the network away from it and all that it starts; nothing where that is barred."""
    command = ["unshare", "--map-root-user", "--net"]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*command, "true"], check=False, capture_output=True).returncode == 0:
            return command
    print("the network cannot be taken away here: what runs without it is not tried")
    return []
