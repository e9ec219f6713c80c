"""What is published: a wheel and a source archive that hold everything the package needs at run time."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.published import PACKAGES, ROOT, build_package

LOOK = """
import attacks, reports, suffix_analysis
from reports.build import build_report
from suffix_analysis.organism.weights import adapter_folder
from suffix_analysis.prompts import load_prompts
print(suffix_analysis.__file__)
print(len(load_prompts("embedded")))
print((adapter_folder() / "adapter_model.safetensors").is_file())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both."""
    return build_package(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist"))


def data_files() -> set[str]:
    """Every file of the packages that is not Python."""
    found = {path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    return {str(path.relative_to(ROOT)) for path in found if path.suffix not in (".py", ".pyc")}


def test_wheel_and_source_archive_hold_every_data_file(built: Path) -> None:
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as tar:
        in_archive = {name.partition("/")[2] for name in tar.getnames()}
    assert len(data_files()) > 8
    assert data_files() - in_wheel == set()
    assert data_files() - in_archive == set()
    assert not [name for name in in_wheel if name.startswith(("tests", "benchmarks"))]


def test_the_wheel_works_where_the_repository_is_not(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    where, count, has_adapter = done.stdout.split()[-3:]
    assert where.startswith(str(tmp_path))
    assert int(count) > 1000
    assert has_adapter == "True"
