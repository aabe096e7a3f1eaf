"""Damage files at random, and open each damaged file by the door that reads its kind.

Every file has to end in one of two ways: it is read, or one short printable :class:`slimlstm.SlimLSTMError` refuses it. A
file that carries a digest is never read with other numbers. Outputs are whole or absent. Each door works in a process of
its own, with limits on memory and on the seconds for one file, so that a crash or a hang is seen and the run goes on.

    python tests/fuzz.py --files 20000 --seed 1
    python tests/fuzz.py --files 1 --seed 1 --door onnx --first 4711   # one file again
"""

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slimlstm import LowRank, Prune, Quantize, SlimLSTMError, compress_, finetune, load, save
from slimlstm.calibration.moments import Calibration, Moments
from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig, load_awd_lstm, save_awd_lstm
from slimlstm.files import sha256
from slimlstm.folders import CONFIG, read_folder
from slimlstm.folders import _config_sha256 as config_sha256
from slimlstm.weight_files import compress_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # for paper and other helpers of tests

MEMORY, SECONDS = 3 << 30, 20
IN, H = 4, 6


class Door(NamedTuple):
    """One kind of file.

    Attributes:
        write: writes an intact file or folder to a path.
        read: opens it, in an empty folder for outputs; returns the numbers that were read.
        has_digest: whether other numbers than the intact file's are a fault.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path, Path], list[Tensor]]
    has_digest: bool = False


def dense(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"lstm": nn.LSTM(IN, H, 2, bidirectional=True), "head": nn.Linear(H, 2)})


def small() -> nn.ModuleDict:
    model = dense()
    compress_(model, LowRank(rank=2, target="hh", storage="int8", filter=lambda site: site.layer == 0))
    compress_(model, Prune(keep=0.5, filter=lambda site: site.layer == 1))
    return model


def compressed(path: Path, place: Path) -> list[Tensor]:
    """Compress a weight file; the output is a whole folder, or absent after an error."""
    out = place / "out"
    try:
        compress_file(path, Quantize("int8"), out)
    except SlimLSTMError:
        assert not out.exists(), "an output after an error"
        raise
    return [tensor for _, tensor in sorted(read_folder(out)[1].items())]


def safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous().clone() for name, value in small().state_dict().items()}, path)


def checkpoint_of_lightning(path: Path) -> None:
    torch.save({"state_dict": dense().state_dict(), "hparams": argparse.Namespace(h=H), "epochs": [1, {"a": (2,)}]}, path)


def loaded(path: Path, place: Path) -> list[Tensor]:
    model = dense()
    before = [value.clone() for value in model.state_dict().values()]
    try:
        return list(load(path, model).state_dict().values())
    except SlimLSTMError:
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True)), "changed"
        raise


def batches(path: Path) -> None:
    import numpy as np

    np.savez(path.with_suffix(".npz"), x=np.ones((2, 5, 1, 10), np.float32), lengths=np.ones((2, 1), np.int64))
    path.with_suffix(".npz").replace(path)


def read_runs(path: Path, place: Path) -> list[Tensor]:
    from slimlstm.onnx.calibrate import read_batches

    return [torch.from_numpy(array.copy()) for run in read_batches(path) for array in run.values() if array.dtype != object]


def calibration(path: Path) -> None:
    torch.manual_seed(0)
    moments = {name: Moments(torch.rand(5, 5), torch.rand(8, 8), 9) for name in ("a.weight_ih_l0", "a.weight_hh_l0")}
    Calibration(moments, 0.5, 4, True).save(path)


def read_calibration(path: Path, place: Path) -> list[Tensor]:
    found = Calibration.load(path)
    return [part for one in found.sites.values() for part in (one.inputs, one.gradients) if part is not None]


def tuned(path: Path) -> list[Tensor]:
    model = dense()
    compress_(model, LowRank(rank=1))
    x = torch.ones(3, 2, IN)

    def loss(model: Any, batch: Tensor) -> Tensor:
        return model["lstm"](batch)[0].square().mean((0, 2))

    before = [value.clone() for value in model.state_dict().values()]
    try:
        finetune(model, [x, 2 * x], loss, steps=2, checkpoint=path)
    except SlimLSTMError:
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True)), "changed"
        raise
    return [value.detach().clone() for value in model.state_dict().values()]


def awd_lstm(path: Path) -> None:
    torch.manual_seed(0)
    save_awd_lstm(AWDLSTM(AWDLSTMConfig(11, embedding_size=4, hidden_size=6)), path, shard_bytes=10_300)


def pickled_awd_lstm(path: Path) -> None:
    path.mkdir()
    torch.save(AWDLSTM(AWDLSTMConfig(11, embedding_size=4, hidden_size=6)).state_dict(), path / "model.pt")


def elmo(path: Path) -> None:
    from paper.elmo import BiLM
    from paper.elmo_config import ELMoConfig
    from paper.elmo_files import save_bilm

    sizes = {"hidden_size": 6, "proj_size": 4, "num_layers": 1, "character_size": 3, "filters": ((1, 4), (2, 4))}
    save_bilm(BiLM(ELMoConfig(**sizes, num_highways=1, max_characters=8)), path)


def read_elmo(path: Path, place: Path) -> list[Tensor]:
    from paper.elmo_files import load_bilm

    return list(load_bilm(path).state_dict().values())


def onnx_file(path: Path) -> None:
    import numpy as np
    from onnx_files import lstm_parts
    from onnx_files import save as save_onnx

    node, weights = lstm_parts(np.random.default_rng(0), "bidirectional", states=True)
    save_onnx(path, [node], weights, ["lstm_y"])


def compressed_onnx(path: Path, place: Path) -> list[Tensor]:
    from slimlstm.onnx.compress import compress_onnx
    from slimlstm.onnx.find import find_lstms
    from slimlstm.onnx.reading import read_model

    out = place / "out.onnx"
    try:
        compress_onnx(path, LowRank(rank=2), out)
    except SlimLSTMError:
        assert not out.exists(), "an output after an error"
        raise
    return [location.matrix[0] for lstm in find_lstms(read_model(out), out) for location in lstm.locations]


DOORS = {
    "safetensors": Door(safetensors, compressed),
    "pt": Door(lambda path: torch.save(small().state_dict(), path), compressed),
    "legacy": Door(lambda path: torch.save(dense().state_dict(), path, _use_new_zipfile_serialization=False), compressed),
    "checkpoint": Door(checkpoint_of_lightning, compressed),
    "npz": Door(batches, read_runs),
    "folder": Door(lambda path: save(small(), path), loaded, has_digest=True),
    "folder-again": Door(lambda path: save(small(), path), compressed, has_digest=True),
    "awd-lstm": Door(awd_lstm, lambda path, place: list(load_awd_lstm(path).state_dict().values()), has_digest=True),
    "awd-lstm-pt": Door(pickled_awd_lstm, lambda path, place: list(load_awd_lstm(path).state_dict().values())),
    "elmo": Door(elmo, read_elmo),
    "calibration": Door(calibration, read_calibration, has_digest=True),
    "finetune": Door(tuned, lambda path, place: tuned(path), has_digest=True),
    "onnx": Door(onnx_file, compressed_onnx),
}

VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**62, 10**30, 1.5, float("nan"), "", "x", "\x1b[31m", "../x", "F64", "I8"),
    *([], {}, [[]], [0], [2, 3], [2**40, 2**40], {"a": 1}, "y" * 5000),
)


def with_other_value(content: Any, rng: random.Random) -> Any:
    """Return JSON types with one value, key or level changed."""
    if isinstance(content, (dict, list)) and content and rng.random() < 0.85:
        changed: Any = content.copy()
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        if rng.random() < 0.15:
            if isinstance(content, dict):
                changed[rng.choice(["z", key + "_u", key + ".scale", ""])] = changed.pop(key)
            else:
                changed.pop(key)
        else:
            changed[key] = with_other_value(content[key], rng)
        return changed
    return rng.choice(VALUES)


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with flipped bits, overwritten, removed, repeated or inserted parts."""
    data, at = bytearray(content), rng.randrange(max(1, len(content)))
    length = min(rng.choice([1, 2, 4, 8, 64, 1000]), len(content) - at)
    way = rng.randrange(7)
    if way == 0:
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == 1:
        data[at : at + length] = rng.choice([b"\0", b"\xff", b"[", b"\x80"]) * length
    elif way == 2:
        del data[at:]
    elif way == 3:
        del data[at : at + length]
    elif way == 4:
        data[at:at] = data[at : at + length]
    elif way == 5:
        data[at:at] = rng.randbytes(length)
    else:
        # Headers are at the front or, in archives, at the end.
        place = rng.randrange(min(400, len(data)))
        data[place if rng.random() < 0.5 else -1 - place] = rng.randrange(256)
    return bytes(data)


