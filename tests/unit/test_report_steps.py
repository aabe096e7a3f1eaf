"""Reports of later steps: the method stays known, and the totals add up to one compression of the dense model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import slimlstm as sl
from slimlstm.weight_files import compress_file

FIRST = {
    "svd": sl.LowRank("svd", rank=4),
    "prune": sl.Prune(keep=0.3),
    "dense": sl.Quantize("int8"),
}


def model_of(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.LSTM(20, 32, 2, **options))


def size_of(model):
    return sum(p.numel() for p in model.parameters()), sum(4 * p.numel() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"proj_size": 12}, {"bidirectional": True}], ids=["", "projected", "both ways"])
@pytest.mark.parametrize("method", FIRST)
def test_rounding_keeps_the_method_and_adds_up(method, options):
    model = model_of(**options)
    parameters, size = size_of(model)
    first = sl.compress_(model, FIRST[method])
    assert first.lstm_since_dense is None
    with torch.no_grad():
        model[0].bias_ih_l0.add_(0.1)  # as training does
    last = sl.compress_(model, sl.Quantize("int4"))
    assert {site.method for site in last.sites} == {method}
    assert [site.rank for site in last.sites] == [site.rank for site in first.sites]
    assert last.model.bytes_before == first.model.bytes_after
    for total in (last.lstm_since_dense, last.model_since_dense):
        assert (total.parameters_before, total.bytes_before) == (parameters, size)
        assert (total.parameters_after, total.bytes_after) == (last.model.parameters_after, last.model.bytes_after)
    assert "model, since dense: " in str(last)
    assert "model, since dense: " in last._repr_html_()
    assert type(last).from_dict(last.to_dict()) == last


def test_shared_matrices_count_once():
    model = nn.Sequential(nn.LSTM(20, 32), nn.LSTM(20, 32))
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    size = size_of(model)
    sl.compress_(model, sl.LowRank("svd", rank=4))
    total = sl.compress_(model, sl.Quantize("int8")).model_since_dense
    assert (total.parameters_before, total.bytes_before) == size


def bytes_in(folder):
    return sum(value.nbytes for path in folder.glob("*.safetensors") for value in load_file(path).values())


@pytest.mark.parametrize("tied", [False, True])
def test_masks_take_the_bytes_that_the_report_says(tied, tmp_path):
    def make():
        model = nn.Sequential(nn.LSTM(32, 32), nn.LSTM(32, 32))
        if tied:
            model[1].weight_hh_l0 = model[0].weight_hh_l0
        return model

    model = make()
    dense = size_of(model)[1]
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    report = compress_file(tmp_path / "dense.pt", sl.Prune(keep=0.5), tmp_path / "file")
    assert report.model.bytes_after == report.lstm.bytes_after == bytes_in(tmp_path / "file")
    report = sl.compress_(model, sl.Prune(keep=0.5))
    assert report.sites[0].bytes_after == 5 * 128 * 32
    sl.save(model, tmp_path / "pruned")
    assert report.model.bytes_after == report.lstm.bytes_after == bytes_in(tmp_path / "pruned")
    loaded = sl.load(tmp_path / "pruned", make())
    for index, rounded in enumerate([model, loaded]):
        report = sl.compress_(rounded, sl.Quantize("int8"))
        sl.save(rounded, tmp_path / str(index))
        assert report.model.bytes_after == bytes_in(tmp_path / str(index)) < dense
        assert report.model_since_dense.bytes_before == dense
    report = compress_file(tmp_path / "pruned", sl.Quantize("int8"), tmp_path / "rounded")
    assert report.model.bytes_after == bytes_in(tmp_path / "rounded")
    assert report.model_since_dense.bytes_before == dense
    report = sl.compress_(model, sl.LowRank(rank=3))
    assert report.sites[0].bytes_before == 128 * 32 + 4 * 128 + 128 * 32
    assert report.model_since_dense.bytes_before == dense


def test_matrices_that_a_later_step_leaves_out_count_too():
    model = model_of()
    size = size_of(model)
    sl.compress_(model, sl.LowRank("svd", rank=4))
    total = sl.compress_(model, sl.Quantize("int8", target="hh")).model_since_dense
    assert (total.parameters_before, total.bytes_before) == size


def test_a_folder_remembers_the_first_step(tmp_path):
    model = model_of()
    dense = copy.deepcopy(model)
    sl.compress_(model, sl.LowRank("svd", rank=4))
    sl.save(model, tmp_path / "factored")
    report = compress_file(tmp_path / "factored", sl.Quantize("int8"), tmp_path / "rounded")
    assert {site.method for site in report.sites} == {"svd"}
    assert (report.model_since_dense.parameters_before, report.model_since_dense.bytes_before) == size_of(dense)
    again = sl.load(tmp_path / "rounded", copy.deepcopy(dense))
    last = sl.compress_(again, sl.Quantize("int4"))
    assert {site.method for site in last.sites} == {"svd"}
    assert last.model_since_dense.bytes_before == size_of(dense)[1]
