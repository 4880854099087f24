"""Tiles: the shipped file, its lookup, and the tuner's choice with a made-up clock."""

import copy
import json
import math
from itertools import pairwise

import pytest
import torch

from sdr.config import PRESETS
from sdr.ftcn import STEM_KERNEL, res_kernel
from sdr_kernels import tune
from sdr_kernels._cases import BLOCKS, PRECISIONS, STEMS, AuditCase, Block
from sdr_kernels._tiles import (
    SHARED_MEMORY,
    choose_tile,
    forced_tiles,
    load_tiles,
    tile_for_rows,
    tiles_of,
    write_tiles,
)

CPU = torch.device("cpu")
TILES = [
    {"min_rows": 0, "BLOCK_M": 32, "num_warps": 4, "num_stages": 2},
    {"min_rows": 100, "BLOCK_M": 64, "num_warps": 4, "num_stages": 2},
]


@pytest.fixture
def shipped(monkeypatch):
    """A data file of one class, for both architectures."""
    tiles = {arch: {"op half": copy.deepcopy(TILES)} for arch in SHARED_MEMORY}
    monkeypatch.setattr("sdr_kernels._tiles.load_tiles", lambda: tiles)
    monkeypatch.setattr("sdr_kernels.tune.load_tiles", lambda: tiles)
    return tiles


@pytest.mark.parametrize(("rows", "block"), [(0, 32), (1, 32), (99, 32), (100, 64), (2**40, 64)])
def test_tile_follows_the_rows(shipped, rows, block):
    assert choose_tile("op half", rows, CPU) == {"BLOCK_M": block, "num_warps": 4, "num_stages": 2}


def test_chosen_tile_is_the_callers_own(shipped):
    choose_tile("op half", 1, CPU).clear()
    assert choose_tile("op half", 1, CPU)["BLOCK_M"] == 32


def test_missing_class_is_named(shipped):
    with pytest.raises(ValueError, match=r"shape_class must be one of tiles\.json for sm_90, got 'op double'"):
        choose_tile("op double", 1, CPU)


def test_forced_tile_holds_within_the_block_only(shipped):
    def forced():
        with forced_tiles(lambda shape_class, rows: {"rows": rows}):
            assert choose_tile("anything", 7, CPU) == {"rows": 7}
            raise KeyError("a failed launch")

    with pytest.raises(KeyError, match="a failed launch"):
        forced()
    assert choose_tile("op half", 7, CPU)["BLOCK_M"] == 32


def test_shipped_file_is_written_as_it_is_read(tmp_path):
    write_tiles(load_tiles(), tmp_path / "tiles.json")
    assert json.loads((tmp_path / "tiles.json").read_text()) == load_tiles()


def test_both_architectures_have_the_same_classes():
    sm_80, sm_90 = (set(load_tiles()[arch]) for arch in ("sm_80", "sm_90"))
    assert sm_80 == sm_90


def test_every_class_has_a_tile_for_any_rows():
    for arch, classes in load_tiles().items():
        for name, tiles in classes.items():
            rows = [tile["min_rows"] for tile in tiles]
            assert rows[0] == 0, f"{arch} {name} has no tile for few rows"
            assert all(a < b for a, b in pairwise(rows)), f"{arch} {name} does not ascend: {rows}"


def blocks_of(config) -> set[Block]:
    """The distinct bottlenecks of a model."""
    found = set()
    channels, frames, size = config.width, config.num_frames, config.image_size // 4
    for stage in range(config.backbone_stages):
        for block in range(config.blocks[stage]):
            inner = config.width * 2**stage
            pool, time_pool = stage > 0 and block == 0, stage == 0 and block == config.blocks[0] - 1
            found.add(Block(channels, inner, res_kernel(stage + 2, block), frames, size, pool, time_pool))
            channels, frames, size = 4 * inner, frames // (1 + time_pool), size // (1 + pool)
    return found


def test_cases_are_the_layers_of_the_presets():
    configs = [preset() for preset in PRESETS.values()]
    assert set(STEMS) == {(config.width, STEM_KERNEL, config.image_size) for config in configs}
    assert set(BLOCKS) == set().union(*map(blocks_of, configs))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=str)
def test_presets_have_tiles(preset, arch, dtype):
    from sdr_kernels._triton.temporal_bottleneck import bottleneck_class
    from sdr_kernels._triton.temporal_conv3d import conv_class
    from sdr_kernels._triton.temporal_stem import stem_class

    config = PRESETS[preset]()
    for block in blocks_of(config):
        assert tiles_of(bottleneck_class(dtype, block.channels, block.pool), arch)
        assert tiles_of(conv_class(dtype, block.channels), arch)
        assert tiles_of(conv_class(dtype, 4 * block.channels), arch)
    for branches in (1, config.num_branches):
        assert tiles_of(stem_class(dtype, branches * config.width), arch)


def launcher(x, rows):
    """Asks for a tile as a real one does, and launches nothing."""
    choose_tile("op half", rows, x.device)
    return x


def case(name: str, rows: int) -> AuditCase:
    return AuditCase(name, launcher, launcher, lambda B, device: (torch.zeros(1, device=device), B * rows))


def clock(best: dict[int, tuple[int, int]], calls: list | None = None):
    """A timer: the fastest tile has the (BLOCK_M, num_stages) of ``best`` for so many clips; 16 rows never fit."""

    def seconds(case, clips, shape_class, tile):
        if calls is not None:
            calls.append((case.name, clips, shape_class, tuple(tile.items())))
        block, stages = best[clips]
        away = abs(math.log2(tile["BLOCK_M"] / block)) + abs(tile["num_stages"] - stages)
        return math.inf if tile["BLOCK_M"] == 16 else 1 + away + (tile["num_warps"] != 4)

    return seconds


