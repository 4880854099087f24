"""Models as folders and as repositories: what comes back is what was given. No test leaves this machine."""

import copy
import json
import subprocess
import sys
import threading
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sdr
from sdr import FTCN, SDRError, SDRModel, fast
from sdr.checkpoint import WeightsInfo, load_model, read_weights, save_weights
from sdr.config import SDRConfig

CONFIG = SDRConfig(
    num_frames=4,
    image_size=16,
    width=4,
    backbone_stages=2,
    blocks=(1, 1),
    embed_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_branches=2,
)
INFO = WeightsInfo("of the test", synthetic=True, metrics={"validation video AUC": 0.75}, training={"lr": 0.1})
CLIPS = torch.arange(2 * 3 * 4 * 16 * 16, dtype=torch.float32).reshape(2, 3, 4, 16, 16).remainder(256).to(torch.uint8)
KINDS = [(SDRModel, CONFIG), (fast.SDRModel, CONFIG), (FTCN, CONFIG.branch())]
NAMES = ["reference", "fast", "FTCN"]


def equal_state(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=KINDS, ids=NAMES)
def model(request):
    kind, config = request.param
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():  # gammas of zero would hide a swapped weight
            parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def test_a_folder_gives_back_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path / "m", info=INFO)
    again = type(model).from_pretrained(tmp_path / "m")
    assert type(again) is type(model)
    assert again.config == model.config
    assert not any(part.training for part in again.modules())
    assert equal_state(again, model)
    with torch.inference_mode():
        assert torch.equal(again(CLIPS).logits, model(CLIPS).logits)
    assert again.weights_info == INFO
    for place in (str(tmp_path / "m"), tmp_path / "m" / "model.safetensors"):
        assert equal_state(type(model).from_pretrained(place), model)


def test_the_folder_holds_our_format_its_configuration_and_a_card(model, tmp_path):
    folder = tmp_path / "my model"
    model.save_pretrained(folder, info=INFO)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded, info = load_model(folder / "model.safetensors")
    assert (type(loaded).__name__, info) == (type(model).__name__, INFO)
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model": type(model).__name__} | json.loads(json.dumps(asdict(model.config)))
    card = (folder / "README.md").read_text()
    assert "# my model\n" in card
    assert "| validation video AUC | 0.750 |" in card
    model.save_pretrained(folder, info=INFO, card="# Mine\n")
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_either_sdr_model_loads_the_weights_of_the_other(tmp_path):
    SDRModel(CONFIG).save_pretrained(tmp_path / "reference", info=INFO)
    quick = fast.SDRModel.from_pretrained(tmp_path / "reference")
    assert type(quick) is fast.SDRModel
    quick.save_pretrained(tmp_path / "fast")
    plain = SDRModel.from_pretrained(tmp_path / "fast")
    assert type(plain) is SDRModel
    assert equal_state(quick, plain)
    hashes = [read_weights(tmp_path / name / "model.safetensors")[1]["sha256"] for name in ("reference", "fast")]
    assert hashes[0] == hashes[1]
    with torch.inference_mode():
        torch.testing.assert_close(quick(CLIPS).logits, plain(CLIPS).logits, rtol=1e-4, atol=1e-4)


def test_loading_draws_no_random_number(tmp_path):
    SDRModel(CONFIG).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    fast.SDRModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_weights_say_of_themselves_stays_with_the_model(tmp_path):
    SDRModel(CONFIG).save_pretrained(tmp_path / "a", info=INFO)
    loaded = SDRModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for copied in (
        SDRModel.from_pretrained(tmp_path / "b"),
        copy.deepcopy(loaded),
        fast.SDRModel.from_reference(loaded),
        fast.accelerate(loaded),
        load_model(tmp_path / "a" / "model.safetensors")[0],
    ):
        assert copied.weights_info == INFO
        assert not any("weights_info" in name for name in copied.state_dict())
    assert SDRModel(CONFIG).weights_info is None
    other = WeightsInfo("trained further")
    loaded.save_pretrained(tmp_path / "b", info=other)
    assert SDRModel.from_pretrained(tmp_path / "b").weights_info == other
    SDRModel(CONFIG).save_pretrained(tmp_path / "c")
    assert SDRModel.from_pretrained(tmp_path / "c").weights_info == WeightsInfo()


