"""Weights: safetensors with configuration, preprocessing, metrics and a hash inside; FTCN checkpoints converted.

Loading never executes code from a file: our own weights are safetensors, and a foreign checkpoint is read with
``torch.load(weights_only=True)``.
"""

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sdr.config import FTCNConfig, SDRConfig, check, check_count, ftcn_released
from sdr.errors import SDRError
from sdr.faces import TEMPLATE, TEMPLATE_SIZE
from sdr.files import atomic_file
from sdr.ftcn import FTCN
from sdr.model import SDRModel
from sdr.tpa import IMAGENET_MEAN, IMAGENET_STD

FORMAT = "sdr-1"
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
        numbers = all(isinstance(value, int | float) for value in self.metrics.values())
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
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode()  # safetensors' own order is random
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
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, ValueError) as error:
        hint = "a .pth of FTCN is read by `sdr convert`" if is_torch_file(path) else ""
        raise SDRError(path, f"is not a readable safetensors file: {error}".split("\n")[0], hint) from error
    if metadata.get("format") != expected:
        raise SDRError(path, f"has format {metadata.get('format')!r}, expected {expected!r}")
    if digest(tensors, metadata) != metadata.get("sha256"):
        raise SDRError(path, "is damaged: its content does not match the sha256 written with it")
    return tensors, metadata


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
        raise SDRError(path, f"describes a model that this version cannot build: {error}".split("\n")[0]) from error
    if expects != preprocessing(config):
        raise SDRError(path, f"was trained with preprocessing that this version does not do: {expects}")
    model.weights_info = info
    return model.eval(), info


def build_from(path: str | Path, model_class: type, config: FTCNConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A model with these tensors; the allocation waits until the shapes have been compared."""
    with torch.device("meta"):
        model = model_class(config)
    check_tensors(path, model.state_dict(), tensors)
    model = model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    return model


def check_tensors(path: str | Path, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise SDRError that lists missing, unexpected and misshapen keys by name, and tensors with NaN or Inf."""
    problems = []
    for label, names in (
        ("missing", [n for n in expected if n not in given]),
        ("unexpected", [n for n in given if n not in expected]),
        (
            "misshapen",
            [
                f"{n} {list(given[n].shape)} instead of {list(expected[n].shape)}"
                for n in expected
                if n in given and given[n].shape != expected[n].shape
            ],
        ),
        ("not finite", [n for n in given if given[n].is_floating_point() and not given[n].isfinite().all()]),
    ):
        if names:
            problems.append(f"{label}: {', '.join(names)}")
    if problems:
        raise SDRError(path, "; ".join(problems))


# what torch.load raises for a damaged file, besides its own error
TORCH_LOAD_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol; the outcome below is what the user is told
            state = torch.load(path, map_location="cpu", weights_only=True)
    except TORCH_LOAD_ERRORS as error:
        if "unsupported" in str(error).lower():  # how the restricted unpickler refuses a global or an instruction
            raise SDRError(path, "holds more than tensors, and loading it would run code from it") from error
        cause = type(error).__name__ if isinstance(error, pickle.UnpicklingError) else str(error).split("\n")[0]
        raise SDRError(path, f"is not a readable checkpoint: {cause}") from error
    if not isinstance(state, Mapping) or not all(map(is_plain_tensor, state.keys(), state.values())):
        raise SDRError(path, "is not a bare state_dict of dense tensors")
    tensors = {
        rename_ftcn_key(key): tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()
    }
    if len(tensors) != len(state):
        raise SDRError(path, "names a tensor twice, with and without `module.`")
    stages = 4 if any(key.startswith("backbone.res5.") for key in tensors) else 3
    return build_from(path, FTCN, replace(ftcn_released().branch(), backbone_stages=stages), tensors)


def is_plain_tensor(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


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
