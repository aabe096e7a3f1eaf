"""Reports of later steps: the method stays known, and the totals add up to one compression of the dense model."""

import copy

import pytest
import torch
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
