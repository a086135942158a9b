"""How the training step is carried out: compiled or not, in which precision, and what is refused."""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError

INDUCTOR_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILERS = ("g++", "clang++", "c++")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
OLDEST_CAPABILITY = (7, 0)  # of CUDA devices that Triton writes code for
LOGGER = logging.getLogger(__name__)


class CompiledForward:
    """The training forward pass of one network through torch.compile; a new structure needs a new one.

    A plain object around a compiled function: a compiled module would stand in the state dict a second time, as
    `_orig_mod.`, and calls of the network itself, such as those of the tracing callbacks with their hooks, stay eager.
    Hooks that the network carries at the first call become part of the compiled code, later ones are not seen.

    Args:
        backbone: network whose structure will not change.
        option: true, a mode of inductor, or the name of another back end.

    Raises:
        InputError: at the first call: the network cannot be compiled here.
    """

    def __init__(self, backbone: nn.Module, option: str | bool) -> None:
        torch.compiler.reset()  # code of earlier structures would count against the limit of recompilations
        self.backbone = backbone
        backend, mode = backend_and_mode(option)
        forward: Callable[[Tensor], Tensor] = lambda images: backbone(images)  # noqa: E731  (a function, not a module)
        self._call = torch.compile(forward, backend=backend, mode=mode)
        self._compiled = False

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, K] of `images` [B, C, H, W]."""
        if self._compiled:
            return self._call(images)
        try:
            logits = self._call(images)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"model.compile: cannot compile this network here ({reason}); set it to false") from error
        self._compiled = True
        return logits


def backend_and_mode(option: str | bool) -> tuple[str, str | None]:
    """Back end of torch.compile and mode of inductor that `option` of the configuration means.

    Raises:
        InputError: neither a mode nor a back end of that name.
    """
    if option is True:
        return "inductor", None
    if option in INDUCTOR_MODES:
        return "inductor", option
    backends = torch.compiler.list_backends(exclude_tags=())
    if option not in backends:
        known = ", ".join((*INDUCTOR_MODES, *backends))
        raise InputError(f"model.compile: {option!r} is unknown; give true, false or one of {known}")
    return str(option), None


def check_compile(option: str | bool, device: torch.device) -> None:
    """Raises InputError where `option` of the configuration cannot compile for `device`."""
    if option is False or backend_and_mode(option)[0] != "inductor":
        return
    lacking = None
    if device.type == "cpu" and not _has_compiler():
        lacking = f"a C++ compiler on the CPU (none of {', '.join(COMPILERS)} found)"
    elif device.type == "cuda" and importlib.util.find_spec("triton") is None:
        lacking = "the package triton"
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        lacking = f"a CUDA device of capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer"
    if lacking:
        raise InputError(f"model.compile: {option} needs {lacking}; set it to false, or to aot_eager to try the rest")


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name)


def check_precision(precision: str, device: torch.device, asked: str | int | None = None) -> None:
    """Raises InputError where the run cannot be carried out in the precision that was asked for.

    One line of warning where it can, but a processor without instructions for it takes many times as long.

    Args:
        precision: what the trainer made of it.
        device: training device.
        asked: what the configuration says; None where that is not known.
    """
    if str(asked) in ("16-mixed", "16") and precision != "16-mixed":
        raise InputError(f"trainer.precision: {asked} is not supported on {device.type}; use bf16-mixed or 32-true")
    if precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision: {precision} keeps weights or images in a type that tracing, pruning and repair do not "
            f"support; use one of {', '.join(PRECISIONS)}"
        )
    if precision == "bf16-mixed" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name(device)
        raise InputError(f"trainer.precision: bf16-mixed is not supported by {name}; use 16-mixed or 32-true")
    if precision == "bf16-mixed" and device.type == "cpu" and not fast_bfloat16():
        _say_slow()


def fast_bfloat16() -> bool:
    """Whether bfloat16 is no slower than float32 here: oneDNN has no kernels for it on processors that stop at AVX2."""
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


@cache
def _say_slow() -> None:
    LOGGER.warning(
        "trainer.precision: bf16-mixed is about ten times slower than 32-true on this processor, which has no "
        "instructions for bfloat16; use 32-true"
    )
