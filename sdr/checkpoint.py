"""Weights: safetensors with configuration, preprocessing, metrics and a hash inside; FTCN checkpoints converted.

Loading never executes code from a file: our own weights are safetensors, and a foreign checkpoint's pickle is not run
but read (:mod:`sdr.torch_file`).
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sdr.config import FTCNConfig, SDRConfig, check, check_count, ftcn_released
from sdr.datasets import shorten
from sdr.errors import SDRError, escape
from sdr.faces import TEMPLATE, TEMPLATE_SIZE
from sdr.files import atomic_file
from sdr.ftcn import FTCN
from sdr.model import SDRModel
from sdr.torch_file import Stored, open_torch_file
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD

FORMAT = "sdr-1"
HEADER_BYTES = 8 << 20  # of a safetensors file; a model's or a run's takes less than 1 MB
NAMED, NAME_LENGTH = 20, 150  # keys that a message lists, and letters of each
DEMONSTRATION = Path(__file__).with_name("demonstration.safetensors")
MODELS = {"FTCN": (FTCN, FTCNConfig), "SDRModel": (SDRModel, SDRConfig)}


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says of itself.

    Args:
        origin: one sentence: where the weights come from.
        synthetic: trained on synthetic videos, so that they detect nothing real.
        metrics: name to figure, measured when the weights were made.
        training: settings of the run that made them.
    """

    origin: str = ""
    synthetic: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {"origin": str, "synthetic": bool, "metrics": Mapping, "training": Mapping}
        for name, kind in kinds.items():
            check(isinstance(getattr(self, name), kind), name, f"be a {kind.__name__}", getattr(self, name))
        numbers = all(isinstance(v, float) or (isinstance(v, int) and abs(v) < 2**53) for v in self.metrics.values())
        check(numbers, "metrics", "hold numbers", self.metrics)


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 over the metadata without its hash, then names, dtypes, shapes and bytes, each in the order of names."""
    sha = hashlib.sha256(json.dumps(sorted(item for item in metadata.items() if item[0] != "sha256")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def save_weights(
    path: str | Path, model: FTCN | SDRModel, info: WeightsInfo, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the model's parameters and buffers, with everything that is needed to run it, atomically.

    Args:
        path: safetensors file to write.
        model: whose class and configuration are written.
        info: what the file is to say of itself.
        state: the tensors; None takes the model's own.
    """
    metadata = {
        "format": FORMAT,
        "model": next(name for name, (kind, _) in MODELS.items() if isinstance(model, kind)),
        "config": json.dumps(asdict(model.config)),
        "preprocessing": json.dumps(preprocessing(model.config)),
        "info": json.dumps(asdict(info)),
    }
    write_tensors(path, model.state_dict() if state is None else state, metadata)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with a hash over its tensors and metadata, atomically."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(tensors, {**metadata, "sha256": digest(tensors, metadata)})
    size = int.from_bytes(data[:8], "little")
    # safetensors' own order is random; and an escape \u00e9 could change to \u00E9 unnoticed
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with atomic_file(path) as file:
        for part in (len(header).to_bytes(8, "little"), header, memoryview(data)[8 + size :]):
            file.write(part)


def preprocessing(config: FTCNConfig) -> dict:
    """What a clip must be before it reaches the model."""
    return {
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "image_size": config.image_size,
        "num_frames": config.num_frames,
        "template": (TEMPLATE / TEMPLATE_SIZE).round(6).tolist(),
    }


def read_weights(path: str | Path, expected: str = FORMAT) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file written by :func:`write_tensors`, its hash checked.

    Args:
        path: of the file.
        expected: its format; by default that of :func:`save_weights`.

    Raises:
        SDRError: missing, not safetensors, damaged, or not ours.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path, "weights file")
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > HEADER_BYTES:
            raise ValueError(f"its header says that it has {size} bytes")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, ValueError) as error:
        hint = "a .pth of FTCN is read by `sdr convert`" if is_torch_file(path) else ""
        raise SDRError(path, f"is not a readable safetensors file: {say(error)}", hint) from error
    if metadata.get("format") != expected:
        raise SDRError(path, f"has format {shorten(metadata.get('format'))}, expected {expected!r}")
    if digest(tensors, metadata) != metadata.get("sha256"):
        raise SDRError(path, "is damaged: its content does not match the sha256 written with it")
    return tensors, metadata


def say(error: object) -> str:
    """An error about a file, or what is in there, in one line of bounded length."""
    return escape(str(error).split("\n")[0][:300])


