"""Weights: what is written comes back, FTCN's keys convert, and nothing in a file runs or slips through."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sdr import FTCN, SDRError, SDRModel, ftcn_released, tiny
from sdr.checkpoint import (
    WeightsInfo,
    convert,
    digest,
    load_model,
    read_weights,
    rename_ftcn_key,
    save_weights,
    sdr_from_ftcn,
)

INFO = WeightsInfo(origin="made by a test", synthetic=True, metrics={"video AUC": 0.5}, training={"lr": 1e-4})


def small():
    return replace(tiny(), num_frames=8, image_size=32)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = SDRModel(small()).eval()
    path = tmp_path / "model.safetensors"
    save_weights(path, model, INFO)
    return path, model


def resave(path: Path, tensors: dict, metadata: dict) -> None:
    """A file with a right hash, whatever it says."""
    save_file(tensors, path, metadata | {"sha256": digest(tensors, metadata)})


def ftcn_name(key: str, *, pooled: set[str]) -> str:
    """The inverse of the renaming, written on its own: our FTCN key as the published checkpoint has it."""
    part = key.split(".")
    if part[0] == "proj":
        return f"resnet.head.fc.{part[1]}"
    if part[:2] == ["backbone", "stem"]:
        middle = "conv" if part[2] == "conv" else "bn.0"
        return f"resnet.s1.pathway0_stem.{middle}.{part[3]}"
    if part[0] == "backbone":
        stage, block, layer, leaf = part[1][3:], part[2], part[3], part[4]
        layer = layer if layer.startswith("branch1") else f"branch2.{layer}"
        dot0 = ".0" if block == "0" and int(stage) > 2 and layer in pooled else ""
        return f"resnet.s{stage}.pathway0_res{block}.{layer}{dot0}.{leaf}"
    inner = {
        "attn_norm": "0.fn.norm",
        "mlp_norm": "1.fn.norm",
        "attn.qkv": "0.fn.fn.to_qkv",
        "attn.proj": "0.fn.fn.to_out.0",
        "mlp.0": "1.fn.fn.net.0",
        "mlp.3": "1.fn.fn.net.3",
    }
    if part[1] == "layers":
        return f"resnet.head.time_T.transformer.layers.{part[2]}.{inner['.'.join(part[3:-1])]}.{part[-1]}"
    outer = {"pos_embed": "pos_embedding", "norm": "mlp_head.0", "head": "mlp_head.1"}
    return ".".join(["resnet.head.time_T", outer.get(part[1], part[1]), *part[2:]])


def checkpoint_of(model: FTCN, *, prefix="") -> dict[str, torch.Tensor]:
    pooled = {"branch2.b_bn", "branch1_bn"}
    return {prefix + ftcn_name(key, pooled=pooled): value.clone() for key, value in model.state_dict().items()}


def randomised(config) -> FTCN:
    """FTCN with no parameter or statistic left at its start, so that a wrong assignment shows."""
    torch.manual_seed(1)
    model = FTCN(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.1 if "running_var" in name else torch.randn_like(value) * 0.1)
    return model


def test_saved_and_loaded_give_the_same_output(saved):
    path, model = saved
    loaded, info = load_model(path)
    clip = torch.randn(1, 3, 8, 32, 32)
    assert torch.equal(model(clip).logits, loaded(clip).logits)
    assert (loaded.config, info) == (model.config, INFO)
    assert not loaded.training


def test_metadata_holds_config_preprocessing_and_metrics(saved):
    _, metadata = read_weights(saved[0])
    assert json.loads(metadata["preprocessing"]) == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "image_size": 32,
        "num_frames": 8,
        "template": [
            [0.335273, 0.335078],
            [0.660352, 0.329453],
            [0.49832, 0.535156],
            [0.354297, 0.682422],
            [0.653555, 0.677227],
        ],
    }
    assert json.loads(metadata["config"])["num_branches"] == 4
    assert json.loads(metadata["info"])["metrics"] == {"video AUC": 0.5}


def test_converted_ftcn_computes_the_same(tmp_path):
    model = randomised(replace(ftcn_released().branch(), backbone_stages=4))
    torch.save(checkpoint_of(model, prefix="module."), tmp_path / "ftcn.pth")
    convert(tmp_path / "ftcn.pth", tmp_path / "ftcn.safetensors")
    loaded, info = load_model(tmp_path / "ftcn.safetensors")
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.config.backbone_stages == 4
    assert "ftcn.pth" in info.origin
    assert not info.synthetic


@pytest.mark.parametrize("embed_dim", [64, 48], ids=["C = D", "projected"])
def test_sdr_from_ftcn_scores_as_ftcn(embed_dim):
    config = replace(tiny().branch(), num_frames=8, image_size=32, embed_dim=embed_dim)
    ftcn = randomised(config)
    clip = torch.randn(2, 3, 8, 32, 32)
    for V in (1, 4):
        model = sdr_from_ftcn(ftcn, V)
        assert torch.allclose(model(clip).logits, ftcn(clip).logits, atol=1e-5)
        for branch in model.branches:
            assert torch.equal(branch.stem.conv.weight, ftcn.backbone.stem.conv.weight)


@pytest.mark.promise(row="no code from files")
def test_loading_never_runs_a_pickle(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "bomb.pth"
    torch.save({"resnet.head.fc.weight": Bomb()}, path)
    with pytest.raises(
        SDRError,
        match=r"bomb\.pth: is not a bare state_dict .*: it asks for posix\.mkdir, and no code of a file is run",
    ):
        convert(path, tmp_path / "out.safetensors")
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SDRError, match=r"bomb\.pth"):
        convert(path, tmp_path / "out.safetensors")
    with pytest.raises(SDRError, match="not a readable safetensors file"):
        load_model(path)
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_keys_are_listed_by_name(saved, tmp_path):
    path, _ = saved
    tensors, metadata = read_weights(path)
    tensors = dict(tensors)
    del tensors["transformer.cls_token"]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["transformer.norm.weight"] = torch.zeros(3)
    tensors["transformer.norm.bias"] = torch.full((64,), float("nan"))
    resave(path, tensors, metadata)
    with pytest.raises(SDRError) as error:
        load_model(path)
    assert "missing: transformer.cls_token" in str(error.value)
    assert "unexpected: extra.weight" in str(error.value)
    assert "misshapen: transformer.norm.weight [3] instead of [64]" in str(error.value)
    assert "not finite: transformer.norm.bias" in str(error.value)


def test_foreign_state_dict_is_refused_by_key(tmp_path):
    torch.save(
        {"resnet.s1.pathway0_stem.conv.weight": torch.zeros(64, 3, 5, 1, 1), "fc.weight": torch.zeros(1)},
        tmp_path / "x.pth",
    )
    with pytest.raises(SDRError, match=r"missing: backbone\..* and \d+ more; unexpected: fc\.weight"):
        convert(tmp_path / "x.pth", tmp_path / "y.safetensors")


@pytest.mark.promise(row="no code from files")
def test_flipped_bit_is_found(saved):
    path, _ = saved
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(SDRError, match="does not match the sha256"):
        load_model(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64], ids=["empty", "text", "header bomb"])
def test_broken_file_is_one_line(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(SDRError, match=r"broken\.safetensors: is not a readable safetensors file") as error:
        load_model(path)
    assert "\n" not in str(error.value)
    with pytest.raises(SDRError, match=r"broken\.safetensors") as error:
        convert(path, tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)


def test_truncated_file_is_one_line(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SDRError, match="not a readable safetensors file"):
        load_model(path)


def test_missing_file_folder_and_foreign_safetensors(tmp_path):
    with pytest.raises(SDRError, match="no such weights file"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(SDRError, match="is not a regular file"):
        load_model(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(SDRError, match="has format None, expected 'sdr-1'"):
        load_model(tmp_path / "foreign.safetensors")


def test_unknown_configuration_field_is_refused(saved):
    path, _ = saved
    tensors, metadata = read_weights(path)
    config = json.loads(metadata["config"]) | {"heads_of_state": 3}
    resave(path, tensors, metadata | {"config": json.dumps(config)})
    with pytest.raises(SDRError, match=r"cannot build: .*heads_of_state"):
        load_model(path)


@pytest.mark.promise(row="no code from files")
def test_huge_configuration_is_refused_before_memory_is_taken(saved):
    path, _ = saved
    tensors, metadata = read_weights(path)
    config = json.loads(metadata["config"]) | {"width": 2**20}
    resave(path, tensors, metadata | {"config": json.dumps(config)})
    with pytest.raises(SDRError, match="misshapen"):
        load_model(path)


@pytest.mark.promise(row="atomic")
def test_old_weights_survive_a_failed_write(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SDRError, match="cannot be written: No space left on device"):
        save_weights(path, model, INFO)
    assert path.read_bytes() == before
    assert [p.name for p in Path(path.parent).iterdir()] == [path.name]


def test_demonstration_weights_say_what_they_are():
    from sdr.checkpoint import DEMONSTRATION

    assert DEMONSTRATION.stat().st_size < 2 * 2**20
    model, info = load_model(DEMONSTRATION)
    assert info.synthetic
    assert model.config.num_branches == 4
    assert load_file(DEMONSTRATION)


@pytest.mark.promise(row="no code from files")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config", json.dumps({"width": 8.0}), "width must be at least 1 and a whole number"),
        ("config", json.dumps({"width": 10**15}), "width must be"),
        ("config", json.dumps({"temporal_kernels": "no"}), "temporal_kernels must be true or false"),
        ("config", "[" * 100_000, "cannot build"),
        ("config", "[]", "cannot build"),
        ("info", "{", "cannot build"),
        ("model", "GPT", "cannot build"),
        ("preprocessing", json.dumps({"mean": [0, 0, 0]}), "preprocessing that this version does not do: {'mean': "),
    ],
)
def test_odd_metadata_is_one_line(saved, field, value, message):
    path, _ = saved
    tensors, metadata = read_weights(path)
    resave(path, tensors, metadata | {field: value})
    with pytest.raises(SDRError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.promise(row="no code from files")
def test_changed_metadata_is_found(saved):
    path, _ = saved
    tensors, metadata = read_weights(path)
    save_file(tensors, path, metadata | {"info": metadata["info"].replace("0.5", "0.9")})
    with pytest.raises(SDRError, match="does not match the sha256"):
        load_model(path)


@pytest.mark.promise(row="no code from files")
@pytest.mark.parametrize(
    "state",
    [
        {1: torch.zeros(1)},
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": torch.zeros(1, device="meta")},
        {"a": 1},
        [torch.zeros(1)],
    ],
    ids=["key", "sparse", "meta", "number", "list"],
)
def test_other_than_dense_tensors_by_name_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(SDRError, match="is not a bare state_dict of dense tensors"):
        convert(tmp_path / "x.pth", tmp_path / "y.safetensors")


@pytest.mark.promise(row="no code from files")
def test_mutated_checkpoints_are_one_line(tmp_path):
    """200 damaged copies: each converts, or is one line; nothing else comes out."""
    rng = np.random.default_rng(0)
    path = tmp_path / "x.pth"
    for legacy in (False, True):
        torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=not legacy)
        original = path.read_bytes()
        for _ in range(100):
            data = bytearray(original[: rng.integers(2, len(original) + 1)])
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(256)
            path.write_bytes(data)
            with pytest.raises(SDRError) as error:
                convert(path, tmp_path / "y.safetensors")
            assert "\n" not in str(error.value)


def test_tensor_named_twice_is_refused(tmp_path):
    torch.save({"module.a": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(SDRError, match="names a tensor twice"):
        convert(tmp_path / "x.pth", tmp_path / "y.safetensors")


def test_one_checkpoint_converts_to_the_same_content(tmp_path):
    ftcn = randomised(replace(tiny().branch(), num_frames=8, image_size=32))
    for name in ("a", "b"):
        save_weights(tmp_path / name, sdr_from_ftcn(ftcn, 2), INFO)
        torch.rand(1)
    # the order of a safetensors header's metadata is not fixed, so the hash inside is compared and not the bytes
    assert read_weights(tmp_path / "a")[1]["sha256"] == read_weights(tmp_path / "b")[1]["sha256"]


@pytest.mark.parametrize("stages", [3, 4], ids=["res4", "res5"])
def test_every_published_key_has_its_place(stages):
    """Keys and shapes of the published checkpoints, as facts beside this file."""
    published = json.loads((Path(__file__).parent / f"ftcn_keys_res{stages + 1}.json").read_text())
    with torch.device("meta"):
        model = FTCN(replace(ftcn_released().branch(), backbone_stages=stages))
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert {rename_ftcn_key(name): shape for name, shape in published.items()} == ours
    assert len(published) == len(ours)
