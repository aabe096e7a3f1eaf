"""Whatever happens while files are written, the old output stays whole, and nothing of the user's is lost."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

import slimlstm
from slimlstm import LowRank, Quantize, SlimLSTMError, compress_, load, save
from slimlstm.calibration.moments import Calibration, Moments
from slimlstm.cli import main
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig, load_awd_lstm, save_awd_lstm
from slimlstm.files import check_memory, check_regular, memory_limit, replacing
from slimlstm.folders import read_folder
from slimlstm.onnx.calibrate import read_batches
from slimlstm.tuning.checkpoint import read_checkpoint, write_checkpoint
from slimlstm.weight_files import read_tensors


def model(seed=0):
    torch.manual_seed(seed)
    made = nn.ModuleDict({"lstm": nn.LSTM(6, 8)})
    compress_(made, LowRank(rank=2))
    return made


def test_save_deletes_only_what_its_config_named(tmp_path):
    """Neither files with similar names nor the input of the command are lost."""
    state = nn.LSTM(6, 8).state_dict()
    for name in ("model-best.safetensors", "model-00001-of-00002.safetensors", "model.safetensors"):
        save_file(state, tmp_path / name)
    before = set(tmp_path.iterdir())
    for rank in ("1", "2", "1"):
        with pytest.raises(SystemExit) as ended:
            words = ["compress", str(tmp_path / "model-best.safetensors"), "-o", str(tmp_path), "--rank", rank, "--force"]
            main(words)
        assert ended.value.code == 0
    assert before < set(tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == len(before) + 3


def test_saves_that_race_leave_one_whole_model(tmp_path):
    """Each writer alternates between models, so that it removes weights that another may write again."""
    models, folder = [model(seed) for seed in range(3)], tmp_path / "small"

    def write(offset):
        for at in range(15):
            save(models[(at + offset) % 3], folder)
            read_folder(folder)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    read_folder(folder)
    assert len(list(folder.iterdir())) == 3


def test_drafts_of_killed_saves_are_removed(tmp_path):
    old = tmp_path / ".model-0123456789abcdef.00aa.draft.safetensors"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    fresh = tmp_path / ".model-1123456789abcdef.00aa.draft.safetensors"
    fresh.write_bytes(b"another process is writing this")
    save(model(), tmp_path)
    assert not old.exists()
    assert fresh.exists()


FULL = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)\nand more"),
    "PyTorch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmany lines"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_gives_one_line(error, tmp_path):
    (tmp_path / "file").write_text("old")
    is_refused = pytest.raises((OSError, SlimLSTMError), match=r"No space left|could not be written")
    with is_refused as raised, replacing(tmp_path / "file") as draft:
        draft.write_text("half")
        raise error
    assert "\n" not in str(raised.value)
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def calibration(path):
    Calibration({"a": Moments(torch.rand(9, 9).double(), None, 3)}, 0.5, 2, True).save(path)


def checkpoint(path):
    write_checkpoint(path, {"tensors": {"a": torch.rand(50)}, "step": 3})


def folder(path):
    save(model(), path)


def awd_lstm(path):
    torch.manual_seed(0)
    save_awd_lstm(AWDLSTM(AWDLSTMConfig(11, embedding_size=4, hidden_size=6)), path, shard_bytes=10_300)


READ_BACK = {
    "calibration": (calibration, Calibration.load),
    "checkpoint of fine-tuning": (checkpoint, read_checkpoint),
    "folder": (folder, lambda path: load(path, nn.ModuleDict({"lstm": nn.LSTM(6, 8)}))),
    "AWD-LSTM": (awd_lstm, load_awd_lstm),
}


@pytest.mark.parametrize(("write", "read"), READ_BACK.values(), ids=READ_BACK)
def test_no_flipped_bit_is_read_back(write, read, tmp_path):
    """Bits of weights; a bit of a header or an index may be without meaning, as in a space."""
    write(tmp_path / "output")
    read(tmp_path / "output")
    files = [tmp_path / "output"] if (tmp_path / "output").is_file() else (tmp_path / "output").glob("*.safetensors")
    for path in files:
        content = path.read_bytes()
        for at in range(len(content) // 3, len(content), len(content) // 3):
            path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            with pytest.raises(SlimLSTMError):
                read(tmp_path / "output")
        path.write_bytes(content)
    read(tmp_path / "output")


DOORS = {
    "weights": read_tensors,
    "calibration": Calibration.load,
    "checkpoint": read_checkpoint,
    "batches": read_batches,
}


@pytest.mark.skipif(os.name != "posix", reason="pipes in folders are POSIX")
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".onnx", ".npz", ""])
def test_pipes_and_devices_are_refused_at_once(door, ending, tmp_path):
    os.mkfifo(tmp_path / f"pipe{ending}")
    for path in (tmp_path / f"pipe{ending}", Path("/dev/zero")):
        with pytest.raises(SlimLSTMError, match="a pipe or device"):
            door(path)


@pytest.mark.skipif(os.name != "posix", reason="pipes in folders are POSIX")
def test_a_folder_with_a_pipe_in_it_is_refused(tmp_path):
    folder(tmp_path)
    weights = next(tmp_path.glob("model-*"))
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(SlimLSTMError, match="a pipe or device"):
        read_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SlimLSTMError, match="a pipe or device"):
        read_folder(tmp_path)


def test_limits_of_memory(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1000))
    assert memory_limit(tmp_path / "file") == (64 << 20) + 256_000
    check_memory(100, 100, "it")
    with pytest.raises(SlimLSTMError, match="it would take 101 bytes, more than the 100"):
        check_memory(101, 100, "it")
    check_regular(tmp_path / "file")
    with pytest.raises(SlimLSTMError, match="a folder, no file"):
        check_regular(tmp_path)


def test_long_and_unprintable_messages_become_short_lines():
    message = str(SlimLSTMError("\x1b[31m" + "x" * 50_000_000 + " the remedy"))
    assert len(message) <= 4000
    assert message.startswith("?[31m")
    assert message.endswith("the remedy")


KILLED = """
import sys, torch, slimlstm
from torch import nn
model = nn.ModuleDict({"lstm": nn.LSTM(6, 8)})
slimlstm.compress_(model, slimlstm.LowRank(rank=2))
print("ready", flush=True)
while True:
    with torch.no_grad():
        model["lstm"].bias_hh_l0.add_(1)
    slimlstm.save(model, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_save_leaves_a_whole_model(tmp_path):
    path = tmp_path / "small"
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    read_folder(path)
    shutil.rmtree(path)


def test_quantised_folders_are_read_back(tmp_path):
    made = nn.ModuleDict({"lstm": nn.LSTM(6, 8)})
    compress_(made, Quantize("int8"))
    slimlstm.save(made, tmp_path)
    assert read_folder(tmp_path)[0]["sites"]


@pytest.mark.parametrize("name", ["", "link"], ids=["the same name", "a link"])
@pytest.mark.parametrize("kind", ["onnx", "folder", "weight file of the folder"])
def test_the_input_is_never_the_output(kind, name, tmp_path, capsys):
    from slimlstm.onnx.compress import compress_onnx
    from slimlstm.weight_files import compress_file

    path = output = tmp_path / ("in.onnx" if kind == "onnx" else "in")
    if kind == "onnx":
        torch.onnx.export(nn.LSTM(6, 8), (torch.zeros(1, 1, 6),), path, dynamo=False)
    else:
        save(model(), path)
    if name:
        output = tmp_path / f"{name}{path.suffix}"
        output.symlink_to(path)
    if kind == "weight file of the folder":
        (path,) = path.glob("*.safetensors")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    verb = compress_onnx if kind == "onnx" else compress_file
    refusal = r"is the input, which would be lost|is a weight file of .*, which would be"
    with pytest.raises(SlimLSTMError, match=refusal):
        verb(path, Quantize("int8"), output)
    # The command gives the same reason, and not the advice to replace the folder.
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(path), "-o", str(output), "--storage", "int8"])
    assert ended.value.code == 1
    assert re.search(refusal, " ".join(capsys.readouterr().err.split()))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
