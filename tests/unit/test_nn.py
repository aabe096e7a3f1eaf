"""The contract of LowRankLSTM and LowRankLSTMCell as modules; ``test_ops`` compares their outputs.

Dimensions: T time steps, B sequences, INPUT input size, H hidden size, P projection size, L layers, D directions, r rank.
"""

import pickle
from copy import deepcopy

import pytest
import torch
from helpers import BACKENDS, EXACT, assert_same, factor_gradients, factors_of, replaced, with_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from slimlstm.errors import SlimLSTMError
from slimlstm.methods import magnitude_mask
from slimlstm.modules.cell import LowRankLSTMCell
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.modules.masks import apply_mask

INPUT, H, P, B, T = 5, 7, 3, 2, 4
DEEP = {
    "input_size": INPUT,
    "hidden_size": H,
    "num_layers": 2,
    "bidirectional": True,
    "proj_size": P,
    "dtype": torch.float64,
}
RANKS = {"weight_hh_l0_reverse": 2, "weight_ih_l1": 3}

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def deep(**settings) -> LowRankLSTM:
    return LowRankLSTM(**{**DEEP, "ranks": RANKS, **settings})


def some_input(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(T, B, INPUT, dtype=dtype)


def outputs(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    output, (h, c) = module(x)
    return {"output": output, "h_n": h, "c_n": c}


def bfloat16_lstm_runs() -> bool:
    """Return whether PyTorch's own LSTM runs in bfloat16 here; oneDNN refuses it on some CPUs."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


needs_bfloat16_lstm = pytest.mark.skipif(not bfloat16_lstm_runs(), reason="PyTorch's LSTM has no bfloat16 on this CPU")


def cell_outputs(cell: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    h, c = cell(inputs["input"], (inputs["h"], inputs["c"]) if "h" in inputs else None)
    return {"h_1": h, "c_1": c}


def assert_equal_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert_same(actual, expected, rtol=0.0, atol=0.0)


def test_names_are_pytorchs_and_two_for_every_factored_matrix():
    factored = {name for name, _ in nn.LSTM(**DEEP).named_parameters()} - set(RANKS)
    factored |= {f"{name}_{factor}" for name in RANKS for factor in "uv"}
    built = deep()
    assert set(built.state_dict()) == factored
    assert built.ranks == RANKS
    shapes = {name: tuple(value.shape) for name, value in built.named_parameters() if name[:-2] in RANKS}
    assert shapes == {
        "weight_hh_l0_reverse_u": (4 * H, 2),
        "weight_hh_l0_reverse_v": (2, P),
        "weight_ih_l1_u": (4 * H, 3),
        "weight_ih_l1_v": (3, 2 * P),
    }


def loaded(module: LowRankLSTM) -> LowRankLSTM:
    copy = deep()
    assert not torch.equal(copy.weight_ih_l1_u, module.weight_ih_l1_u)
    copy.load_state_dict(module.state_dict())
    return copy


COPIES = {
    "state_dict": loaded,
    "state_dict of from_dense": lambda module: loaded(
        LowRankLSTM.from_dense(module.to_dense(), {name: module.matrix(name) for name in RANKS})
    ),
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),  # noqa: S301
    "deepcopy": deepcopy,
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copies_compute_the_same_to_the_bit_and_share_nothing(copy):
    module, x = deep().eval(), some_input()
    module.bias_hh_l0.requires_grad_(False)
    copied = copy(module).eval()
    expected = outputs(module, x)
    assert_equal_bits(outputs(copied, x), expected)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert_equal_bits(outputs(copied, x), expected)


@pytest.mark.parametrize("copy", [COPIES["pickle"], deepcopy], ids=["pickle", "deepcopy"])
def test_copies_keep_settings(copy):
    module = deep(dropout=0.25, batch_first=True, backend="reference").eval()
    module.weight_hh_l0_reverse_u.requires_grad_(False)
    copied = copy(module)
    assert repr(copied) == repr(module)
    assert (copied.backend, copied.training) == ("reference", False)
    frozen = [name for name, value in copied.named_parameters() if not value.requires_grad]
    assert frozen == ["weight_hh_l0_reverse_u"]


def test_another_rank_is_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l1_u"):
        deep(ranks={**RANKS, "weight_ih_l1": 2}).load_state_dict(deep().state_dict())


@every_backend
def test_dtype_can_be_changed(backend):
    module = deep(backend=backend)
    x = some_input(torch.bfloat16)
    assert module.to(torch.bfloat16) is module
    assert {value.dtype for value in outputs(module, x).values()} == {torch.bfloat16}
    assert {value.dtype for value in module.parameters()} == {torch.bfloat16}


@every_backend
def test_weights_changed_in_place_are_seen(backend):
    module, x = deep(backend=backend), some_input()
    with torch.no_grad():
        before = outputs(module, x)
        for parameter in module.parameters():
            parameter.mul_(2)
        after = outputs(module, x)
        assert not torch.allclose(after["output"], before["output"])
        assert_same(after, outputs(module.to_dense(), x), **EXACT)


def test_flatten_parameters_changes_nothing():
    module, x = deep(), some_input()
    before = outputs(module, x)
    assert module.flatten_parameters() is None
    assert_equal_bits(outputs(module, x), before)


def test_repr_shows_settings_that_differ_from_the_defaults():
    assert repr(LowRankLSTM(INPUT, H)) == "LowRankLSTM(5, 7, num_layers=1, ranks={})"
    everything = deep(dropout=0.25, batch_first=True, bias=False)
    assert everything.extra_repr() == (
        "5, 7, num_layers=2, batch_first, bidirectional, dropout=0.25, proj_size=3, bias=False, "
        "ranks={'weight_hh_l0_reverse': 2, 'weight_ih_l1': 3}"
    )
    cell = LowRankLSTMCell(INPUT, H, bias=False, ranks={"weight_hh": 2})
    assert repr(cell) == "LowRankLSTMCell(5, 7, bias=False, ranks={'weight_hh': 2})"


def test_total_dropout_leaves_the_next_layer_only_its_bias():
    module = LowRankLSTM(INPUT, H, num_layers=2, dropout=1.0, ranks={"weight_hh_l1": 2}, dtype=torch.float64)
    second = nn.LSTM(H, H, dtype=torch.float64)
    weights = module.to_dense().state_dict()
    second.load_state_dict({name: weights[name.replace("l0", "l1")] for name in second.state_dict()})
    expected, _ = second(torch.zeros(T, B, H, dtype=torch.float64))
    torch.testing.assert_close(module(some_input())[0], expected, **EXACT)


@every_backend
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_dropout_is_pytorchs(backend, packed):
    module = deep(dropout=0.5, backend=backend)
    dense, x = module.to_dense(), some_input()
    x = pack_padded_sequence(x, [T, 1]) if packed else x
    data = [lstm_output(lstm, x) for lstm in (module, module, dense)]
    torch.testing.assert_close(data[0], data[2], **EXACT)
    assert not torch.allclose(module(x)[1][0], module(x)[1][0])
    module.eval()
    torch.testing.assert_close(module(x)[1][0], module(x)[1][0], rtol=0, atol=0)
    torch.testing.assert_close(module(x)[1][0], dense.eval()(x)[1][0], **EXACT)


def lstm_output(lstm: nn.Module, x) -> torch.Tensor:
    """Return the output under one fixed sequence of random numbers."""
    torch.manual_seed(2)
    output, _ = lstm(x)
    return output if isinstance(output, torch.Tensor) else output.data


def test_no_dropout_after_the_last_layer():
    module = LowRankLSTM(INPUT, H, dropout=1.0, dtype=torch.float64)
    assert module(some_input())[0].abs().min() > 0


def test_from_dense_shares_dense_parameters_and_registers_factors_as_they_are():
    lstm = nn.LSTM(**DEEP).eval()
    lstm.weight_hh_l0.requires_grad_(False)
    u, v = nn.Parameter(torch.randn(4 * H, 2).double(), requires_grad=False), nn.Parameter(torch.randn(2, P).double())
    module = LowRankLSTM.from_dense(lstm, {"weight_hh_l1": (u, v)})
    own = dict(module.named_parameters())
    assert own.pop("weight_hh_l1_u") is u
    assert own.pop("weight_hh_l1_v") is v
    theirs = dict(lstm.named_parameters())
    assert theirs.pop("weight_hh_l1").requires_grad
    assert own.keys() == theirs.keys()
    assert all(own[name] is theirs[name] for name in own)
    assert not module.training


@pytest.mark.parametrize("training", [True, False])
def test_dense_round_trip_to_the_bit(training):
    lstm = nn.LSTM(**DEEP, bias=False, batch_first=True, dropout=0.25).train(training)
    back = LowRankLSTM.from_dense(lstm).to_dense()
    assert (repr(back), back.training) == (repr(lstm), training)
    assert_equal_bits(back.state_dict(), lstm.state_dict())
    assert not {value.data_ptr() for value in back.parameters()} & {value.data_ptr() for value in lstm.parameters()}


def test_to_dense_multiplies_factors():
    module, x = deep(), some_input()
    dense = module.to_dense()
    assert torch.equal(dense.weight_ih_l1, module.weight_ih_l1_u @ module.weight_ih_l1_v)
    assert_same(outputs(dense, x), outputs(module, x), **EXACT)


def test_set_factors_again_takes_another_rank():
    module, x = deep(), some_input()
    module.set_factors("weight_ih_l1", torch.ones(4 * H, 1).double(), torch.ones(1, 2 * P).double())
    assert module.ranks == {**RANKS, "weight_ih_l1": 1}
    assert torch.equal(module.to_dense().weight_ih_l1, torch.ones(4 * H, 2 * P).double())
    assert_same(outputs(module, x), outputs(module.to_dense(), x), **EXACT)


@every_backend
def test_gradients_do_not_depend_on_the_mode(backend):
    module, inputs = deep(backend=backend), {"input": some_input()}

    def call(module, inputs):
        return outputs(module, inputs["input"])

    expected = with_gradients(module.train(), inputs, call)
    assert_same(with_gradients(module.eval(), inputs, call), expected, **EXACT)


@every_backend
def test_frozen_factors_get_no_gradient_and_pass_it_on(backend):
    module, x = deep(backend=backend), some_input().requires_grad_()
    module.weight_hh_l0_reverse_u.requires_grad_(False)
    module(x)[0].sum().backward()
    assert [name for name, value in module.named_parameters() if value.grad is None] == ["weight_hh_l0_reverse_u"]
    assert x.grad.abs().min() > 0


@needs_bfloat16_lstm
@every_backend
@pytest.mark.parametrize("proj_size", [0, P])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad], ids=["grad", "no_grad"])
def test_autocast(backend, proj_size, mode):
    settings = {
        "proj_size": proj_size,
        "dtype": torch.float32,
        "ranks": {**RANKS, "weight_ih_l0": 1, "weight_ih_l0_reverse": 1},
    }
    module, x = deep(**settings, backend=backend), some_input(torch.float32)
    expected = outputs(module, x)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        actual = outputs(module, x)
    eps = torch.finfo(torch.bfloat16).eps
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].to(value), value, rtol=2 * eps, atol=2 * eps)


@needs_bfloat16_lstm
@every_backend
@pytest.mark.parametrize("proj_size", [0, P])
def test_autocast_output_has_the_dtype_of_pytorch(backend, proj_size):
    module, x = deep(proj_size=proj_size, dtype=torch.float32, backend=backend), some_input(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype == module.to_dense()(x)[0].dtype == torch.bfloat16


MASKED = ["weight_hh_l1", "weight_ih_l0"]


def masked() -> LowRankLSTM:
    module = deep()
    for name in MASKED:
        apply_mask(module, name, magnitude_mask(getattr(module, name), 9))
    return module


@every_backend
def test_masks_are_honoured(backend):
    module, x = masked(), some_input()
    module.backend = backend
    dense = module.to_dense()
    for name in MASKED:
        assert getattr(dense, name).count_nonzero() == 9
    assert not nn.utils.parametrize.is_parametrized(dense)
    assert_same(outputs(module, x), outputs(dense, x), **EXACT)
    assert_same(outputs(deepcopy(module), x), outputs(dense, x), **EXACT)


def test_masked_weights_get_no_gradient():
    module = masked()
    module(some_input())[0].sum().backward()
    for name in MASKED:
        stack = module.parametrizations[name]
        assert torch.equal(stack.original.grad != 0, stack[0].mask)


def test_a_mask_on_a_factor_is_honoured():
    module, x = deep(), some_input()
    apply_mask(module, "weight_ih_l1_v", magnitude_mask(module.weight_ih_l1_v, 4))
    assert module.ranks == RANKS
    dense = module.to_dense()
    assert torch.equal(dense.weight_ih_l1, module.weight_ih_l1_u @ module.weight_ih_l1_v)
    assert_same(outputs(module, x), outputs(dense, x), **EXACT)


def test_factors_take_the_place_of_a_masked_matrix():
    module, x = masked(), some_input()
    factors = factors_of(module, {"weight_hh_l1": 2})
    module.set_factors("weight_hh_l1", *factors["weight_hh_l1"])
    assert module.ranks == {**RANKS, "weight_hh_l1": 2}
    assert_same(outputs(module, x), outputs(module.to_dense(), x), **EXACT)


@pytest.fixture
def poison(monkeypatch):
    """Fill uninitialised memory with NaN, so that reading it shows."""

    def poisoned(make):
        def empty(*args, **settings):
            tensor = make(*args, **settings)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    assert torch.empty(2).isnan().all()
    assert torch.empty_like(torch.zeros(2)).isnan().all()


@pytest.mark.usefixtures("poison")
@every_backend
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_no_uninitialised_memory_is_read(backend, form):
    lstm, x = nn.LSTM(**DEEP), some_input()
    from_dense = LowRankLSTM.from_dense(lstm, factors_of(lstm, RANKS))
    packed = pack_padded_sequence(x, [T, 1])
    for module in (deep(), from_dense, from_dense.to_dense(), LowRankLSTM.from_dense(lstm)):
        module.backend = backend
        output, (h, c) = module(x if form == "padded" else packed)
        for value in (output if form == "padded" else output.data, h, c, *module.parameters()):
            assert value.isfinite().all()


@pytest.mark.usefixtures("poison")
def test_no_uninitialised_memory_is_read_by_cells():
    cell = nn.LSTMCell(INPUT, H)
    for module in (
        LowRankLSTMCell(INPUT, H, ranks={"weight_hh": 2}),
        LowRankLSTMCell.from_dense(cell, factors_of(cell, {"weight_ih": 1})),
    ):
        for value in (*module(torch.randn(B, INPUT)), *module.to_dense().parameters()):
            assert value.isfinite().all()


def test_fresh_factors_multiply_to_the_variance_of_pytorch():
    module, lstm = LowRankLSTM(256, 256, ranks={"weight_hh_l0": 64}), nn.LSTM(256, 256)
    product = module.to_dense().weight_hh_l0
    # 64 products of factors that 1024 rows share: the sample deviates by a few per cent at most.
    assert (product.var() / lstm.weight_hh_l0.var()).item() == pytest.approx(1.0, rel=0.05)


RECURRENT = "weight_ih_l0, weight_hh_l0"
CONSTRUCTION = {
    "input_size": (lambda: LowRankLSTM(0, 4), "at least 1 .* not 0, 4, 1 and 0"),
    "hidden_size": (lambda: LowRankLSTM(3, 0), "at least 1 .* not 3, 0, 1 and 0"),
    "num_layers": (lambda: LowRankLSTM(3, 4, 0), "at least 1 .* not 3, 4, 0 and 0"),
    "proj_size": (lambda: LowRankLSTM(3, 4, proj_size=4), "proj_size below hidden_size, not 3, 4, 1 and 4"),
    "negative proj_size": (lambda: LowRankLSTM(3, 4, proj_size=-1), "not 3, 4, 1 and -1"),
    "dropout": (lambda: LowRankLSTM(3, 4, dropout=1.5), r"a probability in \[0, 1\], not 1.5"),
    "unknown matrix": (
        lambda: LowRankLSTM(3, 4, ranks={"weight_hh_l1": 2}),
        f"weight_hh_l1, but the only matrices are {RECURRENT}",
    ),
    "a bias": (lambda: LowRankLSTM(3, 4, ranks={"bias_hh_l0": 1}), f"bias_hh_l0, but the only matrices are {RECURRENT}"),
    "rank 0": (lambda: LowRankLSTM(3, 4, ranks={"weight_hh_l0": 0}), "weight_hh_l0, 16 x 4, .* 1 to 4, not 0"),
    "rank too large": (lambda: LowRankLSTM(3, 4, ranks={"weight_ih_l0": 4}), "weight_ih_l0, 16 x 3, .* 1 to 3, not 4"),
    "cell size": (lambda: LowRankLSTMCell(3, 0), "at least 1, not 3 and 0"),
    "cell matrix": (
        lambda: LowRankLSTMCell(3, 4, ranks={"weight_hh_l0": 1}),
        "weight_hh_l0, .* only matrices are weight_ih",
    ),
    "cell rank": (lambda: LowRankLSTMCell(3, 4, ranks={"weight_hh": 5}), "weight_hh, 16 x 4, .* 1 to 4, not 5"),
}


@pytest.mark.parametrize(("construct", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_construction_refused(construct, message):
    with pytest.raises(SlimLSTMError, match=message):
        construct()


FACTORS = {
    "unknown matrix": ("weight_hh_l1", (16, 2), (2, 4), f"no matrix is called 'weight_hh_l1'; .* are {RECURRENT}"),
    "a bias": ("bias_hh_l0", (16, 2), (2, 4), f"no matrix is called 'bias_hh_l0'; the matrices are {RECURRENT}"),
    "rows": ("weight_hh_l0", (15, 2), (2, 4), r"\[15, 2\] and \[2, 4\] do not make weight_hh_l0, which is 16 x 4"),
    "columns": ("weight_hh_l0", (16, 2), (2, 3), r"\[16, 2\] and \[2, 3\] do not make weight_hh_l0"),
    "inner size": ("weight_hh_l0", (16, 2), (3, 4), r"\[16, 2\] and \[3, 4\] do not make weight_hh_l0"),
    "ndim": ("weight_hh_l0", (16,), (1, 4), r"\[16\] and \[1, 4\] do not make weight_hh_l0"),
    "rank 0": ("weight_hh_l0", (16, 0), (0, 4), "weight_hh_l0"),
}


@pytest.mark.parametrize(("name", "u", "v", "message"), FACTORS.values(), ids=FACTORS)
def test_factors_refused_before_anything_changed(name, u, v, message):
    module = LowRankLSTM(3, 4)
    factors = torch.ones(u), torch.ones(v)
    with pytest.raises(SlimLSTMError, match=message):
        module.set_factors(name, *factors)
    assert set(module.state_dict()) == set(nn.LSTM(3, 4).state_dict())
    with pytest.raises(SlimLSTMError, match=message):
        LowRankLSTM.from_dense(nn.LSTM(3, 4), {name: factors})


def test_an_lstm_with_parameters_of_its_own_is_refused():
    lstm = nn.LSTM(3, 4)
    apply_mask(lstm, "weight_hh_l0", torch.ones(16, 4, dtype=torch.bool))
    with pytest.raises(SlimLSTMError, match=r"has a parameter 'parametrizations\.weight_hh_l0\.original'"):
        LowRankLSTM.from_dense(lstm)


def packed_input(width: int = 3, ordered: bool = True):
    """Return sequences of lengths 2 and 1, or 1 and 2; both are packed as 2 and 1."""
    lengths = (2, 1) if ordered else (1, 2)
    return pack_sequence([torch.zeros(length, width) for length in lengths], enforce_sorted=ordered)


def states(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(*shape, 4), torch.zeros(*shape, 4)


WIDTH = r"the input has to be \[T, B, 3\]"
STATE = r"h0 has to be "
CALLS = {
    "width": (torch.zeros(2, 1, 4), None, WIDTH + r".* not \[2, 1, 4\]"),
    "width, unbatched": (torch.zeros(2, 4), None, WIDTH + r".* not \[2, 4\]"),
    "width, packed": (packed_input(width=4), None, r"the input has to be .*3.* not \[3, 4\]"),
    "no batch sizes": (PackedSequence(torch.ones(3, 3), torch.empty(0, dtype=torch.int64)), None, "has no batch sizes"),
    "one dimension": (torch.zeros(3), None, WIDTH + r".* not \[3\]"),
    "four dimensions": (torch.zeros(1, 1, 1, 3), None, WIDTH + r".* not \[1, 1, 1, 3\]"),
    "layers": (torch.zeros(2, 1, 3), states(2, 1), STATE + r"\[1, 1, 4\] .* not \[2, 1, 4\]"),
    "batch": (torch.zeros(2, 1, 3), states(1, 2), STATE + r"\[1, 1, 4\] .* not \[1, 2, 4\]"),
    "unbatched states": (torch.zeros(2, 1, 3), states(1), STATE + r"\[1, 1, 4\] .* not \[1, 4\]"),
    "batched states": (torch.zeros(2, 3), states(1, 1), STATE + r"\[1, 4\] .* not \[1, 1, 4\]"),
    "layers, unbatched": (torch.zeros(2, 3), states(2), STATE + r"\[1, 4\] .* not \[2, 4\]"),
    "c0": (torch.zeros(2, 1, 3), (torch.zeros(1, 1, 4), torch.zeros(1, 1, 5)), r"c0 .* \[1, 1, 4\] .* not \[1, 1, 5\]"),
    "packed, batch too small": (packed_input(), states(1, 1), STATE + r"\[1, 2, 4\] .* not \[1, 1, 4\]"),
    "unsorted, batch too small": (packed_input(ordered=False), states(1, 1), STATE + r"\[1, 2, 4\] .* not \[1, 1, 4\]"),
    "unsorted, batch too large": (packed_input(ordered=False), states(1, 3), STATE + r"\[1, 2, 4\] .* not \[1, 3, 4\]"),
    "unsorted, unbatched states": (packed_input(ordered=False), states(1), STATE + r"\[1, 2, 4\] .* not \[1, 4\]"),
}


@pytest.mark.parametrize(("x", "hx", "message"), CALLS.values(), ids=CALLS)
def test_input_refused(x, hx, message):
    with pytest.raises(SlimLSTMError, match=message):
        LowRankLSTM(3, 4, ranks={"weight_hh_l0": 2})(x, hx)


CELL_CALLS = {
    "width": (torch.zeros(2, 4), None, r"has to be \[B, 3\] or \[3\], not \[2, 4\]"),
    "dimensions": (torch.zeros(1, 2, 3), None, r"has to be \[B, 3\] or \[3\], not \[1, 2, 3\]"),
    "batch": (torch.zeros(2, 3), states(1), r"h has to be \[2, 4\] .* not \[1, 4\]"),
    "unbatched states": (torch.zeros(2, 3), states(), r"h has to be \[2, 4\] .* not \[4\]"),
    "batched states": (torch.zeros(3), states(1), r"h has to be \[4\] .* not \[1, 4\]"),
    "c": (torch.zeros(3), (torch.zeros(4), torch.zeros(5)), r"c has to be \[4\] .* not \[5\]"),
}


@pytest.mark.parametrize(("x", "hx", "message"), CELL_CALLS.values(), ids=CELL_CALLS)
def test_input_of_a_cell_refused(x, hx, message):
    with pytest.raises(SlimLSTMError, match=message):
        LowRankLSTMCell(3, 4)(x, hx)


@given(
    input_size=st.sampled_from([1, 5]),
    hidden=st.sampled_from([1, 7, 33, 129]),
    batch=st.sampled_from([(), (1,), (3,)]),
    bias=st.booleans(),
    given_states=st.booleans(),
    share=st.fixed_dictionaries({}, optional={name: st.sampled_from([0.3, 1.0]) for name in ("weight_ih", "weight_hh")}),
)
def test_cell_is_a_dense_cell_with_the_product_of_the_factors(input_size, hidden, batch, bias, given_states, share):
    cell = nn.LSTMCell(input_size, hidden, bias, dtype=torch.float64)
    full = {"weight_ih": min(4 * hidden, input_size), "weight_hh": hidden}
    factors = factors_of(cell, {name: max(1, int(part * full[name])) for name, part in share.items()})
    inputs = {"input": torch.randn(*batch, input_size, dtype=torch.float64)}
    if given_states:
        inputs |= {name: torch.randn(*batch, hidden, dtype=torch.float64) for name in "hc"}
    dense = cell if all(part == 1.0 for part in share.values()) else replaced(cell, factors)
    expected = factor_gradients(with_gradients(dense, inputs, cell_outputs), factors)
    module = LowRankLSTMCell.from_dense(cell, factors)
    assert_same(with_gradients(module, inputs, cell_outputs), expected, **EXACT)
    back = module.to_dense()
    assert_same(cell_outputs(back, inputs), {name: expected[name] for name in ("h_1", "c_1")}, **EXACT)


@every_backend
@pytest.mark.parametrize("batch", [(), (B,)], ids=["unbatched", "batched"])
def test_one_step_of_the_lstm_is_the_cell(backend, batch):
    cell = LowRankLSTMCell(INPUT, H, ranks={"weight_hh": 2, "weight_ih": 3}, dtype=torch.float64)
    lstm = LowRankLSTM(INPUT, H, ranks={"weight_hh_l0": 2, "weight_ih_l0": 3}, backend=backend, dtype=torch.float64)
    lstm.load_state_dict({name: cell.state_dict()[name.replace("_l0", "")] for name in lstm.state_dict()})
    x, h, c = (torch.randn(*batch, size, dtype=torch.float64) for size in (INPUT, H, H))
    output, (h_n, c_n) = lstm(x[None], (h[None], c[None]))
    expected = cell(x, (h, c))
    for actual, value in ((output[0], expected[0]), (h_n[0], expected[0]), (c_n[0], expected[1])):
        torch.testing.assert_close(actual, value, **EXACT)


@pytest.mark.parametrize("copy", [deepcopy, COPIES["pickle"]], ids=["deepcopy", "pickle"])
def test_copies_of_a_cell(copy):
    cell = LowRankLSTMCell(INPUT, H, ranks={"weight_hh": 2}, dtype=torch.float64)
    inputs = {"input": some_input()[0]}
    assert set(cell.state_dict()) == {"weight_ih", "weight_hh_u", "weight_hh_v", "bias_ih", "bias_hh"}
    assert_equal_bits(copy(cell).state_dict(), cell.state_dict())
    assert_equal_bits(cell_outputs(copy(cell), inputs), cell_outputs(cell, inputs))


def test_masks_of_a_cell_are_honoured():
    cell, inputs = (
        LowRankLSTMCell(INPUT, H, dtype=torch.float64),
        {"input": some_input()[0], "h": torch.ones(B, H).double()},
    )
    inputs["c"] = inputs["h"]
    apply_mask(cell, "weight_hh", magnitude_mask(cell.weight_hh, 9))
    dense = cell.to_dense()
    assert dense.weight_hh.count_nonzero() == 9
    assert_same(cell_outputs(cell, inputs), cell_outputs(dense, inputs), **EXACT)
