from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import magnitude_mask, nonzeros_at_rank
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.masks import Mask, apply_mask, mask_of

INPUTS, HIDDEN = 5, 6
MODULES = {
    "LSTM": lambda: nn.LSTM(INPUTS, HIDDEN),
    "LSTM, two layers and directions": lambda: nn.LSTM(INPUTS, HIDDEN, num_layers=2, bidirectional=True),
    "LSTM, projected": lambda: nn.LSTM(INPUTS, HIDDEN, proj_size=3),
    "LSTMCell": lambda: nn.LSTMCell(INPUTS, HIDDEN),
    "LowRankLSTM": lambda: LowRankLSTM.from_dense(nn.LSTM(INPUTS, HIDDEN, num_layers=2)),
    "LowRankLSTMCell": lambda: LowRankLSTMCell.from_dense(nn.LSTMCell(INPUTS, HIDDEN)),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


@pytest.fixture
def x():
    return torch.randn(4, 3, INPUTS)


def run(module, x):
    """Return outputs and last states of an LSTM, or of one step of a cell from a non-zero state."""
    if isinstance(module, nn.LSTMCell | LowRankLSTMCell):
        state = x[1, :, :1].expand(-1, HIDDEN)
        return module(x[0], (state, state))
    output, (h, c) = module(x)
    return output, h, c


def matrix_names(module):
    return [name for name, _ in module.named_parameters() if name.startswith(("weight_ih", "weight_hh"))]


def some_masks(module, kept=0.4):
    return {
        name: magnitude_mask(w, int(kept * w.numel())) for name in matrix_names(module) for w in [getattr(module, name)]
    }


def zeroed(module, masks):
    """Return a copy without masks, whose weights are set to zero directly."""
    copy = deepcopy(module)
    with torch.no_grad():
        for name, mask in masks.items():
            getattr(copy, name)[~mask] = 0.0
    return copy


def masked(module, masks):
    for name, mask in masks.items():
        apply_mask(module, name, mask)
    return module


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_a_mask_keeps_as_many_as_asked_and_the_largest(values, data):
    kept = data.draw(st.integers(1, len(values)))
    mask = magnitude_mask(torch.tensor(values, dtype=torch.float32)[None], kept)[0].tolist()
    by_magnitude = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))
    assert [index for index, keep in enumerate(mask) if keep] == sorted(by_magnitude[:kept])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_of_equal_entries_the_first_in_row_order_are_kept(dtype):
    matrix = torch.tensor([[1, -2, 1], [-1, 3, 1]], dtype=dtype, requires_grad=True)
    mask = magnitude_mask(matrix, 4)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, True], [False, True, False]]
    assert magnitude_mask(matrix.T, 4).tolist() == [[True, True], [True, True], [False, False]]


@pytest.mark.parametrize("kept", [0, -1, 7])
def test_no_nonzeros_or_more_than_all_are_refused(kept):
    with pytest.raises(SlimLSTMError, match=rf"the nonzeros of a \[2, 3\] matrix must number 1 to 6, not {kept}"):
        magnitude_mask(torch.ones(2, 3), kept)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_matrix_with_nan_is_refused(kept):
    """NaN cannot be compared, so no magnitude is the largest."""
    with pytest.raises(SlimLSTMError, match="NaN"):
        magnitude_mask(torch.tensor([[1.0, float("nan")], [3.0, 2.0]]), kept)


@pytest.mark.parametrize(
    ("shape", "rank", "kept"), [((4600, 1150), 10, 57_500), ((4, 6), 2, 20), ((4, 6), 3, 24), ((1, 1), 1, 1)]
)
def test_nonzeros_at_a_rank_are_the_factors_weights_and_at_most_all(shape, rank, kept):
    assert nonzeros_at_rank(shape, rank) == kept


