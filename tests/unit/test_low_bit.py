"""Low-bit storages: grids are found again to the bit, codes take their bits in files, and feedback loses less."""

import pytest
import torch
from torch import nn

import slimlstm as sl
from slimlstm.methods import STORAGES, Rounder, matrix_bytes, rounded, svd
from slimlstm.methods.feedback import inverse_factor, round_blocks, round_blocks_compiled, round_with_feedback
from slimlstm.methods.low_bit import (
    GROUP,
    encode_groups,
    group_scales,
    largest_step,
    nearest,
    pack,
    row_scales,
    spread,
    unpack,
)
from slimlstm.ops import native

BITS = range(3, 9)
LOW_BIT = [name for name, row in STORAGES.items() if row.scales == "group"]
SHAPES = [(1, 1), (7, 1), (1, 7), (33, GROUP), (5, GROUP + 1), (12, 129)]
IN, H = 20, 24


def moment(size, rows=500):
    inputs = torch.randn(rows, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    return inputs.T @ inputs / rows


def loss(difference, inputs, gradients):
    difference = difference.double()
    return float(((gradients @ difference) * (difference @ inputs)).sum())


def decoded(codes, scale):
    return codes * spread(scale.float(), codes.shape[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_grid_is_found_again_to_the_bit(bits, shape):
    value = decoded(*encode_groups(torch.randn(shape), bits))
    assert torch.equal(decoded(*encode_groups(value, bits)), value)
    assert torch.equal(decoded(*encode_groups(value / 2, bits)), value / 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_rounding_with_feedback_stays_on_the_grid_and_loses_less(bits, shape):
    weight, (m, n) = torch.randn(shape), shape
    value, inputs, gradients = decoded(*encode_groups(weight, bits)), moment(n), moment(m)
    across, down, alike = inverse_factor(inputs), inverse_factor(gradients), torch.eye(m, dtype=torch.float64)
    for found, metric in (
        (round_with_feedback(weight, across, None, bits), alike),
        (round_with_feedback(weight, across, inverse_factor(alike), bits), alike),
        (round_with_feedback(weight, across, down, bits), gradients),
    ):
        assert torch.equal(decoded(*encode_groups(found, bits)), found)
        if n >= GROUP and m > 1:
            share = 0.8 if metric is alike else 0.9
            assert loss(found - weight, inputs, metric) < share * loss(value - weight, inputs, metric)


def rounded_one_by_one(weight, inputs, gradients, bits, rows):
    """Round every number in turn, and move the numbers that follow to where the damped loss is lowest."""
    across, down = (torch.linalg.cholesky(inputs.inverse(), upper=True) for inputs in (inputs, gradients))
    wanted, result, base = weight.double().clone(), torch.empty_like(weight), row_scales(weight, bits)
    for top in range(0, len(weight), rows):
        chunk = slice(top, top + rows)
        work = wanted[chunk].clone()
        for column in range(weight.shape[1]):
            if column % GROUP == 0:
                scale = group_scales(work[:, column : column + GROUP].float(), bits, base[chunk])
            result[chunk, column] = nearest(work[:, column].float(), scale, bits)
            error = (work[:, column] - result[chunk, column]) / across[column, column]
            work[:, column + 1 :] -= error[:, None] * across[column, column + 1 :]
        solved = torch.linalg.solve(down[chunk, chunk], wanted[chunk] - result[chunk])
        wanted[top + rows :] -= down[chunk, top + rows :].T @ solved
    return result


@pytest.mark.parametrize("shape", [(5, GROUP + 1), (12, 129), (133, 70)])
def test_chunks_that_move_on_together_round_as_one_by_one(shape):
    m, n = shape
    weight, inputs, gradients = torch.randn(shape), moment(n), moment(m)
    damped = [
        matrix + 0.01 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
        for matrix in (inputs, gradients)
    ]
    expected = rounded_one_by_one(weight, *damped, 4, rows=-(-m // 128))
    found = round_with_feedback(weight, inverse_factor(inputs), inverse_factor(gradients), 4)
    # A tie may fall to either side, and changes what follows.
    assert (found == expected).float().mean() > 0.9
    assert loss(found - weight, inputs, gradients) < 1.05 * loss(expected - weight, inputs, gradients)


@pytest.mark.skipif(bool(native.missing), reason="the kernel is missing")
@pytest.mark.parametrize("kind", ["normal", "zeros", "tiny", "huge", "outlier"])
@pytest.mark.parametrize("bits", BITS)
def test_the_compiled_rounding_rounds_as_the_plain_one(bits, kind):
    work = torch.randn(6, 3, GROUP, dtype=torch.float64)
    work *= {"zeros": 0.0, "tiny": 1e-30, "huge": 1e30}.get(kind, 1.0)
    work[:, 1, 5] *= 1e4 if kind == "outlier" else 1.0
    base = row_scales(work.flatten(0, 1).float(), bits).view(6, 3)
    factor = torch.stack([inverse_factor(moment(GROUP)) for _ in range(6)])
    plain, compiled = (run(work.clone(), factor, base, bits) for run in (round_blocks, round_blocks_compiled))
    for ours, theirs in zip(compiled, plain, strict=True):
        # Scales whose squared errors tie may differ.
        same = torch.isclose(ours, theirs, rtol=1e-6, atol=0).all(dim=-1)
        assert same.float().mean() > 0.9


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_without_loss(bits):
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (5, 13), dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.shape == (-(-65 * bits // 8),)
    assert torch.equal(unpack(packed, bits, (5, 13)), codes)


@pytest.mark.parametrize("storage", LOW_BIT)
def test_zeros_and_outliers_survive(storage):
    weight = torch.zeros(3, 70)
    weight[1, 5], weight[2, 66] = 1e-3, -40.0
    value = rounded(weight, storage)
    assert torch.equal(value != 0, weight != 0)
    # Scales are multiples, exact in float16, of one number a row: its significant bits limit a row's largest weight.
    significant = 11 - largest_step(STORAGES[storage].bits).bit_length()
    torch.testing.assert_close(value, weight, rtol=2.0 ** (1 - significant), atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-5, 1.0, 300.0])
@pytest.mark.parametrize("bits", BITS)
def test_every_row_holds_integers_of_eight_bits(bits, size, shape):
    torch.manual_seed(shape[1])
    weight = size * torch.randn(shape)
    for found in (
        decoded(*encode_groups(weight, bits)),
        round_with_feedback(weight, inverse_factor(moment(shape[1])), None, bits),
        round_with_feedback(weight, inverse_factor(moment(shape[1])), inverse_factor(moment(shape[0])), bits),
    ):
        for row in found:
            integers = [row / (row.abs().max() / code) for code in range(1, 128)] if row.any() else [row]
            steps = [row.abs().max() / code for code in range(1, 128)] if row.any() else [torch.tensor(1.0)]
            assert any(torch.equal(i.round() * step, row) for i, step in zip(integers, steps, strict=True))


def test_factors_are_rounded_in_the_metric_of_their_moments():
    matrix, inputs, gradients = torch.randn(60, 40), moment(40), moment(60)
    found = svd(matrix, 12)

    def rise(u, v):
        return loss(matrix.double() - u.double() @ v.double(), inputs, gradients)

    truncated = rise(found.u, found.v)
    for storage in LOW_BIT:
        with_feedback = rise(*Rounder(inputs, gradients).factors(found.u, found.v, matrix, storage)) - truncated
        assert with_feedback < 0.5 * (rise(rounded(found.u, storage), rounded(found.v, storage)) - truncated)


def test_factors_beyond_the_rank_of_their_inputs_are_rounded():
    matrix, gradients = torch.randn(60, 40), moment(60)
    gradients[:, 7:] = gradients[7:] = 0
    few = torch.randn(200, 5) @ torch.randn(5, 40)
    # Sums in float32 leave small negative eigenvalues.
    inputs = (few.T @ few).double() / 200 - 1e-5 * torch.eye(40, dtype=torch.float64)
    found = svd(matrix, 12)
    for storage in LOW_BIT:
        u, v = Rounder(inputs, gradients).factors(found.u, found.v, matrix, storage)
        lost = loss(matrix - u.double() @ v.double(), inputs, gradients)
        assert lost < 0.2 * loss(matrix, inputs, gradients)
        for zeros in (torch.zeros_like(gradients), torch.zeros_like(inputs)):
            shown = {"gradients": zeros} if len(zeros) == 60 else {"inputs": zeros, "gradients": gradients}
            for part in Rounder(**{"inputs": inputs, **shown}).factors(found.u, found.v, matrix, storage):
                assert bool(torch.isfinite(part).all())


def test_factors_of_zeros_stay_zeros():
    """The least squares for U is singular then, unless it is damped."""
    u, v = Rounder(torch.eye(2)).factors(torch.zeros(4, 1), torch.zeros(1, 2), torch.zeros(4, 2), "int4")
    assert not u.any()
    assert not v.any()


def test_without_moments_weights_are_rounded_to_nearest():
    weight = torch.randn(9, 70)
    assert torch.equal(Rounder().matrix(weight, "int4"), rounded(weight, "int4"))


@pytest.mark.parametrize("inputs", [None, torch.eye(8)], ids=["nearest", "feedback"])
def test_only_float32_is_rounded(inputs):
    weight = torch.randn(12, 8, dtype=torch.float64)
    with pytest.raises(sl.SlimLSTMError, match=r"only float32 weights .* not torch\.float64"):
        Rounder(inputs).matrix(weight, "int4")
    with pytest.raises(sl.SlimLSTMError, match=r"only float32 weights .* not torch\.float64"):
        Rounder(inputs).factors(weight[:, :2], weight[:2], weight, "int4")


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(IN, H, bidirectional=True, proj_size=10)

    def forward(self, x):
        return self.lstm(x)[0]


def make():
    torch.manual_seed(3)
    return Tagger().eval()


CONFIGS = {
    **{storage: sl.Quantize(storage) for storage in LOW_BIT},
    "factors": sl.LowRank("fisher", rank=4, storage="int4"),
    "plan": sl.Plan({"lstm.weight_hh_l0": sl.SitePlan("svd", rank=3, storage="int5")}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_low_bit_models_are_saved_and_loaded_to_the_bit(config, tmp_path):
    batches = [torch.randn(9, 4, IN) for _ in range(3)]
    model = make()
    report = sl.compress_(model, config, batches=batches, loss=lambda model, x: model(x).square())
    sl.save(model, tmp_path)
    loaded = sl.load(tmp_path, make())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    for site in report.sites:
        assert site.bytes_after == matrix_bytes(site.shape, site.rank, site.storage, 4)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(batches[0]), model(batches[0]))
        model.lstm.backend = "reference"
        truth = model(batches[0])
        # The kernel reads the weights as int8, without loss, and rounds their inputs: the bound of int8 itself.
        assert (loaded(batches[0]) - truth).norm() <= 0.02 * truth.norm()
        loaded.lstm.backend = "reference"
        torch.testing.assert_close(loaded(batches[0]), truth)


def test_a_file_takes_the_bits_that_the_report_counts(tmp_path):
    model = nn.Sequential(nn.LSTM(128, 128))
    report = sl.compress_(model, sl.Quantize("int3"))
    sl.save(model, tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    assert weights.stat().st_size < report.model.bytes_after + 1000


def test_a_budget_in_bytes_is_kept(tmp_path):
    batches = [torch.randn(9, 4, 100) for _ in range(3)]
    model = nn.Sequential(nn.LSTM(100, 100))
    config = sl.LowRank("activation", bytes=15_000, storage="int4")
    report = sl.compress_(model, config, batches=batches, refit=0)
    assert sum(site.bytes_after for site in report.sites) <= 15_000


def make_plain():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(IN, H)

        def forward(self, x):
            return self.lstm(x)[0]

    return Plain().eval()


def test_batches_alone_make_dense_matrices_lose_less():
    model = make_plain()
    batches = [torch.randn(30, 4, 3) @ torch.randn(3, IN) for _ in range(3)]
    results = []
    for given in (None, batches):
        rounded_model = make_plain()
        rounded_model.load_state_dict(model.state_dict())
        sl.compress_(rounded_model, sl.Quantize("int3"), batches=given)
        with torch.no_grad():
            results.append(float(sum((rounded_model(x) - model(x)).square().sum() for x in batches)))
    assert results[1] < 0.7 * results[0]
