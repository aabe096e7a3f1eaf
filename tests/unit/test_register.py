"""A method and a storage that are registered from outside go through every door and the command."""

import importlib
import json
import sys

import pytest
import torch
from torch import nn

import slimlstm as sl
from slimlstm import methods
from slimlstm.onnx.compress import compress_onnx
from slimlstm.weight_files import compress_file, read_tensors

IN, H, RANK = 6, 16, 3


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(IN, H)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.fixture
def toys():
    """The names of the toy method and storage, registered for one test."""
    known = dict(methods.METHODS), dict(methods.STORAGES)
    sys.modules.pop("toys", None)
    yield importlib.import_module("toys")
    for table, rows in zip((methods.METHODS, methods.STORAGES), known, strict=True):
        table.clear()
        table.update(rows)


def config(toys):
    return sl.LowRank(toys.METHOD, rank=RANK, storage=toys.STORAGE)


def expected(matrix):
    """The toys' result for a matrix: its first columns, in half precision."""
    result = torch.zeros_like(matrix)
    result[:, :RANK] = matrix[:, :RANK].half().float()
    return result


def check_report(report, toys):
    for site in report.sites:
        m, n = site.shape
        assert (site.method, site.storage, site.rank) == (toys.METHOD, toys.STORAGE, RANK)
        assert site.bytes_after == 2 * RANK * (m + n)


def test_a_module(toys, tmp_path):
    dense = Tagger().eval()
    model = Tagger().eval()
    model.load_state_dict(dense.state_dict())
    check_report(sl.compress_(model, config(toys)), toys)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert torch.equal(model.lstm.product(name), expected(getattr(dense.lstm, name)))
    x = torch.randn(5, 2, IN)
    with torch.no_grad():
        fused = model(x)
        model.lstm.backend = "reference"
        torch.testing.assert_close(fused, model(x))
    sl.save(model, tmp_path)
    loaded = sl.load(tmp_path, Tagger())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    (weights,) = tmp_path.glob("*.safetensors")
    assert weights.stat().st_size < sum(parameter.nbytes for parameter in dense.parameters()) / 2


def test_a_weight_file(toys, tmp_path):
    dense = Tagger()
    torch.save(dense.state_dict(), tmp_path / "model.pt")
    check_report(compress_file(tmp_path / "model.pt", config(toys), tmp_path / "small"), toys)
    loaded = sl.load(tmp_path / "small", Tagger())
    assert torch.equal(loaded.lstm.product("weight_hh_l0"), expected(dense.lstm.weight_hh_l0))


def test_an_onnx_file(toys, tmp_path):
    dense = Tagger().eval()
    sl.export_onnx(dense, torch.randn(4, 2, IN), tmp_path / "model.onnx")
    report = compress_onnx(tmp_path / "model.onnx", config(toys), tmp_path / "small.onnx")
    check_report(report, toys)
    tensors = read_tensors(tmp_path / "small.onnx")
    for site in report.sites:
        product = tensors[f"{site.key}_u"] @ tensors[f"{site.key}_v"]
        torch.testing.assert_close(product, expected(getattr(dense.lstm, site.key.rpartition(".")[2])), rtol=0, atol=1e-7)


def test_the_command(toys, tmp_path, monkeypatch, capsys):
    torch.save(Tagger().state_dict(), tmp_path / "model.pt")
    arguments = ["compress", "model.pt", "-o", "small", "--method", toys.METHOD, "--rank", str(RANK)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slimlstm", *arguments, "--storage", toys.STORAGE, "--json"])
    from slimlstm import cli

    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert {site["method"] for site in json.loads(capsys.readouterr().out)["sites"]} == {toys.METHOD}


def test_names_are_taken_once(toys):
    for register, table, name in (
        (sl.register_method, methods.METHODS, toys.METHOD),
        (sl.register_storage, methods.STORAGES, toys.STORAGE),
    ):
        with pytest.raises(sl.SlimLSTMError, match=f"called '{name}' exists already"):
            register(name, table[name])


def test_an_unknown_storage_of_a_folder_is_named(toys, tmp_path):
    model = Tagger()
    sl.compress_(model, config(toys))
    sl.save(model, tmp_path)
    del methods.STORAGES[toys.STORAGE]
    with pytest.raises(sl.SlimLSTMError, match="'float16', an unknown storage; register it"):
        sl.load(tmp_path, Tagger())
