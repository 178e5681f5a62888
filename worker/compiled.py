"""A network in evaluation mode -> the fastest engine on this machine that gives the same values.

On the CPU that is OpenVINO in fp32: eager PyTorch reorders each convolution's weights at every call and leaves batch
norms and additions as passes of their own, OpenVINO does this once. On CUDA, and wherever OpenVINO is absent, cannot
express the network or does not give PyTorch's values, it is PyTorch, and the log and the engine's name say so.

OpenVINO's own converter is not used: tracing costs 2.6 s of CPU at every start, walking the graph 0.3 s.
"""

import logging
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx, nn

from models.resnet50 import Floats, PackageNetwork, Precision, infer

log = logging.getLogger(__name__)

BATCH = 32  # pictures at a time: bounds the memory of an unusually large call
STREAMS = 4  # vertebrae of a study: side by side on cores of their own they take less than one after the other on all
PROBE = (32, 64, 64)  # voxels; published networks halve their input five times
SAME_CLASSES = 0.999  # of the voxels of pure noise, where many margins are near nothing
# g/cm2 and TBS, between engines of one precision: those of fp32 differ by 1e-6, those of bf16 round at other places
SAME: Mapping[Precision, float] = {"fp32": 0.0005, "bf16": 0.004}


class NotCompilable(Exception):
    """The network holds an operation that has no translation here; the text names it."""


class Engine(Protocol):
    """Pictures [n >= 1, channels, rows, columns] -> targets [n, targets] in their own units; any thread may call it."""

    @property
    def name(self) -> str: ...
    def __call__(self, pictures: Floats) -> Floats: ...


@dataclass(frozen=True)
class TorchEngine:
    """The network as PyTorch runs it."""

    network: PackageNetwork
    device: torch.device
    precision: Precision

    @property
    def name(self) -> str:
        return f"PyTorch {torch.__version__} {self.precision}"

    def __call__(self, pictures: Floats) -> Floats:
        return infer(self.network, pictures, device=self.device, precision=self.precision, batch=BATCH)


@dataclass(frozen=True)
class OpenVinoEngine:
    """The network compiled for this CPU. One study at a time; its pictures are spread over the streams."""

    name: str
    requests: Sequence[Any]  # of openvino.InferRequest, one for each stream
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __call__(self, pictures: Floats) -> Floats:
        with self._lock:
            starts = range(0, len(pictures), BATCH * len(self.requests))
            parts = [self._side_by_side(pictures[at : at + BATCH * len(self.requests)]) for at in starts]
        return np.concatenate(parts)

    def _side_by_side(self, pictures: Floats) -> Floats:
        shares = np.array_split(pictures, min(len(pictures), len(self.requests)))
        running = self.requests[: len(shares)]
        with ExitStack() as waits:  # for all of them, also where one fails: the next study finds none at work
            for request, share in zip(running, shares, strict=True):
                request.start_async({0: np.ascontiguousarray(share)})
                waits.callback(request.wait)
        return np.concatenate([request.get_output_tensor(0).data for request in running])  # a copy


def fastest(network: PackageNetwork, device: torch.device, precision: Precision, example: Floats) -> Engine:
    """The engine for this machine, after it gave PyTorch's values for `example` [n, channels, rows, columns]."""
    plain = TorchEngine(network, device, precision)
    if device.type != "cpu":
        return plain
    try:
        made = compile_for_cpu(network, torch.get_num_threads(), precision)
        off = float(np.abs(made(example) - plain(example)).max())
    except (ImportError, NotCompilable, RuntimeError) as error:
        log.warning("predicting with %s: OpenVINO cannot be used (%s)", plain.name, error)
        return plain
    if not off <= SAME[precision]:  # not finite is not the same
        log.warning("predicting with %s: %s differs from it by %g", plain.name, made.name, off)
        return plain
    log.info("predicting with %s", made.name)
    return made


def compile_for_cpu(network: nn.Module, threads: int, precision: Precision = "fp32") -> OpenVinoEngine:
    """Compile for this CPU, any number of pictures of any size.

    The precision by name: left alone, OpenVINO takes bf16 where the CPU has it.

    Raises:
        ImportError: OpenVINO is not installed.
        NotCompilable: an operation of the network has no translation.
    """
    return _compile(translate(network), threads, min(threads, STREAMS), precision)


