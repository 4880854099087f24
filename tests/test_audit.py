"""The compile audit: finds every planted fault, and none in what is shipped."""

import json
import subprocess
import sys
from pathlib import Path

import planted_kernels
import pytest

from sdr_kernels._offsets import narrow_offsets
from sdr_kernels._tiles import load_tiles
from sdr_kernels.audit import Job, Row, lanes_differ, lost_values, run_jobs, table, uncovered_classes

TABLE = Path(__file__).parents[1] / "bench" / "results" / "audit_sm80_sm90.json"
FAULTS = {
    "narrow offset": "offset is not 64-bit",
    "widened too late": "offset may overflow: %start",
    "summed in a loop": "offset may overflow: %start",
    "scalar product": "no tensor-core instruction",
    "no NaN": "a maximum drops NaN",
    "atomics": "floats are added by atomics",
    "spill": "spills",
    "shared memory": "bytes of shared memory, sm_80 has 101376",
    "no such option": "does not compile: KeyError",
}


@pytest.fixture(scope="module")
def planted():
    """The audit's row of every planted kernel, by name."""
    jobs = [Job("planted_kernels", "half", i, "sm_80") for i in range(len(planted_kernels.LAUNCHERS))]
    return {row.case: row for row in run_jobs(jobs, processes=1)}


@pytest.mark.promise(row="repeatable")
@pytest.mark.parametrize("name", FAULTS)
def test_finds_planted_fault(planted, name):
    assert FAULTS[name] in planted[name].broken[0]
    assert len({text.split(":")[0] for text in planted[name].broken} - {"offset may overflow"}) <= 1, "one fault each"


def test_good_kernel_breaks_no_rule(planted):
    row = planted["good"]
    assert row.broken == []
    assert row.tensor_core > 0
    assert 0 < row.registers < 256
    assert row.stack == row.local == 0


def test_every_planted_kernel_has_an_expectation():
    assert set(planted_kernels.LAUNCHERS) == {"good", *FAULTS}


def function(body: str) -> str:
    """Intermediate code of a kernel with a pointer and a 32-bit number; the last value is the offset, %o."""
    return (
        "module {\n  tt.func public @kernel(%p: !tt.ptr<f32> loc(#loc), %n: i32 loc(#loc)) attributes {x = false} {\n"
        f"    %c4 = arith.constant 4 : i32 loc(#loc1)\n    %c0 = arith.constant 0 : i32 loc(#loc1)\n{body}\n"
        "    %a = tt.addptr %p, %o : !tt.ptr<f32>, i64 loc(#loc2)\n    tt.return loc(#loc)\n  } loc(#loc)\n} loc(#loc)"
    )


LOOP = """    %s = scf.for %i = %c0 to {end} step %c4 iter_args(%x = %c0) -> (i32)  : i32 {{
      %m = arith.muli %i, %c4 : i32 loc("name"(#loc3))
      scf.yield {result} : i32 loc(#loc)
    }} loc(#loc4)
    %o = arith.extsi %s : i32 to i64 loc(#loc)"""
BRANCH = """    %w = arith.muli %n, %c4 : i32 loc(#loc)
    %t = arith.cmpi slt, %n, %c4 : i32 loc(#loc)
    %b:2 = scf.if %t -> (i32, i32) {
      scf.yield %c4, %c4 : i32, i32 loc(#loc)
    } else {
      scf.yield %c0, %w : i32, i32 loc(#loc)
    } loc(#loc)
"""
PROGRAM = """    %g = tt.get_program_id x : i32 loc(#loc)
    %m = arith.muli %n, %c4 : i32 loc(#loc)
    %q = arith.divsi {dividend}, %m : i32 loc(#loc)
    %o = arith.extsi %q : i32 to i64 loc(#loc)"""


@pytest.mark.promise(row="large")
@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("    %m = arith.muli %n, %c4 : i32\n    %o = arith.extsi %m : i32 to i64", "%m = arith.muli %n, %c4 : i32"),
        ("    %m = arith.shli %n, %c4 : i32\n    %o = arith.extsi %m : i32 to i64", "%m = arith.shli %n, %c4 : i32"),
        ("    %m = arith.subi %n, %c4 : i32\n    %o = arith.extsi %m : i32 to i64", "%m = arith.subi %n, %c4 : i32"),
        ("    %e = arith.extsi %n : i32 to i64\n    %o = arith.muli %e, %e : i64", None),
        (
            "    %r = arith.remsi %n, %c4 : i32\n    %m = arith.muli %r, %c4 : i32\n"
            "    %o = arith.extsi %m : i32 to i64",
            None,
        ),
        (LOOP.format(end="%c4", result="%m"), None),
        (LOOP.format(end="%n", result="%m"), "%m = arith.muli %i, %c4 : i32"),
        (LOOP.format(end="%n", result="%i"), None),
        (BRANCH + "    %o = arith.extsi %b#0 : i32 to i64", None),
        (BRANCH + "    %o = arith.extsi %b#1 : i32 to i64", "%w = arith.muli %n, %c4 : i32"),
        (PROGRAM.format(dividend="%g"), None),
        (PROGRAM.format(dividend="%n"), "%m = arith.muli %n, %c4 : i32"),
    ],
)
def test_offsets_are_followed(body, found):
    assert narrow_offsets(function(body)) == ([f"offset may overflow: {found}"] if found else [])