def damaged(content: bytes, name: str, rng: random.Random) -> bytes:
    """Return a damaged content, in half of the cases of a known form with a damage that keeps the form."""
    if rng.random() < 0.5:
        return damaged_bytes(content, rng)
    if name.endswith(".json"):
        if rng.random() < 0.05:
            return b"[" * 100_000
        changed = with_other_value(json.loads(content), rng)
        if name == CONFIG and isinstance(changed, dict) and rng.random() < 0.8:
            changed["sha256"] = config_sha256(changed)
        return json.dumps(changed).encode()
    header_size = struct.unpack("<Q", content[:8])[0] if len(content) > 8 else 0
    if content[8:9] == b"{" and header_size < len(content):
        header = json.dumps(with_other_value(json.loads(content[8 : 8 + header_size]), rng)).encode()
        return struct.pack("<Q", len(header)) + header + content[8 + header_size :]
    return damaged_bytes(damaged_bytes(content, rng), rng)


def damage(path: Path, rng: random.Random) -> None:
    """Damage a file, or one file of a folder; sometimes write a digest that fits the damaged content."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    file = rng.choice(files)
    if file.name == CONFIG or rng.random() < 0.97:
        content = damaged(file.read_bytes(), file.name, rng)
        file.write_bytes(content)
        config = path / CONFIG
        if file.name.startswith("model-") and config.exists() and rng.random() < 0.5:
            # Another program wrote the weights and knew the format.
            entries = json.loads(config.read_text(encoding="utf-8"))
            entries["weights"]["sha256"] = sha256(content)
            entries["sha256"] = config_sha256(entries)
            config.write_text(json.dumps(entries), encoding="utf-8")
    else:
        file.unlink()


def is_forged(path: Path, intact: Path) -> bool:
    """Return whether a folder's own digests were written anew, so that other numbers are no fault."""
    config = path / CONFIG
    return config.exists() and config.read_bytes() != (intact / CONFIG).read_bytes()