def fastest_volume(network: nn.Module, device: torch.device, precision: torch.dtype) -> OpenVinoEngine | None:
    """The engine for a 3-D network on this machine and tiles [1, 1, z, y, x] of any size; None: PyTorch.

    It is taken only where it gives PyTorch's classes on a probe of noise.
    """
    if device.type != "cpu" or precision != torch.float32:
        return None
    probe = np.random.default_rng(0).standard_normal((1, 1, *PROBE), dtype=np.float32)
    try:
        made = _compile(translate(network, (1, 1, -1, -1, -1)), torch.get_num_threads(), 1)  # a tile at a time
        with torch.inference_mode():
            plain = network(torch.from_numpy(probe)).numpy()
        agree = float((made(probe).argmax(axis=1) == plain.argmax(axis=1)).mean())
    except (ImportError, NotCompilable, RuntimeError) as error:
        log.warning("segmenting with PyTorch: OpenVINO cannot be used (%s)", error)
        return None
    if agree < SAME_CLASSES:
        log.warning("segmenting with PyTorch: %s gives other classes in %.2f %%", made.name, 100 * (1 - agree))
        return None
    return made


def _compile(model: Any, threads: int, streams: int, precision: Precision = "fp32") -> OpenVinoEngine:
    openvino, _ = _import_openvino()
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams,
        "ENABLE_CPU_PINNING": False,  # the cores are shared with the listener and the steward
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    version = openvino.__version__.split("-")[0]  # "2026.4.1" of "2026.4.1-22982-<commit>"
    return OpenVinoEngine(f"OpenVINO {version} {precision}", [compiled.create_infer_request() for _ in range(streams)])


def translate(network: nn.Module, shape: Sequence[int] | None = None) -> Any:
    """A network in evaluation mode -> openvino.Model with one input of this shape; None: pictures [n, channels, rows,
    columns] of any size.

    Raises:
        NotCompilable: it is in training mode, its course depends on its values, or it holds another operation.
    """
    openvino, ops = _import_openvino()
    if network.training:
        raise NotCompilable("the network is in training mode")
    try:
        graph = fx.symbolic_trace(network)
    except Exception as error:  # the network's own code meets a proxy: whatever it raises means the same
        raise NotCompilable(f"its graph cannot be read: {error}") from error
    if shape is None:
        channels = next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)
        shape = (-1, channels, -1, -1)
    pictures = ops.parameter(list(shape), np.float32, name="pictures")
    answer = _Translator(graph, ops).run(pictures)
    return openvino.Model([answer], [pictures], type(network).__name__)


class _Translator(fx.Interpreter):
    """Runs the graph with OpenVINO's nodes in the place of tensors; what it does not know, it refuses."""

    def __init__(self, graph: fx.GraphModule, ops: Any) -> None:
        super().__init__(graph)
        self.extra_traceback = False  # a refusal carries its own sentence
        self.ops = ops

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        made = _MODULES.get(type(module))
        if made is None or kwargs:
            raise NotCompilable(f"{type(module).__name__} ({target})")
        return made(self.ops, module, *args)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = _FUNCTIONS.get(target)
        if made is None or kwargs:
            raise NotCompilable(str(target))
        return made(self.ops, *args)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target != "float" or kwargs:
            raise NotCompilable(f".{target}()")
        return args[0]  # everything is fp32 here

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _constant(self.ops, self.fetch_attr(target))


def _convolution(ops: Any, module: nn.Conv2d | nn.Conv3d, x: Any) -> Any:
    if module.groups != 1 or isinstance(module.padding, str) or module.padding_mode != "zeros":
        raise NotCompilable(f"{module}")
    pads = list(module.padding)
    made = ops.convolution(x, _constant(ops, module.weight), list(module.stride), pads, pads, list(module.dilation))
    return made if module.bias is None else ops.add(made, _per_channel(ops, module.bias, module))


def _transposed_convolution(ops: Any, module: nn.ConvTranspose3d, x: Any) -> Any:
    if module.groups != 1 or any(module.output_padding):
        raise NotCompilable(f"{module}")
    pads = list(module.padding)
    weight = _constant(ops, module.weight)
    made = ops.convolution_backprop_data(
        x, weight, strides=list(module.stride), pads_begin=pads, pads_end=pads, dilations=list(module.dilation)
    )
    return made if module.bias is None else ops.add(made, _per_channel(ops, module.bias, module))


