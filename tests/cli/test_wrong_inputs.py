"""Over two hundred wrong command lines and files, in one process: each ends with exit code 2 and one line on stderr."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from lit_prune.cli.main import main
from lit_prune.models import build_backbone

CONFIG = """
seed_everything: 7
data:
  class_path: lit_prune.data.DigitsData
  init_args: {resolution: 8, train_size: 32, calibration_size: 8, batch_size: 16}
model: {backbone: cifar_convnet, optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.05}}}
trainer: {max_epochs: 2, accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false}
"""
STAGES = "{class_path: lit_prune.StagedPruning, init_args: {stages: [%s]}}"
GOOD = STAGES % "{class_path: lit_prune.ChannelStage, init_args: {keep: 0.5, epoch: 1}}"

OPTIONS = {  # option of fit -> values that it does not have
    "trainer.max_epochs": ("-5", "many", "1.5", "[1]"),
    "trainer.max_steps": ("-5", "x"),
    "trainer.max_time": ("x", "-1"),
    "trainer.devices": ("0", "-1", "abc", "[0,1]", "-3", "99999999"),
    "trainer.accelerator": ("zpu", "3", "cuda" if not torch.cuda.is_available() else "zpu2"),
    "trainer.strategy": ("zpu", "3"),
    "trainer.num_nodes": ("0", "x", "99999999"),
    "trainer.precision": ("7", "x"),
    "trainer.limit_train_batches": ("-1", "0", "0.0", "abc", "1.5", "-0.5"),
    "trainer.limit_val_batches": ("-1", "abc", "1.5"),
    "trainer.accumulate_grad_batches": ("0", "-1", "x"),
    "trainer.gradient_clip_val": ("-1", "x", "nan"),
    "trainer.gradient_clip_algorithm": ("x",),
    "trainer.val_check_interval": ("-1", "0", "x", "1.5"),
    "trainer.log_every_n_steps": ("-1", "0", "x"),
    "trainer.check_val_every_n_epoch": ("0", "-1", "x"),
    "trainer.overfit_batches": ("-1", "1.5", "x"),
    "trainer.profiler": ("x",),
    "trainer.plugins": ("x",),
    "trainer.callbacks": (
        "x",
        "[1]",
        "[{class_path: nowhere.Nothing}]",
        "[{class_path: torch.nn.Linear}]",
        "[{class_path: lit_prune.StagedPruning}]",
        "[{class_path: lit_prune.AxisTrace, init_args: {nothing: 1}}]",
    ),
    "trainer.fast_dev_run": ("x", "-1"),
    "trainer.reload_dataloaders_every_n_epochs": ("-1",),
    "trainer.nothing": ("1",),
    "seed_everything": ("-1", "x", "99999999999999999999", "1.5"),
    "model.backbone": (
        ":",
        "torch.nn:Linear",
        "torch.nn:Identity",
        "json:loads",
        "json:",
        ":loads",
        "a:b:c",
        "no_such_package:make",
        "cifar_resnet2",
        "timm/none",
        "timm/hf-hub:somebody/network",
        "''",
        "null",
        "alexnet",
        "vgg11",
        "timm/vit_tiny_patch16_224",
    ),
    "model.arguments": (
        "x",
        "[1]",
        "{num_classes: 3}",
        "{num_classes: ten}",
        "{num_classes: -1}",
        "{in_channels: 7}",
        "{in_channels: 0}",
        "{stem: x}",
        "{nothing: 1}",
        "{weights: DEFAULT}",
        "{pretrained: true}",
        "{checkpoint_path: x}",
        "{1: 2}",
    ),
    "model.num_classes": ("3", "x"),
    "model.label_smoothing": ("1.5", "-0.1", "x", "nan"),
    "model.optimizer.lr": ("x",),
    "model.optimizer": ("x", "torch.optim.NoSuch", "torch.nn.Linear"),
    "model.scheduler": ("x",),
    "model.channels_last": ("x",),
    "model.pretrained": ("x", "true"),
    "model.weights": (
        "FILES/integers.pth",
        "FILES/sparse.pth",
        "FILES/text.pth",
        "FILES/empty.pth",
        "FILES/list.pth",
        "FILES/pickle.pth",
        "FILES/folder.pth",
        "FILES/none.pth",
        "FILES/nan.pth",
        "FILES/zeros.safetensors",
        "FILES/none.safetensors",
        "FILES/other.pth",
        "FILES/text.txt",
        "FILES",
    ),
    "data": ("nowhere.Data", "torch.nn.Linear", "lit_prune.data.ImageFolderData", "3", "[1]"),
    "data.batch_size": ("0", "-1", "x", "1.5"),
    "data.eval_batch_size": ("0", "x"),
    "data.seed": ("-1", "x"),
    "data.train_size": ("0", "-4", "1000000", "x"),
    "data.val_size": ("-1", "1000000"),
    "data.calibration_size": ("0", "-1", "x"),
    "data.num_workers": ("-1", "x", "99999999"),
    "data.resident": ("x", "3"),
    "data.pad": ("-1", "x", "1000"),
    "data.padding": ("x",),
    "data.mean": ("x", "[1,2,3,4]", "[x]"),
    "data.std": ("[0]", "[-1]", "x"),
    "data.resolution": ("0", "-3", "x", "100000000"),
    "ckpt_path": (
        "FILES/none.ckpt",
        "FILES",
        "FILES/text.ckpt",
        "FILES/empty.ckpt",
        "FILES/truncated.ckpt",
        "FILES/flipped.ckpt",
        "FILES/nan.ckpt",
        "FILES/stateless.ckpt",
        "FILES/planless.ckpt",
        "FILES/foreign_plans.ckpt",
        "FILES/inputless.ckpt",
        "FILES/weights_only.ckpt",
        "FILES/other.ckpt",
        "https://127.0.0.1:1/last.ckpt",
    ),
    "run_dir": ("FILES/text.pth", "FILES/text.pth/below", "x" * 300, "/proc/run"),
    "config": (
        "FILES/none.yaml",
        "FILES",
        "FILES/latin.yaml",
        "FILES/twice.yaml",
        "FILES/bomb.yaml",
        "FILES/deep.yaml",
        "FILES/broken.yaml",
        "FILES/list.yaml",
        "FILES/ring.yaml",
        "no/such/recipe",
    ),
    "nothing": ("1",),
}
CHANNEL_MISTAKES = (
    "",
    "keep: half",
    "keep: 0",
    "keep: 1.5",
    "keep: -0.5",
    "keep: .nan",
    "keep: 1.0e-9",
    "keep: 0.5, keeep: 1",
    "keep: 0.5, part: channel",
    "keep: 0.5, budget: mac",
    "keep: 0.5, epoch: -1",
    "keep: 0.5, epoch: x",
    "keep: 0.5, epoch: 7",
    "keep: 0.5, score: magnitud",
    "keep: 0.5, cap: 0",
    "keep: 0.5, cap: 1.5",
    "keep: 0.5, round_to: 0",
    "keep: 0.5, round_to: -4",
    "keep: 0.5, allocation: x",
    "keep: 0.5, normalisation: x",
    "keep: 0.5, normalisation: rank",
    "keep: 0.5, replace: x",
    "keep: 0.5, remove_count: 2",
)
BLOCK_MISTAKES = (
    "",
    "remove_count: -2",
    "remove_count: 0",
    "remove_ratio: 0",
    "remove_ratio: 1.5",
    "remove_ratio: 0.5, keep: 0.5",
    "remove_ratio: 0.5, budget: macs",
    "remove_ratio: 0.5, replace: affine",
    "keep: 1.0e-9",
    "keep_blocks: [1]",
)
REPAIRS = ("{alpha: -1}", "{beta: x}", "{temperature: 0}", "{form: x}", "{gradient_clip: -1}", "{alpha: .nan}")
VERBS = {  # verb -> its own wrong options
    "test": ((), ("--ckpt_path", "FILES/none.ckpt"), ("--ckpt_path", "FILES/nan.ckpt")),
    "validate": ((), ("--ckpt_path", "FILES/text.ckpt")),
    "predict": ((), ("--ckpt_path", "FILES/other.ckpt")),
    "analyze": ((), ("--ckpt_path", "FILES/none.ckpt"), ("--ckpt_path", "FILES/nan.ckpt"), ("--request", "x")),
    "lesion": ((), ("--ckpt_path", "FILES/foreign_plans.ckpt"), ("--compare", "x")),
    "sweep": (
        (),
        ("--checkpoints", "[FILES/none.ckpt]"),
        ("--checkpoints", "[FILES/nan.pth]"),
        ("--request", "3"),
        ("--request.threads", "0"),
        ("--request.threads", "99999999"),
        ("--request.workers", "99999999"),
    ),
    "compress": (
        (),
        ("--trainer.callbacks", f"[{GOOD}]"),
        ("--trainer.callbacks", f"[{GOOD}]", "--model.weights", "FILES/good.pth", "--repair_epochs", "0"),
        ("--ratios", "[2]"),
        ("--ratios", "[0.5, 0.5]"),
        ("--ratios", "x"),
    ),
    "reduce": (("--ckpt_path", "FILES/nan.ckpt"), ("--ckpt_path", "FILES/planless.ckpt")),
}
FOLDERS = (
    ("test", "--run_dir", "FILES/none"),
    ("report",),
    ("report", "--run_dir", "FILES/none"),
    ("report", "--run_dir", "FILES/text.pth"),
    ("report", "--run_dir", "FILES/nothing"),
    ("report", "--run_dir", "FILES/none", "--no", "1"),
    ("export",),
    ("export", "--run_dir", "FILES/none"),
    ("export", "--run_dir", "FILES/nothing"),
    ("export", "--run_dir", "FILES/damaged"),
    ("export", "--run_dir", "FILES/none", "--formats", "[x]"),
    ("suite",),
    ("suite", "-c", "FILES/none.yaml"),
    ("suite", "--base", "x", "--networks", "{}", "--seeds", "[0]"),
    ("suite", "--base", "{}", "--networks", "{}", "--seeds", "[0]"),
    ("suite", "--base", "{}", "--networks", "{a: {}}", "--seeds", "[]"),
    ("suite", "--base", "{}", "--networks", "{a: {}}", "--seeds", "[0, 0]"),
    ("suite", "--base", "{}", "--networks", "{../../evil: {}}", "--seeds", "[0]"),
    ("suite", "--base", "{}", "--networks", "{/evil: {}}", "--seeds", "[0]"),
    ("suite", "--base", "{}", "--networks", "{a: {}}", "--seeds", "[0]", "--part", "3"),
    ("suite", "--base", "{}", "--networks", "{a: {}}", "--seeds", "[0]", "--devices", "0"),
    ("suite", "--base", "{}", "--networks", "{a: {}}", "--seeds", "[0]", "--devices", "99999999"),
    ("suite", "--base", "{}", "--networks", "{a: {}}", "--seeds", "[0]", "--runs_per_device", "99999999"),
    ("latency", "--run_dir", "FILES/none"),
    ("latency", "--run_dir", "FILES/none", "--threads", "0"),
    ("latency", "--run_dir", "FILES/none", "--threads", "99999999"),
    ("prune",),
    ("",),
    ("fit",),
    ("fit", "--data", "lit_prune.data.DigitsData"),
    ("recipes", "--nothing", "1"),
)

COMMON = {"files", "trainer", "callbacks", "lit_prune", "stagedpruning", "init_args", "class_path", "stages", "run"}
COMMON |= {"true", "config", "error", "seeds", "base", "networks", "run_dir"}
SAID = {  # end of a command -> what its line speaks of, where that is another word
    "max_time x": "duration",
    "max_time -1": "duration",
    "callbacks x": "expected a <class 'list'>",
    "callbacks [1]": "subclass of callback",
    "[{class_path: lit_prune.StagedPruning}]": "required: stages",
    "lr x": "--lr",
    "/planless.ckpt": "'arguments'",
    "/foreign_plans.ckpt": "'nowhere'",
    "/inputless.ckpt": "called with",
    "/weights_only.ckpt": "optimizer",
    "--config FILES": "not a file",
    "/latin.yaml": "utf-8",
    "/bomb.yaml": "aliases",
    "/ring.yaml": "aliases",
    "/deep.yaml": "nesting",
    "/broken.yaml": "flow node",
    "/list.yaml": "unexpected config",
    "ChannelStage, init_args: {}}]}}]": "required: keep",
    "BlockStage, init_args: {}}]}}]": "exactly one of",
    "{stages: []}}]": "stages=[]",
    f"[{GOOD}, {GOOD}]": "more than one stateful",
    f"RUN --trainer.callbacks [{GOOD}]": "needs a trained network",
    "--run_dir RUN": " needs ",
    "report": "required: run_dir",
    "test --run_dir FILES/none": "-c with a file that has them",
    "export": "required: run_dir",
    "suite": "required: base",
    "--no 1": "--no",
    "--base x --networks {} --seeds [0]": "--base",
    "evil: {}} --seeds [0]": "evil",
    "--networks {} --seeds [0]": "needs networks",
    "--seeds []": "distinct seeds",
    "--seeds [0, 0]": "distinct seeds",
    "DigitsData": "model.backbone",
}


def command_lines() -> Iterator[tuple[str, ...]]:
    """All of them; FILES stands for the folder of wrong files, RUN for a run folder of its own."""
    fit = ("fit", "-c", "FILES/run.yaml", "--run_dir", "RUN")
    for option, values in OPTIONS.items():
        yield from ((*fit, f"--{option}", value) for value in values)
    for kind, mistakes in (("Channel", CHANNEL_MISTAKES), ("Block", BLOCK_MISTAKES)):
        for mistake in mistakes:
            stage = f"{{class_path: lit_prune.{kind}Stage, init_args: {{{mistake}}}}}"
            yield *fit, "--trainer.callbacks", f"[{STAGES % stage}]"
    for repair in REPAIRS:
        yield *fit, "--trainer.callbacks", f"[{GOOD}]", "--trainer.callbacks.repair", repair
    yield *fit, "--trainer.callbacks", f"[{GOOD}, {GOOD}]"
    yield *fit, "--trainer.callbacks", f"[{STAGES % ''}]"
    for verb, choices in VERBS.items():
        yield from ((verb, *fit[1:], *choice) for choice in choices)
    yield from FOLDERS


def write_files(folder: Path) -> None:
    """The wrong files that command lines name."""
    (folder / "nothing").mkdir(parents=True)
    (folder / "folder.pth").mkdir()
    (folder / "run.yaml").write_text(CONFIG)
    weights = build_backbone("cifar_convnet", num_classes=10, in_channels=1).state_dict()
    nan = {name: value * torch.nan if value.is_floating_point() else value for name, value in weights.items()}
    for name, value in {
        "integers": {0: torch.zeros(1)},
        "sparse": {"a": torch.zeros(2, 2).to_sparse()},
        "list": [1],
        "pickle": torch.nn.Linear(1, 1),
        "nan": nan,
        "good": weights,
        "other": {"conv.weight": torch.zeros(3)},
    }.items():
        torch.save(value, folder / f"{name}.pth")
    for name in ("text.pth", "text.ckpt", "text.txt"):
        (folder / name).write_text("text")
    for name in ("empty.pth", "empty.ckpt"):
        (folder / name).touch()
    (folder / "zeros.safetensors").write_bytes(b"\0" * 20)
    write_checkpoints(folder, weights, nan)
    write_yaml(folder)
    (folder / "damaged" / "compact").mkdir(parents=True)
    (folder / "damaged" / "compact" / "structure.json").write_text("{")


def write_checkpoints(folder: Path, weights: dict, nan: dict) -> None:
    plan = {"format": "lit_prune.plan", "version": 1, "drop_blocks": [], "notes": {}, "added_biases": []}
    plan |= {"keep_channels": {"nowhere": [0]}, "sizes": {"nowhere": 10**12}}
    structure = {"network": "backbone", "backbone": "cifar_convnet", "plans": [], "inputs": None}
    structure |= {"arguments": {"num_classes": 10, "in_channels": 1}}
    inputs = {"args": [{"dtype": "float32", "shape": [1, 1, 10, 10]}], "kwargs": {"dict": {}}}
    state = {f"backbone.{name}": value for name, value in weights.items()}
    good = {"state_dict": state, "epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.6.6"}
    good["optimizer_states"] = [{}]
    whole = {**good, "lit_prune_structure": structure}
    for name, value in {
        "whole": whole,
        "nan": {**whole, "state_dict": {f"backbone.{key}": value for key, value in nan.items()}},
        "stateless": {"lit_prune_structure": structure},
        "planless": {**good, "lit_prune_structure": {"backbone": "cifar_convnet"}},
        "foreign_plans": {**whole, "lit_prune_structure": {**structure, "plans": [plan], "inputs": inputs}},
        "inputless": {**whole, "lit_prune_structure": {**structure, "plans": [plan]}},
        "weights_only": {**whole, "optimizer_states": []},
        "other": {**whole, "lit_prune_structure": {**structure, "backbone": "cifar_resnet20"}},
    }.items():
        torch.save(value, folder / f"{name}.ckpt")
    content = (folder / "whole.ckpt").read_bytes()
    (folder / "truncated.ckpt").write_bytes(content[: len(content) // 2])
    middle = content.index(weights["features.0.weight"].numpy().tobytes()[:16])
    (folder / "flipped.ckpt").write_bytes(content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :])


def write_yaml(folder: Path) -> None:
    aliases = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12))
    for name, text in {
        "twice": "trainer: {max_epochs: 1}\ntrainer: {max_epochs: 2}\n",
        "bomb": aliases,
        "deep": "[" * 5000,
        "broken": "a: [",
        "list": "- 1\n",
        "ring": "trainer: &t\n  callbacks: [*t]\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "latin.yaml").write_bytes("# é\n".encode("latin-1"))


@pytest.fixture
def quick_parser(monkeypatch):
    """A verb's parser is built once for all of its command lines."""
    parsers: dict[tuple[str, ...], dict] = {}
    build = LightningCLI.setup_parser

    def setup_parser(self, *args) -> None:
        verb = tuple(self.subcommands())
        if verb not in parsers:
            before = set(self.__dict__)
            build(self, *args)
            parsers[verb] = {name: value for name, value in self.__dict__.items() if name not in before}
        self.__dict__.update(parsers[verb])

    monkeypatch.setattr(LightningCLI, "setup_parser", setup_parser)


