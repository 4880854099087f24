"""TensorRT as a peer: the model as ONNX, built into an engine in 16 bits, and timed on torch's own tensors.

``python bench/tensorrt_peer.py --clips 16 --onnx model.onnx`` exports and, where the package ``tensorrt`` is, prints
seconds as JSON. Written from TensorRT 10's documentation; the export is tested, the engine has not been run yet.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from inputs import random_model, random_views
from machine import SMALL
from torch import Tensor, nn

from sdr import SDRModel, ftcn_released
from sdr.timing import measure

OPSET = 18
OUTPUTS = ("logits", "tokens")


class Exported(nn.Module):
    """What an engine returns of a model: logits and joint tokens."""

    def __init__(self, model: SDRModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(views)
        return output.logits, output.tokens


def export(model: SDRModel, views: Tensor, path: Path) -> None:
    """Write ONNX of the model for views of these sizes, [B, V, 3, T, H, W]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is deprecated
        torch.onnx.export(
            Exported(model).eval(),
            (views,),
            str(path),
            input_names=["views"],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            dynamo=False,
        )


def engine(path: Path, views: Tensor, shapes: dict[str, tuple[int, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A call that runs the engine of an ONNX file on views, which it reads where they are.

    Args:
        path: of the file; its tensors' dtypes are the engine's.
        views: an example, on a GPU.
        shapes: of the outputs by name.

    Raises:
        ModuleNotFoundError: TensorRT is not installed.
        RuntimeError: it cannot read the file or build an engine.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError("; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    serialized = builder.build_serialized_network(network, builder.create_builder_config())
    if serialized is None:
        raise RuntimeError("TensorRT built no engine")
    runtime = trt.Runtime(logger)
    built = runtime.deserialize_cuda_engine(serialized)
    context = built.create_execution_context()
    outputs = {name: torch.empty(shape, device=views.device, dtype=views.dtype) for name, shape in shapes.items()}
    for name, tensor in outputs.items():
        context.set_tensor_address(name, tensor.data_ptr())

    def run(views: Tensor) -> tuple[Tensor, ...]:
        context.set_tensor_address("views", views.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT did not run the engine")
        return tuple(outputs.values())

    run.alive = runtime, built  # the context does not hold them
    return run


@torch.no_grad()
def tensorrt_call(model: SDRModel, views: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The engine of a model for contiguous views of these sizes; logits and tokens.

    Raises:
        ModuleNotFoundError: TensorRT is not installed.
    """
    import tensorrt  # noqa: F401, before the export, which takes long

    config = model.config
    shapes = {"logits": (len(views),), "tokens": (len(views), config.num_tokens, config.embed_dim)}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, views, path)
        return engine(path, views, shapes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the export")
    parser.add_argument("--onnx", type=Path, help="write the ONNX file here as well")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    config = replace(ftcn_released(), **SMALL) if options.small else ftcn_released()
    with torch.no_grad():
        model = random_model(config, device).to(dtype)
        views = random_views(config, options.clips, device, dtype).contiguous()
        if options.onnx:
            export(model, views, options.onnx)
        try:
            call = tensorrt_call(model, views)
        except ModuleNotFoundError as error:
            print(f"not measured: {error}")
            return 1
        print(json.dumps({"clips": options.clips, **measure(lambda: call(views), device)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