def check_file(path: str | Path, what: str) -> None:
    """Raise SDRError unless ``path`` is a regular file or a link to one; a path that no system takes is none."""
    if not os.path.isfile(path):
        inside = Path(path) / "model.safetensors"
        hint = f"there is a {inside.name} in it" if os.path.isfile(inside) else ""
        raise SDRError(path, "is not a regular file" if os.path.exists(path) else f"no such {what}", hint)


def is_torch_file(path: str | Path) -> bool:
    with open(path, "rb") as file:
        magic = file.read(2)
    return magic == b"PK" or magic[:1] == b"\x80"  # zip, or the pickle of old versions


def load_model(path: str | Path, kind: type | None = None) -> tuple[FTCN | SDRModel, WeightsInfo]:
    """Build the model that a weights file describes and load it, in evaluation mode on the CPU.

    Args:
        path: of the file.
        kind: class to build, the file's or one derived from it; None is the file's.

    Raises:
        SDRError: the file cannot be read, holds another kind of model, its configuration is not one of this version's,
            or its keys, shapes or values do not fit.
    """
    tensors, metadata = read_weights(path)
    try:
        model_class, config_class = MODELS[metadata["model"]]
        if not issubclass(kind or model_class, model_class):
            other, wanted = metadata["model"], kind.__name__
            raise SDRError(path, f"holds weights of {other}, not of {wanted}", f"load it with {other}.from_pretrained")
        config = config_class(**json.loads(metadata["config"]))
        info = WeightsInfo(**json.loads(metadata["info"]))
        expects = json.loads(metadata["preprocessing"])
        model = build_from(path, kind or model_class, config, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise SDRError(path, f"describes a model that this version cannot build: {say(error)}") from error
    if expects != preprocessing(config):
        raise SDRError(path, f"was trained with preprocessing that this version does not do: {say(expects)}")
    model.weights_info = info
    return model.eval(), info


def build_from(path: str | Path, model_class: type, config: FTCNConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model with these tensors; the allocation waits until the shapes have been compared."""
    # a module or two for each layer would be made before there is a shape to compare
    layers = max(config.depth, *config.blocks, getattr(config, "num_branches", 1))
    if layers > len(tensors):
        raise SDRError(path, f"describes {layers} layers or branches and has {len(tensors)} tensors")
    with torch.device("meta"):
        model = model_class(config)
    check_tensors(path, model.state_dict(), tensors)
    model = model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    return model


FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # any of them where one is expected


def check_tensors(
    path: str | Path, expected: Mapping[str, Tensor], given: Mapping[str, Tensor] | Mapping[str, Stored]
) -> None:
    """Raise SDRError that lists missing, unexpected and misshapen keys, other types of number, and NaN or Inf."""
    both = [name for name in expected if name in given]
    shapes = ((n, list(given[n].shape), list(expected[n].shape)) for n in both)
    kinds = ((n, given[n].dtype, expected[n].dtype) for n in both)
    problems = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "misshapen": [f"{name} {got} instead of {wanted}" for name, got, wanted in shapes if got != wanted],
        "of another type": [
            f"{name} {got} instead of {wanted}"
            for name, got, wanted in kinds
            if got != wanted and not {got, wanted} <= FLOATS
        ],
        "not finite": [
            name
            for name in both
            if isinstance(given[name], Tensor) and given[name].dtype in FLOATS and not given[name].isfinite().all()
        ],
    }
    if any(problems.values()):
        raise SDRError(path, "; ".join(f"{label}: {some(names)}" for label, names in problems.items() if names))


def some(names: Sequence[str]) -> str:
    """The first names as a message may quote them: out of a file they may be long, many, and of any characters."""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(escape(name[:NAME_LENGTH]) for name in names[:NAMED]) + rest


# FTCN's names, in the order of application; facts of its published checkpoint
FTCN_RENAMES = (
    (r"^module\.", ""),
    (r"^resnet\.s1\.pathway0_stem\.", "backbone.stem."),
    (r"^resnet\.s(\d)\.pathway0_res(\d+)\.(?:branch2\.)?", r"backbone.res\1.\2."),
    (r"^(backbone\..*bn)\.0\.", r"\1."),  # `.0.` is the BN of a BN-and-pool pair
    (r"^resnet\.head\.fc\.", "proj."),
    (r"^resnet\.head\.time_T\.", "transformer."),
    (r"\.pos_embedding$", ".pos_embed"),
    (r"^transformer\.transformer\.layers\.(\d+)\.", r"transformer.layers.\1."),
    (r"^(transformer\.layers\.\d+)\.0\.fn\.norm\.", r"\1.attn_norm."),
    (r"^(transformer\.layers\.\d+)\.0\.fn\.fn\.to_qkv\.", r"\1.attn.qkv."),
    (r"^(transformer\.layers\.\d+)\.0\.fn\.fn\.to_out\.0\.", r"\1.attn.proj."),
    (r"^(transformer\.layers\.\d+)\.1\.fn\.norm\.", r"\1.mlp_norm."),
    (r"^(transformer\.layers\.\d+)\.1\.fn\.fn\.net\.", r"\1.mlp."),
    (r"^transformer\.mlp_head\.0\.", "transformer.norm."),
    (r"^transformer\.mlp_head\.1\.", "transformer.head."),
)


def rename_ftcn_key(key: str) -> str:
    """A key of FTCN's checkpoint as a key of :class:`sdr.ftcn.FTCN`; a key of neither comes back unchanged."""
    for pattern, replacement in FTCN_RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def read_ftcn_checkpoint(path: str | Path) -> FTCN:
    """FTCN with the weights of its published checkpoint, which ends at res4 or at res5.

    Raises:
        SDRError: not a file of tensors, or keys that are not FTCN's; lists them by name.
    """
    check_file(path, "checkpoint")
    if not is_torch_file(path):
        raise SDRError(path, "is not a checkpoint written by torch.save")
    with open_torch_file(path) as file:
        names = {name: rename_ftcn_key(name) for name in file.tensors}
        if len(set(names.values())) != len(names):
            raise SDRError(path, "names a tensor twice, with and without `module.`")
        stages = 4 if any(name.startswith("backbone.res5.") for name in names.values()) else 3
        config = replace(ftcn_released().branch(), backbone_stages=stages)
        with torch.device("meta"):
            expected = FTCN(config).state_dict()
        check_tensors(path, expected, {names[name]: stored for name, stored in file.tensors.items()})
        tensors = {names[name]: tensor for name, tensor in file.read().items()}
    return build_from(path, FTCN, config, tensors)


def sdr_from_ftcn(ftcn: FTCN, num_branches: int = 4) -> SDRModel:
    """An SDRModel with every branch and the transformer from FTCN.

    W starts as the mean over branches (then FTCN's own projection, where it has one), so that with the same clip for
    all branches the logit is FTCN's. TRFI's heads keep their random start: scoring does not use them.
    """
    config = SDRConfig(**asdict(ftcn.config), num_branches=num_branches)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the heads' start, so that one checkpoint always converts to the same bytes
        model = SDRModel(config)
    for branch in model.branches:
        branch.load_state_dict(ftcn.backbone.state_dict())
    model.transformer.load_state_dict(ftcn.transformer.state_dict())
    if num_branches == 1:
        model.trfi.proj.load_state_dict(ftcn.proj.state_dict())
        return model.eval()
    projected = isinstance(ftcn.proj, nn.Linear)
    weight = ftcn.proj.weight if projected else torch.eye(config.embed_dim)
    with torch.no_grad():
        model.trfi.proj.weight.copy_(weight.repeat(1, num_branches) / num_branches)
        model.trfi.proj.bias.copy_(ftcn.proj.bias if projected else torch.zeros(config.embed_dim))
    return model.eval()


def convert(source: str | Path, target: str | Path, *, to: str = "ftcn", num_branches: int = 4) -> nn.Module:
    """Read an FTCN checkpoint and write our safetensors; returns the model.

    Args:
        source: FTCN's published checkpoint (.pth).
        target: safetensors file to write.
        to: ``ftcn`` (the single-branch model), or ``sdr`` (all branches of an SDRModel start from it).
        num_branches: V, for ``sdr``.
    """
    if to not in ("ftcn", "sdr"):
        raise ValueError(f"to must be ftcn or sdr, got {to!r}")
    check_count("num_branches", num_branches)
    model = read_ftcn_checkpoint(source)
    if to == "sdr":
        model = sdr_from_ftcn(model, num_branches)
    origin = f"converted from the FTCN checkpoint {Path(source).name}"
    if to == "sdr":
        origin += f" into {num_branches} branches; TRFI is untrained, so the score is FTCN's until it is trained"
    save_weights(target, model, WeightsInfo(origin=origin))
    return model