def outcome(args: list[str], words: set[str], capfd) -> str:
    """Empty where the command ended as it must, with a line that has one of the words in it; else what it did."""
    capfd.readouterr()
    try:
        main(args)
    except SystemExit as stop:
        lines = capfd.readouterr().err.splitlines()
        said = len(lines) == 1 and lines[0].startswith("error: ") and any(word in lines[0].lower() for word in words)
        return "" if stop.code == 2 and said else f"exit {stop.code}, stderr {lines}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def words_of(command: tuple[str, ...]) -> set[str]:
    """What the line about a command may speak of: its last option, or what was given to it."""
    whole, given = " ".join(command), " ".join(command[-2:]).replace("keep: 0.5, ", "")
    said = next((words for mistake, words in SAID.items() if whole.endswith(mistake)), None)
    return {said} if said else set(re.findall(r"\w{3,}", given.lower())) - COMMON or {"subcommand"}


def test_the_configuration_without_a_mistake_is_accepted(tmp_path, quick_parser):
    write_files(tmp_path / "files")
    callbacks = ["--trainer.callbacks", f"[{GOOD}]"]
    main(["fit", "-c", str(tmp_path / "files" / "run.yaml"), "--run_dir", str(tmp_path / "run"), *callbacks])


def test_there_are_at_least_two_hundred_wrong_command_lines():
    assert len(set(command_lines())) == len(list(command_lines())) >= 200


@pytest.mark.slow
def test_each_wrong_command_line_is_one_line_and_exit_code_2(tmp_path, capfd, quick_parser, monkeypatch):
    check(tmp_path, capfd, monkeypatch, list(command_lines()))


def test_of_the_wrong_command_lines_every_ninth_is_one_line_and_exit_code_2(tmp_path, capfd, quick_parser, monkeypatch):
    check(tmp_path, capfd, monkeypatch, list(command_lines())[::9])


def check(tmp_path: Path, capfd, monkeypatch, commands: list[tuple[str, ...]]) -> None:
    files = tmp_path / "files"
    write_files(files)
    monkeypatch.chdir(tmp_path)
    wrong = {}
    for number, command in enumerate(commands):
        run_dir = str(tmp_path / f"run{number}")
        words = [word.replace("FILES", str(files)).replace("RUN", run_dir) for word in command]
        found = outcome(words, words_of(command), capfd)
        if found:
            wrong[" ".join(command)] = found
    assert not wrong, f"{len(wrong)} of {len(commands)}: {json.dumps(wrong, indent=1)}"