@pytest.mark.parametrize(
    ("saved", "config", "loads", "line"),
    [
        (SDRModel, CONFIG, FTCN, r"holds weights of SDRModel, not of FTCN \(load it with SDRModel\.from_pretrained\)"),
        (FTCN, CONFIG.branch(), SDRModel, r"holds weights of FTCN, not of SDRModel \(load it with FTCN"),
        (FTCN, CONFIG.branch(), fast.SDRModel, "holds weights of FTCN, not of SDRModel"),
    ],
)
def test_refuses_weights_of_another_class(tmp_path, saved, config, loads, line):
    saved(config).save_pretrained(tmp_path)
    with pytest.raises(SDRError, match=rf"model\.safetensors: {line}"):
        loads.from_pretrained(tmp_path)


@pytest.mark.promise(row="no code from files")
def test_refuses_damage_and_absence(tmp_path):
    SDRModel(CONFIG).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(SDRError, match=r"model\.safetensors: is damaged"):
        SDRModel.from_pretrained(tmp_path / "m")
    path.unlink()
    with pytest.raises(SDRError, match=r"model\.safetensors: no such weights file"):
        SDRModel.from_pretrained(tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(SDRError, match="cannot be made"):
        SDRModel(CONFIG).save_pretrained(tmp_path / "file" / "m")


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "./none",
        "/none/here",
        "a/b/c",
        "a/none.safetensors",
        "~/m",
        "a/../b",
        "a\n/b",
        "a/b\n",
        "\0",
        "",
        Path("a/b"),
    ],
)
def test_only_names_of_repositories_reach_the_hub(name, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(SDRError, match="no such weights file"):
        SDRModel.from_pretrained(name)


# ---------------------------------------------------------------- the Hub


class Hub:
    """Repositories in a folder, behind the functions of huggingface_hub that are called."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        huggingface_hub = pytest.importorskip("huggingface_hub")
        self.folder, self.asked, self.said = folder, [], {}
        monkeypatch.setattr(huggingface_hub, "HfApi", self.api)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def api(self, token, library_name):
        self.said = {"token": token, "library_name": library_name}
        return SimpleNamespace(create_repo=self.create_repo, upload_folder=self.upload_folder)

    def create_repo(self, repo_id, *, private, exist_ok):
        self.said |= {"private": private, "exist_ok": exist_ok}
        return SimpleNamespace(repo_id=f"anna/{repo_id}" if "/" not in repo_id else repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
        self.said |= {"commit_message": commit_message, "revision": revision}
        self.place(repo_id, revision).mkdir(parents=True)
        for path in Path(folder_path).iterdir():
            (self.place(repo_id, revision) / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(self, repo_id, filename, *, revision, **options):
        self.asked.append(options)
        return str(self.place(repo_id, revision) / filename)

    def place(self, repo_id: str, revision: str | None) -> Path:
        return self.folder / repo_id.replace("/", "--") / (revision or "main")


def test_what_is_uploaded_is_what_is_loaded(model, tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    address = model.push_to_hub("m", private=True, token="t", revision="r", commit_message="c", info=INFO)
    assert address == "https://hub/anna/m/commit/1"
    assert hub.said == {
        **{"token": "t", "library_name": "sdr", "private": True, "exist_ok": True},
        **{"commit_message": "c", "revision": "r"},
    }
    files = {path.name: path for path in hub.place("anna/m", "r").iterdir()}
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert f'{type(model).__name__}.from_pretrained("anna/m")' in files["README.md"].read_text()
    again = type(model).from_pretrained("anna/m", revision="r", token="t", cache_dir="d", local_files_only=True)
    assert hub.asked == [{"token": "t", "cache_dir": "d", "local_files_only": True, "library_name": "sdr"}]
    assert equal_state(again, model)
    assert again.weights_info == INFO


def test_the_card_that_is_given_is_uploaded(tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    SDRModel(CONFIG).push_to_hub("anna/m", card="# Mine\n")
    assert (hub.place("anna/m", None) / "README.md").read_text() == "# Mine\n"
    assert hub.said["private"] is None


def test_a_folder_here_comes_before_the_hub(tmp_path, monkeypatch):
    Hub(tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = SDRModel(CONFIG)
    model.save_pretrained("anna/m")
    assert equal_state(SDRModel.from_pretrained("anna/m"), model)
    assert not (tmp_path / "hub").exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub on this machine that answers as its ``answer`` says: status, headers, body by the path's end."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = server.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.answer = lambda path: (404, {}, b"")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    for name in ("hf_hub_download", "HfApi"):
        here = partial(getattr(huggingface_hub, name), endpoint=f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub, name, here)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (404, "RepoNotFound", "no such repository, or one that asks for a token"),
        (401, "", "401 Unauthorized"),
        (403, "GatedRepo", "is a repository whose owner must grant you access"),
        (404, "RevisionNotFound", "has no such revision"),
        (404, "EntryNotFound", r"the repository has no model\.safetensors"),
    ],
)
def test_refusals_of_the_hub_are_one_line(server, tmp_path, status, code, line):
    headers = {"X-Error-Code": code, "X-Repo-Commit": "0" * 40} if code else {}
    server.answer = lambda path: (status, headers, b"")
    with pytest.raises(SDRError, match=rf"anna/m: on the Hugging Face Hub: .*{line}") as caught:
        SDRModel.from_pretrained("anna/m", cache_dir=tmp_path, token=False)
    assert "\n" not in str(caught.value)


def test_a_download_through_huggingface_hub_itself(server, tmp_path):
    model = SDRModel(CONFIG)
    model.save_pretrained(tmp_path / "m", info=INFO)
    data = (tmp_path / "m" / "model.safetensors").read_bytes()
    headers = {"ETag": '"1"', "X-Repo-Commit": "0" * 40}
    server.answer = lambda path: (
        (200, headers, data) if "anna/m/resolve/v1/model.safetensors" in path else (404, {}, b"")
    )
    options = {"revision": "v1", "cache_dir": tmp_path / "cache", "token": False}
    assert equal_state(SDRModel.from_pretrained("anna/m", **options), model)
    server.answer = lambda path: (404, {}, b"")
    assert equal_state(SDRModel.from_pretrained("anna/m", **options, local_files_only=True), model)
    with pytest.raises(SDRError, match="is not in the local cache"):
        SDRModel.from_pretrained("anna/other", **options, local_files_only=True)


def test_a_push_that_is_refused_is_one_line(server):
    server.answer = lambda path: (401, {}, b'{"error": "Invalid credentials"}')
    with pytest.raises(SDRError, match=r"^anna/m: on the Hugging Face Hub: ") as caught:
        SDRModel(CONFIG).push_to_hub("anna/m", token="hf_secret")
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_without_huggingface_hub_folders_still_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = SDRModel(CONFIG)
    model.save_pretrained(tmp_path)
    assert equal_state(SDRModel.from_pretrained(tmp_path), model)
    line = r"anna/m: .*huggingface_hub is not installed \(pip install 'sdr\[hub\]'\)"
    with pytest.raises(SDRError, match=line):
        SDRModel.from_pretrained("anna/m")
    with pytest.raises(SDRError, match=line):
        model.push_to_hub("anna/m")


def test_importing_leaves_the_hub_alone():
    code = "import sys, sdr, sdr.fast, sdr.hub, sdr.model_card; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_demonstration_weights_load(tmp_path):
    path = Path(sdr.__file__).with_name("demonstration.safetensors")
    model = SDRModel.from_pretrained(path)
    assert model.weights_info.synthetic
    save_weights(tmp_path / "again.safetensors", model, model.weights_info)
    assert load_model(tmp_path / "again.safetensors")[1] == model.weights_info
