"""Every promise has a test that names it, the page shows how they ended, and the planted faults fit the code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plant_faults import ROOT, planted
from planted_faults import FAULTS, Fault
from promises import PAGE, ROWS, with_tables


def test_every_promise_has_a_test():
    pattern = re.compile(r'mark\.promise\(row="([^"]+)"\)')
    named = {row for path in Path(__file__).parent.glob("test_*.py") for row in pattern.findall(path.read_text())}
    assert named == set(ROWS)


def test_the_page_is_what_the_results_say():
    page = PAGE.read_text()
    assert with_tables(page) == page


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_planted_faults_have_their_place(fault: Fault):
    text = (ROOT / fault.file).read_text()
    compile(planted(fault, text), fault.file, "exec")
    for word in fault.test.split():
        path, _, name = word.partition("::")
        if path.startswith("tests/"):
            assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text()


OF_ITS_OWN = """
import pytest

@pytest.mark.promise(row="atomic")
def test_one(record_property):
    record_property("files", 3)
    record_property("longest seconds", 2)

@pytest.mark.promise(row="atomic")
@pytest.mark.promise(row={row!r})
def test_two(record_property):
    record_property("files", 4)
    record_property("longest seconds", 1)
    assert {ends_well}
"""


def run_of_its_own(folder: Path, *, row: str, ends_well: bool = True, processes: str = "2") -> tuple[str, dict]:
    """What pytest prints of a file of two tests, and the results that it keeps."""
    (folder / "conftest.py").write_text(
        "from promises import pytest_addoption, pytest_collection_modifyitems, pytest_configure\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = promise(row): a row\n")
    (folder / "test_own.py").write_text(OF_ITS_OWN.format(row=row, ends_well=ends_well))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        processes,
        "-p",
        "no:cacheprovider",
        "--promises",
        "kept/results.json",
    ]
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "SDR_SEED": "11"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    kept = folder / "kept" / "results.json"
    return done.stdout + done.stderr, json.loads(kept.read_text()) if kept.exists() else {}


def test_results_are_kept_by_row_and_file(tmp_path):
    first = run_of_its_own(tmp_path, row="soak")[1]
    assert set(first) == {"atomic", "soak"}
    both, one = first["atomic"]["test_own.py"], first["soak"]["test_own.py"]
    assert (both["passed"], both["figures"]) == (2, {"files": 7, "longest seconds": 2})
    assert (one["passed"], one["figures"]) == (1, {"files": 4, "longest seconds": 1})
    assert both["stamp"]["seed"] == 11
    second = run_of_its_own(tmp_path, row="metrics", ends_well=False)[1]
    assert second["soak"] == first["soak"]  # of what was not run
    assert (second["atomic"]["test_own.py"]["passed"], second["atomic"]["test_own.py"]["failed"]) == (1, 1)
    assert second["metrics"]["test_own.py"]["failed"] == 1


def test_a_row_that_does_not_exist_is_refused(tmp_path):
    text, kept = run_of_its_own(tmp_path, row="sound", processes="0")
    assert "no such promise" in text
    assert kept == {}
