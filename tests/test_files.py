"""Files: what is undefined is null in JSON; one process at a time in a run folder."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from lit_prune import Plan, save_compact
from lit_prune.cli.main import main
from lit_prune.errors import InputError
from lit_prune.files import LOCK, alone, read_parquet, write_json, write_parquet, write_text
from lit_prune.tensor_files import read_torch

HOLDER = """
import sys, time
from pathlib import Path
from lit_prune.files import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def strict(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_json_holds_null_where_a_number_is_undefined(tmp_path):
    value = {"epsilon": math.nan, "bounds": [0.5, math.inf], "name": "NaN"}
    write_json(tmp_path / "one.json", value)
    text = (tmp_path / "one.json").read_text()
    assert json.loads(text, parse_constant=strict) == {"epsilon": None, "bounds": [0.5, None], "name": "NaN"}


def test_a_folder_is_held_until_its_process_ends_even_by_a_kill(tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(InputError, match="another process is at work"), alone(tmp_path):
            pass
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "-c", str(Path(__file__).with_name("tiny_run.yaml")), "--run_dir", str(tmp_path)])
        assert exit_.value.code == 2 and "give another --run_dir" in capsys.readouterr().err
        assert {file.name for file in tmp_path.iterdir()} == {LOCK}  # nothing was written
    finally:
        holder.kill()
        holder.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with alone(tmp_path):
                (tmp_path / "written").touch()
            break
        except InputError:
            time.sleep(0.05)
    assert (tmp_path / "written").exists()


def test_a_folder_in_which_nothing_was_written_is_gone_and_others_stay(tmp_path):
    with pytest.raises(InputError, match="wrong"), alone(tmp_path / "new"):
        raise InputError("wrong")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    with alone(tmp_path / "old"):
        pass
    assert (tmp_path / "old" / "kept").exists()


def test_what_killed_processes_left_of_a_file_goes_when_it_is_written_again(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = tmp_path / f".one.json.{os.getppid()}.partial"
    for path in (tmp_path / f".one.json.{dead.pid}.partial", living, tmp_path / f".two.json.{dead.pid}.partial"):
        path.touch()
    write_json(tmp_path / "one.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"one.json", living.name, f".two.json.{dead.pid}.partial"}


def test_a_table_comes_back_as_it_was_and_a_changed_name_in_its_footer_is_noticed(tmp_path):
    columns = {"layer": ["a", "b", None], "channel": [0, 1, 2], "value": [0.5, math.nan, math.inf]}
    table = pd.DataFrame({**columns, "dead": [True, False, True], "kept": [[0, 1], [2], []]})
    file = tmp_path / "table.parquet"
    write_parquet(file, table)
    found = read_parquet(file)
    pd.testing.assert_frame_equal(found.drop(columns="kept"), table.drop(columns="kept"))
    assert [list(cell) for cell in found["kept"]] == table["kept"].tolist()
    content = file.read_bytes()
    places = [place for place in range(len(content)) if content.startswith(b"channel", place)]
    assert places
    for place in places:
        file.write_bytes(content[: place + 1] + b"x" + content[place + 2 :])
        try:
            assert read_parquet(file)["channel"].tolist() == [0, 1, 2]  # a copy of the name that nobody reads
        except InputError as error:
            assert str(file) in str(error) and "delete it" in str(error)
    file.write_bytes(content.replace(b"channel", b"chaxnel"))
    with pytest.raises(InputError, match="cannot be read"):
        read_parquet(file)


@pytest.mark.parametrize("write", [
    lambda path: write_text(path, "text"),
    lambda path: Plan(keep_channels={"0": (0,)}, sizes={"0": 2}).save(path),
    lambda path: save_compact(path, nn.Linear(2, 2), input_shape=(2,)),
])  # fmt: skip
def test_what_cannot_be_written_is_said_in_one_line(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "below", tmp_path / "file" / "deep" / "below", tmp_path / "a\0b" / "c"):
        with pytest.raises(InputError, match=r"^[^\n]+ cannot be written \([^\n]+\); give another place$"):
            write(place)
    assert (tmp_path / "file").read_text() == "mine" and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_of_a_file_that_was_cut_off_anywhere_another_is_asked_for(tmp_path):
    torch.save({"state_dict": nn.Linear(9, 9).state_dict()}, file := tmp_path / "last.ckpt")
    whole = file.read_bytes()
    for length in (0, 1, 50, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"^ckpt_path: [^\n]+last.ckpt is not readable: damaged[^\n]+; give"):
            read_torch(file, "ckpt_path")
