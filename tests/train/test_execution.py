"""Options of the training step: compiled, in mixed precision, channels last; what is refused; no waiting in a step."""

from contextlib import suppress
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from lit_prune.errors import InputError
from lit_prune.lab.trajectory.gradient_trace import GradientTrace
from lit_prune.structure.record import record_of
from lit_prune.train import execution
from lit_prune.train.axis_trace import AxisTrace
from lit_prune.train.decorrelation import Decorrelation
from lit_prune.train.execution import CompiledForward, backend_and_mode, check_compile, check_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def weights(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def fitted(make_run, folder, option=False, channels_last=False, **options):
    """The module of a finished run."""
    trainer, module, data = make_run(folder, **options)
    module.compilation = option
    if channels_last:
        module.memory_format = torch.channels_last
        module.backbone.to(memory_format=torch.channels_last)
    trainer.fit(module, datamodule=data)
    return module


def test_compiled_run_with_surgery_and_distillation_equals_the_eager_one(make_run, tmp_path):
    """The back end `eager` runs the traced operations as they are: what differs would be lost in tracing."""
    options = {"stages": (("blocks", 1), ("channels", 2)), "max_epochs": 4}
    traces = [AxisTrace(limit=32), GradientTrace(limit=32)]
    plain = weights(fitted(make_run, tmp_path / "plain", **options))
    compiled = weights(fitted(make_run, tmp_path / "compiled", "eager", callbacks=traces, **options))
    assert compiled.keys() == plain.keys()
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_inductor_trains_through_surgery(make_run, tmp_path):
    options = {"stages": (("channels", 1),), "max_epochs": 2, "trainer": {"precision": "bf16-mixed"}}
    module = fitted(make_run, tmp_path, True, channels_last=True, **options)
    assert len(record_of(module.backbone).plans) == 1 and not any("_orig_mod" in name for name in module.state_dict())


@pytest.mark.real  # torch.compile knows no other
def test_each_structure_is_compiled_once_and_the_state_dict_keeps_its_names(tiny_net, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(list(graph.graph.nodes)))
        return graph.forward

    monkeypatch.setattr(execution, "backend_and_mode", lambda option: (backend, None))
    names = list(tiny_net.state_dict())
    forward = CompiledForward(tiny_net, "counted")
    for _ in range(3):
        forward(torch.zeros(2, 3, 8, 8))
    assert len(compiled) == 1 and list(tiny_net.state_dict()) == names


def test_unknown_back_end_is_refused_by_name():
    assert backend_and_mode(True) == ("inductor", None)
    assert backend_and_mode("max-autotune") == ("inductor", "max-autotune")
    with pytest.raises(InputError, match="model.compile: 'fast' is unknown; give true, false or one of default"):
        backend_and_mode("fast")


def test_compilation_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(execution, "_has_compiler", lambda: False)
    with pytest.raises(InputError, match="True needs a C\\+\\+ compiler on the CPU .*; set it to false"):
        check_compile(True, CPU)
    check_compile("aot_eager", CPU), check_compile(False, CPU)


def test_a_device_too_old_to_compile_for_is_refused(monkeypatch):
    monkeypatch.setattr(execution.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(InputError, match="capability 7.0 or newer"):
        check_compile(True, CUDA)


@pytest.mark.real  # torch.compile knows no other
def test_a_network_that_cannot_be_compiled_is_one_line(tiny_net, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(execution, "backend_and_mode", lambda option: (backend, None))
    with pytest.raises(InputError, match="cannot compile this network here .*set it to false") as error:
        CompiledForward(tiny_net, "broken")(torch.zeros(2, 3, 8, 8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_that_change_the_weights_are_refused(precision):
    with pytest.raises(InputError, match=f"trainer.precision: {precision} .*bf16-mixed"):
        check_precision(precision, CPU)


def test_a_precision_that_the_trainer_replaced_is_refused():
    with pytest.raises(InputError, match="16-mixed is not supported on cpu; use bf16-mixed or 32-true"):
        check_precision("bf16-mixed", CPU, asked="16-mixed")


def test_bfloat16_on_a_device_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old device")
    with pytest.raises(InputError, match="bf16-mixed is not supported by an old device; use 16-mixed"):
        check_precision("bf16-mixed", CUDA)


@pytest.mark.parametrize(
    ("precision", "fast", "lines"), [("bf16-mixed", False, 1), ("bf16-mixed", True, 0), ("32-true", False, 0)]
)
def test_a_processor_without_bfloat16_is_warned_of_once(precision, fast, lines, monkeypatch, caplog):
    monkeypatch.setattr(execution, "fast_bfloat16", lambda: fast)
    execution._say_slow.cache_clear()
    for _ in range(2):
        check_precision(precision, CPU)
    assert [("use 32-true" in line) for line in caplog.messages] == [True] * lines


def test_decorrelation_of_a_compiled_step_is_refused(make_run, tmp_path):
    with pytest.raises(InputError, match="Decorrelation cannot be compiled; set it to false"):
        fitted(make_run, tmp_path, "eager", stages=(), callbacks=[Decorrelation()])


class Waits(TorchDispatchMode):
    """Collects what makes the host wait for a device: values read, and shapes that depend on values."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0].lstrip("_")
        if name in {read.lstrip("_") for read in self.READS}:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class Watch(Callback):
    """Reads of each training step by epoch and batch."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int], list[str]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.mode = Waits()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.mode.__exit__(None, None, None)
        self.steps[trainer.current_epoch, batch_idx] = self.mode.found


def test_a_step_waits_for_the_device_only_where_it_logs(make_run, tmp_path):
    watch = Watch()
    options = {"trainer": {"log_every_n_steps": 2, "gradient_clip_val": 1.0}, "optimizer": SGD}
    trainer, module, data = make_run(tmp_path, (("channels", 1),), 2, [watch, Decorrelation()], **options)
    trainer.fit(module, datamodule=data)
    logged = {step for step, found in watch.steps.items() if found}
    assert set(watch.steps) == {(epoch, batch) for epoch in (0, 1) for batch in range(3)}
    assert logged == {(0, 1), (0, 2), (1, 1), (1, 2)}  # every second step, and the last of the epoch


@pytest.mark.real  # on another, a network whose graph a traceback holds cannot be moved
@pytest.mark.parametrize("batch", [0, 2])
def test_a_loss_that_is_not_finite_ends_the_run_before_a_checkpoint(make_run, tmp_path, batch):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, images_and_labels, batch_idx) -> None:
            images_and_labels[0].mul_(float("nan") if batch_idx == batch else 1.0)

    trainer, module, data = make_run(tmp_path, (), 2, trainer={"log_every_n_steps": 50}, callbacks=[Break()])
    with pytest.raises(InputError, match="NaN or infinite in epoch 0"):
        trainer.fit(module, datamodule=data)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_network_with_a_broken_loss_is_not_saved(make_run, tmp_path):
    _, module, _ = make_run(tmp_path, ())
    module.epoch_loss = torch.tensor(float("inf"))
    module._trainer = type("T", (), {"global_step": 3, "current_epoch": 1})()
    with pytest.raises(InputError, match="NaN or infinite in epoch 1"):
        module.on_save_checkpoint({})


class Stop(Callback):
    """Ends the run in the first batch of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def test_a_run_with_everything_on_resumes_with_equal_weights(make_run, tmp_path):
    def run(folder, callbacks=(), checkpoint=None):
        traces = [AxisTrace(limit=32), GradientTrace(limit=32)]
        options = {"max_epochs": 4, "trainer": {"precision": "bf16-mixed"}}
        stages = (("blocks", 1), ("channels", 2))
        trainer, module, data = make_run(folder, stages, callbacks=[*traces, *callbacks], **options)
        module.memory_format = torch.channels_last
        module.backbone.to(memory_format=torch.channels_last)
        with suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return weights(module)

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", [Stop(2)])  # just after the second stage, which is done again
    torch.manual_seed(99)
    resumed = run(tmp_path / "part", checkpoint=tmp_path / "part" / "checkpoints" / "last.ckpt")
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert any(value.is_contiguous(memory_format=torch.channels_last) for value in whole.values() if value.ndim == 4)
    traces = [sorted(file.name for file in (tmp_path / part / "trace").iterdir()) for part in ("whole", "part")]
    assert traces[0] == traces[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_synchronises_a_cuda_device(make_run, tmp_path):
    class Strict(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            torch.cuda.set_sync_debug_mode("error" if batch_idx == 0 else "default")  # the last of an epoch logs

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            torch.cuda.set_sync_debug_mode("default")

    options = {"accelerator": "cuda", "precision": "bf16-mixed", "log_every_n_steps": 50}
    trainer, module, data = make_run(tmp_path, (), 1, [Strict()], trainer=options)
    try:
        trainer.fit(module, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
