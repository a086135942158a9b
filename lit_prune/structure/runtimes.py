"""What runs a network where its seconds are counted: PyTorch on the network's device, or ONNX Runtime on the CPU."""

import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[], Any]
_OPSET, _IR = 17, 9  # every ONNX Runtime of the last years reads them


class Runtime(Protocol):
    """Makes functions that do the work once and wait for its end.

    Attributes:
        copies: of the layer in what `layers` makes.
    """

    copies: int

    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""

    def layers(self, modules: Sequence[Any], values: Tensor) -> Run | None:
        """A pass of a layer and of the norm and activations behind it; None for a layer that it cannot run alone."""

    def network(self, model: nn.Module, values: Tensor) -> Run:
        """A pass of a whole network."""


class Eager:
    """PyTorch, as the network lies."""

    copies = 1

    def missing(self) -> list[str]:
        """None."""
        return []

    def layers(self, modules: Sequence[Any], values: Tensor) -> Run | None:
        """The modules themselves."""
        return self.network(nn.Sequential(*modules), values)

    def network(self, model: nn.Module, values: Tensor) -> Run:
        """The network itself; call it in evaluation mode and inference mode."""

        def run() -> None:
            model(values)
            if values.is_cuda:
                torch.cuda.synchronize(values.device)

        return run


class OnnxRuntime:
    """ONNX Runtime on the CPU, with the threads that torch has; the first network that it is given is exported once."""

    copies = 4

    def __init__(self) -> None:
        self._first: tuple[nn.Module, torch.Size, Run] | None = None

    def missing(self) -> list[str]:
        """What the extra brings."""
        return [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]

    def layers(self, modules: Sequence[Any], values: Tensor) -> Run | None:
        """Copies of the layer beside each other, so that how maps are laid out at both ends weighs little.

        The norm and the activation are merged into the layer, as they are in a whole network.
        """
        written = _written(modules[0], values, self.copies)
        return None if written is None else onnx_session(written, values)

    def network(self, model: nn.Module, values: Tensor) -> Run:
        """The exported network."""
        if self._first is not None and self._first[0] is model and self._first[1] == values.shape:
            return self._first[2]
        from lit_prune.export import export_module

        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode(False):
            found = export_module(model, values.shape[1:], Path(scratch), ("onnx",))
            run = onnx_session(Path(found["onnx"]["file"]).read_bytes(), values)
        self._first = self._first or (model, values.shape, run)
        return run


def onnx_session(model: bytes, values: Tensor) -> Run:
    """A pass of an ONNX model on the CPU, with the threads that torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: values.cpu().float().numpy()}
    return lambda: session.run(None, given)


def _written(module: Any, values: Tensor, copies: int) -> bytes | None:
    """The layer as an ONNX model; None for one that is no plain convolution or linear layer."""
    from onnx import TensorProto, helper, numpy_helper

    linear = type(module) is nn.Linear
    if not linear and type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return None
    if not linear and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return None
    weight = module.weight.detach().cpu().float()
    tensors = {} if linear else {"bias": torch.zeros(len(weight))}
    nodes = []
    for k in range(copies):
        tensors[f"weight{k}"] = (weight.T if linear else weight) + k  # equal ones would be computed once
        if linear:
            nodes.append(helper.make_node("Gemm" if values.dim() == 2 else "MatMul", ["x", f"weight{k}"], [f"z{k}"]))
        else:
            shape = {"kernel_shape": module.kernel_size, "strides": module.stride, "dilations": module.dilation}
            shape |= {"pads": [*module.padding, *module.padding], "group": module.groups}
            nodes.append(helper.make_node("Conv", ["x", f"weight{k}", "bias"], [f"z{k}"], **shape))
    nodes.append(helper.make_node("Sum", [f"z{k}" for k in range(copies)], ["y"]))
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)]
    ends += [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    constants = [numpy_helper.from_array(np.ascontiguousarray(value.numpy()), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    written: bytes = model.SerializeToString()
    return written