@pytest.mark.parametrize(
    ("precision", "dtype", "found"),
    [
        (", inputPrecision = tf32", "f32", ["a float32 product is rounded to TF32"]),
        (", inputPrecision = tf32", "bf16", []),
        ("", "f32", []),
    ],
)
def test_products_in_tf32_are_found(precision, dtype, found):
    kinds = f"tensor<64x16x{dtype}> * tensor<16x64x{dtype}> -> tensor<64x64xf32>"
    assert lost_values(f"    %d = tt.dot %x, %w, %acc{precision} : {kinds} loc(#loc)") == found


@pytest.mark.promise(row="repeatable")
@pytest.mark.parametrize(
    ("first", "found"),
    [
        ("add.f32 \t%r4, %r1, %r3;", False),
        ("fma.rn.f32 \t%r4, %r1, %r2, %r3;", True),
        ("mov.b32 \t%r9, %r3;\n\tfma.rn.f32 \t%r4, %r1, %r2, %r9;", True),
        ("fma.rn.f32 \t%r4, %r3, %r2, %r1;", False),
    ],
)
def test_a_product_fused_into_a_sum_over_lanes_is_found(first, found):
    assert lanes_differ(f"\tshfl.sync.bfly.b32 \t%r3, %r2, 1, 31, -1;\n\t{first}\n") is found


def test_offset_of_32_bits_needs_bounds():
    bounded = function("    %o = arith.remsi %n, %c4 : i32").replace("i64", "i32")
    unbounded = function("    %o = arith.divsi %n, %n : i32").replace("i64", "i32")
    assert narrow_offsets(bounded) == []
    assert narrow_offsets(unbounded) == ["offset is not 64-bit: %a = tt.addptr %p, %o : !tt.ptr<f32>, i32"]


def test_offset_through_a_while_loop_is_refused():
    with pytest.raises(ValueError, match="cannot follow an offset through scf"):
        narrow_offsets(function("    %o = scf.while (%x = %n) : (i32) -> i32 {"))


def test_class_without_case_is_named():
    (arch, classes) = next(iter(load_tiles().items()))
    names = list(classes)
    rows = [Row(arch, name, "", "", "", {}, 0, 0, 0, 0, 0, 0, 0, []) for name in names[1:]]
    assert uncovered_classes(rows, [arch]) == [f"{arch} {names[0]}"]


def test_table_says_what_is_broken():
    row = Row(
        "sm_80",
        "an op",
        "_op_fwd_kernel",
        "a case",
        "float32",
        {"BLOCK_M": 16, "num_warps": 4},
        9,
        8,
        0,
        7,
        0,
        1,
        0,
        ["bad", "worse"],
    )
    line = table([row]).splitlines()[1]
    assert " ".join(line.split()) == "sm_80 an op op_fwd a case M16 warps4 9 8 7 0 0/1 bad and 1 more"


@pytest.mark.promise(row="large")
@pytest.mark.slow
def test_everything_shipped_passes(tmp_path):
    command = [sys.executable, "-m", "sdr_kernels.audit", "--out", str(tmp_path / "audit.json")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "audit.json").read_text())["rows"]
    assert tiles_compiled(rows) == tiles_shipped()


def test_committed_table_is_of_the_shipped_tiles():
    assert tiles_compiled(json.loads(TABLE.read_text())["rows"]) == tiles_shipped()


def tiles_compiled(rows: list[dict]) -> set[tuple]:
    return {(row["arch"], row["shape_class"], *row["tile"].items()) for row in rows if row["shape_class"]}


def tiles_shipped() -> set[tuple]:
    return {
        (arch, shape_class, *((name, value) for name, value in tile.items() if name != "min_rows"))
        for arch, classes in load_tiles().items()
        for shape_class, tiles in classes.items()
        for tile in tiles
    }