def _instance_norm(ops: Any, module: nn.InstanceNorm3d, x: Any) -> Any:
    if not module.affine or module.track_running_stats:
        raise NotCompilable(f"{module}")
    axes = ops.constant(np.array([2, 3, 4], dtype=np.int64))
    centred = ops.mvn(x, axes, True, module.eps, "inside_sqrt")
    scaled = ops.multiply(centred, _per_channel(ops, module.weight, module))
    return ops.add(scaled, _per_channel(ops, module.bias, module))


def _leaky_relu(ops: Any, module: nn.LeakyReLU, x: Any) -> Any:
    return ops.prelu(x, ops.constant(np.array([module.negative_slope], dtype=np.float32)))


def _concatenate(ops: Any, parts: Sequence[Any], dim: int = 0) -> Any:
    return ops.concat(list(parts), dim)


def _batch_norm(ops: Any, module: nn.BatchNorm2d, x: Any) -> Any:
    if not module.affine or not module.track_running_stats:
        raise NotCompilable(f"{module}")
    statistics = (module.weight, module.bias, module.running_mean, module.running_var)
    return ops.batch_norm_inference(x, *(_constant(ops, one) for one in statistics), epsilon=module.eps)


def _max_pool(ops: Any, module: nn.MaxPool2d, x: Any) -> Any:
    if module.ceil_mode or module.return_indices:
        raise NotCompilable(f"{module}")
    stride, dilation, padding, kernel = map(_pair, (module.stride, module.dilation, module.padding, module.kernel_size))
    return ops.max_pool(x, stride, dilation, padding, padding, kernel).output(0)


def _average_pool(ops: Any, module: nn.AdaptiveAvgPool2d, x: Any) -> Any:
    return ops.adaptive_avg_pool(x, np.array(_pair(module.output_size), dtype=np.int64))


def _linear(ops: Any, module: nn.Linear, x: Any) -> Any:
    made = ops.matmul(x, _constant(ops, module.weight), False, True)
    return made if module.bias is None else ops.add(made, _constant(ops, module.bias))


def _flatten(ops: Any, x: Any, start: int = 0, end: int = -1) -> Any:
    if (start, end) != (1, -1):
        raise NotCompilable(f"flatten({start}, {end})")
    return ops.reshape(x, np.array([0, -1]), special_zero=True)


_MODULES: Mapping[type, Callable[..., Any]] = {
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose3d: _transposed_convolution,
    nn.InstanceNorm3d: _instance_norm,
    nn.LeakyReLU: _leaky_relu,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.AdaptiveAvgPool2d: _average_pool,
    nn.Linear: _linear,
    nn.ReLU: lambda ops, module, x: ops.relu(x),
    nn.Identity: lambda ops, module, x: x,
    nn.Dropout: lambda ops, module, x: x,
}
_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    operator.add: lambda ops, a, b: ops.add(a, b),
    operator.mul: lambda ops, a, b: ops.multiply(a, b),
    torch.flatten: _flatten,
    torch.cat: _concatenate,
}


def _per_channel(ops: Any, tensor: Any, module: nn.Module) -> Any:
    """A vector [channels] that is added to, or multiplied with, [n, channels, ...]."""
    flat = isinstance(module, nn.Conv2d)
    return _constant(ops, tensor.reshape(1, -1, 1, 1) if flat else tensor.reshape(1, -1, 1, 1, 1))


def _constant(ops: Any, tensor: Any) -> Any:
    """Made here: an operation that is given an array turns it into a list first, 15 times slower than the rest."""
    return ops.constant(tensor.detach().cpu().contiguous().float().numpy())


def _pair(size: Any) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def _import_openvino() -> tuple[Any, Any]:
    """OpenVINO and its operations, its telemetry kept out: importing it posts to its makers (RULES.md 10).

    The locks leave `openvino-telemetry` out; where another installer brought it, it finds no way in here either.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # an import of it now fails: a stub is used
    import openvino
    import openvino.opset14 as ops

    return openvino, ops