def outcome(door: Door, intact: Path, expected: list[Tensor], place: Path, rng: random.Random) -> str:
    """Return ``"refused"`` or ``"read"``; a fault raises :class:`AssertionError`."""
    path = place / "input"
    shutil.copytree(intact, path) if intact.is_dir() else shutil.copy(intact, path)
    damage(path, rng)
    forged = is_forged(path, intact)
    try:
        found = door.read(path, place)
    except SlimLSTMError as error:
        text = str(error)
        assert text, "an error without words"
        assert len(text) <= 4000, "a long error"
        assert all(character.isprintable() for character in text.replace("\n", "")), "an unprintable error"
        return "refused"
    if door.has_digest and not forged:
        same = len(found) == len(expected) and all(map(same_numbers, found, expected))
        assert same, "other numbers than the intact file's"
    return "read"


def same_numbers(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def work(name: str, seed: int, first: int, count: int, queue: Any) -> None:
    """Open damaged files first..first+count of a door; put what happens to each into the queue."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    door = DOORS[name]
    with tempfile.TemporaryDirectory() as folder:
        intact = Path(folder) / "intact"
        door.write(intact)
        copy = Path(folder) / "copy"
        shutil.copytree(intact, copy) if intact.is_dir() else shutil.copy(intact, copy)
        (Path(folder) / "place").mkdir()
        expected = door.read(copy, Path(folder) / "place")
        # The library and its imports are in memory now; what a file needs comes on top.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("hangs")))
        for index in range(first, first + count):
            queue.put((index, "begins"))
            place = Path(folder) / str(index)
            place.mkdir()
            signal.alarm(SECONDS)
            try:
                queue.put((index, outcome(door, intact, expected, place, random.Random(f"{seed} {name} {index}"))))  # noqa: S311
            except BaseException as error:
                queue.put((index, f"FAULT {type(error).__name__}: {str(error)[:300]}"))
            finally:
                signal.alarm(0)
            shutil.rmtree(place)


def fuzz(name: str, seed: int, first: int, count: int) -> tuple[Counter[str], list[str]]:
    """Return how often each outcome came, and the faults of a door."""
    outcomes, faults, end = Counter[str](), list[str](), first + count
    context = multiprocessing.get_context("spawn")
    while first < end:
        queue = context.SimpleQueue()
        process = context.Process(target=work, args=(name, seed, first, end - first, queue))
        process.start()
        last = first - 1
        while process.is_alive() or not queue.empty():
            if queue.empty():
                process.join(0.01)
                continue
            last, what = queue.get()
            if what != "begins":
                outcomes[what.partition(" ")[0]] += 1
                faults += [f"{name} {last}: {what}"] * what.startswith("FAULT")
        process.join()
        if process.exitcode:
            outcomes["FAULT"] += 1
            faults.append(f"{name} {last}: the process ended with {process.exitcode}")
            if last < first:
                break
        first = last + 1
    return outcomes, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="damaged files, over all doors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file of each door")
    parser.add_argument("--door", choices=DOORS, action="append", help="only this door; may be repeated")
    settings = parser.parse_args()
    doors = settings.door or list(DOORS)
    every: list[str] = []
    for name in doors:
        outcomes, faults = fuzz(name, settings.seed, settings.first, -(-settings.files // len(doors)))
        print(name, dict(outcomes), *faults, sep="\n  ", flush=True)
        every += faults
    print(f"{len(every)} faults")
    sys.exit(bool(every))


if __name__ == "__main__":
    main()