@every_module
def test_the_forward_pass_sees_the_mask_and_the_mask_after_it(make, x):
    module = make()
    dense = run(module, x)
    first, second = some_masks(module, 0.4), some_masks(module, 0.7)
    by_hand = [run(zeroed(module, masks), x) for masks in (first, second)]
    assert not torch.equal(by_hand[0][0], dense[0])
    assert not torch.equal(by_hand[0][0], by_hand[1][0])
    for masks, expected in zip((first, second), by_hand, strict=True):
        assert_close(run(masked(module, masks), x), expected)
        with torch.no_grad():
            assert_close(run(module, x), expected)


@every_module
def test_one_masked_matrix_leaves_the_others_alone(make, x):
    module = make()
    name, mask = next(reversed(some_masks(module).items()))
    expected = run(zeroed(module, {name: mask}), x)
    apply_mask(module, name, mask)
    assert_close(run(module, x), expected)


@every_module
def test_a_mask_outlasts_a_change_of_dtype(make, x):
    module = make()
    masks = some_masks(module)
    expected = zeroed(module, masks).double()
    module = masked(module, masks).to(torch.float64)
    assert_close(run(module, x.double()), run(expected, x.double()))
    assert all(mask_of(module, name).mask.dtype == torch.bool for name in masks)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a forward pass"])
@every_module
def test_a_copy_has_masks_and_weights_of_its_own(make, used, x):
    module = make()
    masks = some_masks(module)
    expected = run(zeroed(module, masks), x)
    masked(module, masks)
    if used:
        run(module, x)
    copy = deepcopy(module)
    assert_close(run(copy, x), expected)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert_close(run(copy, x), expected)


@every_module
def test_masks_and_weights_travel_in_the_state_dict(make, x):
    module = make()
    masks = some_masks(module, 0.4)
    expected = run(zeroed(module, masks), x)
    masked(module, masks)
    other = make()
    masked(other, some_masks(other, 0.9))
    run(other, x)
    other.load_state_dict(module.state_dict())
    assert_close(run(other, x), expected)


@every_module
def test_the_forward_pass_sees_weights_that_changed_behind_the_mask(make, x):
    module = make()
    masks = some_masks(module)
    by_hand = zeroed(module, masks)
    run(masked(module, masks), x)
    with torch.no_grad():
        for parameter in (*module.parameters(), *by_hand.parameters()):
            parameter.mul_(2.0)
    assert_close(run(module, x), run(by_hand, x))


@every_module
def test_masks_stay_on_in_training(make, x):
    module = make()
    masks = some_masks(module)
    masked(module, masks)
    started = {name: getattr(module, name).detach().clone() for name in masks}
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(10):
        optimiser.zero_grad()
        run(module, x)[0].square().sum().backward()
        for name, mask in masks.items():
            gradient = module.parametrizations[name].original.grad
            assert gradient[~mask].count_nonzero() == 0
            assert gradient[mask].count_nonzero() > 0
        optimiser.step()
    for name, mask in masks.items():
        assert getattr(module, name)[~mask].count_nonzero() == 0
        assert not torch.equal(getattr(module, name), started[name])


def test_a_second_mask_replaces_the_first_and_brings_its_weights_back():
    lstm = nn.LSTM(INPUTS, HIDDEN)
    weight = lstm.weight_hh_l0.detach().clone()
    apply_mask(lstm, "weight_hh_l0", torch.zeros_like(weight, dtype=torch.bool))
    everything = torch.ones_like(weight, dtype=torch.bool)
    apply_mask(lstm, "weight_hh_l0", everything)
    assert torch.equal(lstm.weight_hh_l0, weight)
    assert [type(entry) for entry in lstm.parametrizations.weight_hh_l0] == [Mask]
    assert mask_of(lstm, "weight_hh_l0").mask is everything


def test_a_weight_without_a_mask_has_none():
    lstm = nn.LSTM(INPUTS, HIDDEN)
    assert mask_of(lstm, "weight_hh_l0") is None
    nn.utils.parametrize.register_parametrization(lstm, "weight_hh_l0", nn.Identity())
    assert mask_of(lstm, "weight_hh_l0") is None