def test_neighbours_change_one_value_within_limits():
    tile = {"BLOCK_M": 16, "BLOCK_N": 256, "PROGRAMS": 1, "num_warps": 8, "num_stages": 2}
    changes = [{k: v for k, v in other.items() if v != tile[k]} for other in tune.neighbours(tile)]
    expected = [
        {"BLOCK_M": 32},
        {"BLOCK_N": 128},
        {"PROGRAMS": 2},
        {"num_warps": 4},
        {"num_stages": 1},
        {"num_stages": 3},
    ]
    assert changes == expected


def test_tuner_finds_the_fastest_near_the_shipped(shipped):
    (few, many) = tune.tune_cases([case("a", 10)], CPU, clock({1: (32, 3), 16: (256, 2)}), rounds=3)["op half"]
    assert few.tile == {"BLOCK_M": 32, "num_warps": 4, "num_stages": 3}
    assert many.tile == {"BLOCK_M": 256, "num_warps": 4, "num_stages": 2}
    assert (few.old["BLOCK_M"], many.old["BLOCK_M"]) == (32, 64)
    assert (few.seconds, few.old_seconds) == (1, 2)
    assert (many.seconds, many.old_seconds) == (1, 3)


def test_tuner_stops_after_its_rounds(shipped):
    (_, many) = tune.tune_cases([case("a", 10)], CPU, clock({1: (32, 2), 16: (256, 2)}), rounds=1)["op half"]
    assert many.tile["BLOCK_M"] == 128


def test_tuner_times_every_case_and_no_tile_twice(shipped):
    calls = []
    cases = [case("a", 10), case("b", 1000)]
    (few, _) = tune.tune_cases(cases, CPU, clock({1: (32, 3), 16: (32, 3)}, calls), rounds=4)["op half"]
    assert len(calls) == len(set(calls))
    assert {name for name, *_ in calls} == {"a", "b"}
    assert few.seconds == 2
    assert few.rows == pytest.approx(100)


def test_tuner_drops_what_does_not_fit(shipped):
    (few, _) = tune.tune_cases([case("a", 10)], CPU, clock({1: (16, 2), 16: (16, 2)}), rounds=4)["op half"]
    assert few.tile["BLOCK_M"] == 32


def test_tuner_says_when_nothing_fits(shipped):
    with pytest.raises(RuntimeError, match="no tile near"):
        tune.tune_cases([case("a", 10)], CPU, lambda *_: math.inf, rounds=1)


def winner(rows: float, block: int) -> tune.Winner:
    return tune.Winner(rows, {"BLOCK_M": block, "num_warps": 4}, 1.0, {"BLOCK_M": 32, "num_warps": 4}, 2.0)


def test_equal_winners_make_one_entry():
    assert tune.merged(winner(100, 64), winner(1600, 64)) == [{"min_rows": 0, "BLOCK_M": 64, "num_warps": 4}]


def test_two_winners_meet_half_way():
    entries = tune.merged(winner(100, 64), winner(1600, 128))
    assert [entry["min_rows"] for entry in entries] == [0, 400]
    assert tile_for_rows(entries, 100)["BLOCK_M"] == 64
    assert tile_for_rows(entries, 1600)["BLOCK_M"] == 128


def test_other_classes_and_architectures_are_kept(shipped, tmp_path):
    shipped["sm_90"]["other half"] = copy.deepcopy(TILES)
    before = copy.deepcopy(shipped)
    tiles = tune.retuned({"op half": [winner(100, 64), winner(1600, 64)]}, "sm_90")
    write_tiles(tiles, tmp_path / "tiles.json")
    written = json.loads((tmp_path / "tiles.json").read_text())
    assert written["sm_80"] == before["sm_80"]
    assert written["sm_90"]["other half"] == TILES
    assert written["sm_90"]["op half"] == [{"min_rows": 0, "BLOCK_M": 64, "num_warps": 4}]
    assert shipped == before, "the data in memory must not change"


def test_report_names_old_and_new_times():
    text = tune.report({"op half": [winner(100, 64), winner(1600, 32)]})
    first, second = text.splitlines()
    assert "1 clips x 4" in first
    assert "2000000.0 us -> 1000000.0 us" in first.replace("  ", " ")
    assert first.endswith("{'BLOCK_M': 64}")
    assert second.endswith("unchanged")


def test_wrong_result_ends_the_tuning():
    timer = tune.GpuTimer(CPU)
    exact = AuditCase("doubling", None, lambda x: 2 * x, lambda B, device: (torch.randn(B, 100, device=device),))
    (x,) = timer.inputs(exact, 1)
    timer.check(exact, {"BLOCK_M": 32}, 2 * x)
    with pytest.raises(RuntimeError, match=r"doubling with \{'BLOCK_M': 64\} errs by"):
        timer.check(exact, {"BLOCK_M": 64}, 2.001 * x)
    with pytest.raises(RuntimeError, match="errs by nan"):
        timer.check(exact, {"BLOCK_M": 16}, x * math.nan)


def test_tuner_needs_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune.main(["--ops", "temporal_conv3d", "--out", str(tmp_path / "tiles.json")]) == 2
    assert capsys.readouterr().err == "sdr_kernels.tune: tiles are timed on a GPU, and there is no CUDA GPU\n"
    assert not list(tmp_path.iterdir())
