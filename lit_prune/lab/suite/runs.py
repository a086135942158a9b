"""One run of a suite: a `fit` and the verbs that follow it, in one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_prune.errors import InputError
from lit_prune.files import write_text
from lit_prune.structure.networks import epochs_done

FOLLOWING = ("analyze", "curve", "lesion", "sensitivity", "sweep", "reduce", "report")


@dataclass(frozen=True)
class Run:
    """One `fit` of the suite, or a verb after it in the same folder."""

    network: str
    seed: int
    folder: Path
    config: dict[str, Any]
    options: tuple[str, ...]
    verb: str = "fit"
    then: tuple["Run", ...] = ()

    @property
    def marker(self) -> Path:
        """The file that says that it ended well."""
        return self.folder / ("finished.json" if self.verb == "fit" else f"finished_{self.verb}.json")

    @property
    def config_file(self) -> Path:
        """Its configuration."""
        return self.folder / f"{self.verb}.yaml"

    @property
    def finished(self) -> bool:
        """Whether it has run to its end, which the last checkpoint of a `fit` says too."""
        return self.marker.exists() and self.reached_end

    @property
    def left(self) -> list["Run"]:
        """The `fit` and its verbs from the first that is not finished on."""
        steps = [self, *self.then]
        done = next((place for place, step in enumerate(steps) if not step.finished), len(steps))
        return steps[done:]

    @property
    def reached_end(self) -> bool:
        """Whether the last checkpoint of a `fit` is that of its last epoch, or the configuration may end it earlier."""
        if self.verb != "fit":
            return True
        file = self.folder / "config.yaml"
        try:
            trainer = yaml.safe_load(file.read_text(encoding="utf-8"))["trainer"]
            epochs, callbacks = int(trainer["max_epochs"]), trainer.get("callbacks") or []
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
            return False
        limited = trainer.get("max_time") or (trainer.get("max_steps") or -1) > 0
        stops = any("EarlyStopping" in str(one) or "tolerance" in str(one) for one in callbacks)
        return bool(limited or stops) or self.epochs_done >= epochs

    @property
    def epochs_done(self) -> int:
        """Epochs that its last checkpoint has seen."""
        return epochs_done(self.folder / "checkpoints" / "last.ckpt")

    @property
    def arguments(self) -> list[str]:
        """Command line after the program's name."""
        folder = ["--run_dir", str(self.folder)]
        if self.verb == "report":
            return [self.verb, *folder]
        return [self.verb, "-c", str(self.config_file), *folder, *self.options]

    def write_config(self) -> None:
        """Writes the configuration of the `fit` and of what follows it, which may change.

        Raises:
            InputError: the folder holds a run with another one.
        """
        file, text = self.config_file, yaml.safe_dump(self.config, sort_keys=False)
        if self.verb == "fit" and file.exists() and file.read_text() != text:
            raise InputError(
                f"run folder {self.folder} holds a run with another configuration; give another --run_dir, or delete it"
            )
        if self.verb != "fit" and file.exists() and file.read_text() != text:
            self.marker.unlink(missing_ok=True)  # it is asked for something else; what it has already stays
        write_text(file, text)
        for step in self.then:
            step.write_config()


def merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `more`, dictionaries merged key by key."""
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged
