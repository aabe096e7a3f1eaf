"""``calibrate`` against the definition: A = E[z zᵀ] and G = E[δ δᵀ] from loops over steps, with autograd's own gradients.

T time steps, B sequences, I input size, H hidden size, P projection size (or H), V classes; in float64.
"""

import gc
import math
import threading
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import make_dataclass
from typing import Any

import pytest
import torch
from helpers import EXACT, Problem, assert_same, problems
from hypothesis import given, settings
from safetensors.torch import save_file
from strangers import IN, STRANGERS, B, CellLoop, First, H, LanguageModel, Siamese, T, V
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, kl_divergence
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from slimlstm import LowRank, LowRankLSTM, Prune, Quantize, SlimLSTMError, compress_, find_sites
from slimlstm.calibration import moments as moments_file
from slimlstm.calibration.collect import calibrate, mean_loss
from slimlstm.calibration.losses import observed_losses
from slimlstm.calibration.moments import Calibration, Moments

NEAR = {"rtol": 1e-9, "atol": 1e-12}
every_stranger = pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Brute:
    """Rows of z and δ, gathered by a plain loop without batches, packing or matrix products."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def step(self, key: Callable[[str], str], weights: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor):
        """Run one step of one sequence: x [I], h [P], c [H]."""
        delta = torch.zeros(len(weights["ih"]), dtype=x.dtype, requires_grad=True)
        gates = weights["ih"] @ x + weights["hh"] @ h + weights["bias"] + delta
        self.rows.setdefault(key("weight_ih"), []).append((x.detach(), h.detach(), delta))
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return weights["hr"] @ (o.sigmoid() * c.tanh()), c

    def lstm(self, module: nn.LSTM, path: str, sequence: Tensor, states: tuple[Tensor, Tensor] | None = None):
        """Run all layers over one sequence [T, I]; return outputs [T, D P] and last states [D L, P] and [D L, H]."""
        last = []
        for layer in range(module.num_layers):
            outputs = []
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: 1 + module.bidirectional]:
                weights = weights_of(module, suffix)
                h, c = (torch.zeros_like(weights["hr"][:, 0]), torch.zeros_like(weights["hr"][0]))
                if states is not None:
                    h, c = states[0][len(last)], states[1][len(last)]
                order = range(len(sequence))
                steps = [sequence[0]] * len(order)
                for t in reversed(order) if suffix.endswith("_reverse") else order:
                    h, c = self.step(lambda kind, end=suffix: f"{path}{kind}{end}", weights, sequence[t], h, c)
                    steps[t] = h
                outputs.append(torch.stack(steps))
                last.append((h, c))
            sequence = torch.cat(outputs, dim=1)
        return sequence, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))

    def moments(self, total: Tensor | None) -> dict[str, Moments]:
        """Return moments by key, without rows that ``total`` does not depend on."""
        found = {}
        for key, rows in self.rows.items():
            deltas = [delta for _, _, delta in rows]
            if total is None:
                reached, g = rows, None
            else:
                gradients = torch.autograd.grad(total, deltas, retain_graph=True, materialize_grads=True)
                reached = [row for row, gradient in zip(rows, gradients, strict=True) if gradient.any()]
                g = mean_square([gradient for gradient in gradients if gradient.any()])
            found[key] = Moments(mean_square([x for x, _, _ in reached]), g, len(reached))
            found[key.replace("weight_ih", "weight_hh")] = Moments(mean_square([h for _, h, _ in reached]), g, len(reached))
        return found


def weights_of(module: nn.Module, suffix: str) -> dict[str, Tensor]:
    """Return one direction's weights, with the sum of both biases, and the identity as a missing projection."""
    plain = module.to_dense() if isinstance(module, LowRankLSTM) else module
    found = {"ih": getattr(plain, f"weight_ih{suffix}").detach(), "hh": getattr(plain, f"weight_hh{suffix}").detach()}
    zero = found["ih"].new_zeros(len(found["ih"]))
    biases = [getattr(plain, f"{name}{suffix}").detach() for name in ("bias_ih", "bias_hh")] if plain.bias else [zero]
    eye = torch.eye(plain.hidden_size, dtype=zero.dtype)
    hr = getattr(plain, f"weight_hr{suffix}").detach() if getattr(plain, "proj_size", 0) else eye
    return found | {"bias": sum(biases, zero), "hr": hr}


def mean_square(rows: list[Tensor]) -> Tensor:
    return sum((torch.outer(row, row) for row in rows), 0.0) / len(rows)


def assert_moments(calibration: Calibration, expected: dict[str, Moments]) -> None:
    assert calibration.sites.keys() == expected.keys()
    for key, moments in expected.items():
        found = calibration.sites[key]
        assert found.rows == moments.rows, key
        assert {found.inputs.dtype} == {torch.float64}
        torch.testing.assert_close(found.inputs, moments.inputs, **NEAR)
        if moments.gradients is None:
            assert found.gradients is None
        else:
            torch.testing.assert_close(found.gradients, moments.gradients, **NEAR)


class Around(nn.Module):
    """A model around an LSTM, called as a problem demands."""

    def __init__(self, lstm: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.rnn, self.problem = lstm, problem

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.problem.call(self.rnn, inputs)


def weighed(values: Tensor) -> Tensor:
    """Return a different loss for every entry."""
    return values * (torch.arange(values.numel()) + 1.0).sin().to(values).view_as(values)


@settings(max_examples=25)
@given(problems(full_rank=True).filter(lambda problem: problem.arguments["hidden_size"] <= 7))
def test_moments_equal_a_loop_over_sequences_and_steps(problem):
    """Any stacked, bidirectional, projected, packed or bias-free LSTM; the loss depends on outputs and last states."""
    lstm = problem.lstm()
    inputs = problem.inputs()
    found = calibrate(
        Around(lstm, problem), [inputs], lambda m, batch: torch.cat([weighed(v).flatten() for v in m(batch).values()])
    )
    brute, per_sequence = Brute(), []
    batched = {name: value.unsqueeze(1) if problem.form == "unbatched" else value for name, value in inputs.items()}
    x = batched["input"]
    if problem.arguments["batch_first"] and problem.form != "unbatched":
        x = x.transpose(0, 1)
    for b, length in enumerate(problem.lengths):
        states = (batched["h0"][:, b], batched["c0"][:, b]) if problem.states else None
        per_sequence.append(brute.lstm(lstm, "rnn.", x[:length, b], states))
    h, c = (torch.stack([states[which] for _, states in per_sequence], 1) for which in (0, 1))
    sequences = [output for output, _ in per_sequence]
    if problem.form in ("sorted", "unsorted"):
        padded = nn.utils.rnn.pad_sequence(sequences)
        output = pack_padded_sequence(padded, torch.tensor(problem.lengths), enforce_sorted=False).data
    else:
        first = problem.arguments["batch_first"] and problem.form != "unbatched"
        output = torch.stack(sequences, 0 if first else 1)
    total = sum(weighed(value).sum() for value in (output, h, c))
    assert_moments(found, brute.moments(total))
    assert found.loss == pytest.approx(total.item() / found.predictions, rel=1e-9, abs=1e-12)


def losses_of(stranger_model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return weighed(stranger_model(*batch))


def brute_cell(model: CellLoop, batch: tuple[Tensor]) -> tuple[Brute, Tensor]:
    brute, outputs = Brute(), []
    for b in range(batch[0].shape[1]):
        h = c = batch[0].new_zeros(H)
        for x in batch[0][:, b]:
            h, c = brute.step(lambda kind: f"cell.{kind}", weights_of(model.cell, ""), x, h, c)
            outputs.append(h)
    return brute, torch.stack(outputs).unflatten(0, (-1, len(batch[0]))).transpose(0, 1)


def brute_siamese(model: Siamese, batch: tuple[Tensor]) -> tuple[Brute, Tensor]:
    """Three calls of one module, whose rows are pooled, and one call of another."""
    brute, outputs = Brute(), []
    for x in batch[0].unbind(1):
        for lstm, path in ((model.left, "left."),) * 3 + ((model.towers[0], "towers.0."),):
            x = brute.lstm(lstm, path, x)[0]  # noqa: PLW2901
        outputs.append(x)
    return brute, torch.stack(outputs, 1)


def brute_weight_drop(model: nn.Module, batch: tuple[Tensor]) -> tuple[Brute, Tensor]:
    brute, plain = Brute(), nn.LSTM(IN, H, dtype=torch.float64)
    plain.load_state_dict({name.split(".")[-1].removesuffix("_raw"): w for name, w in model.rnn.named_parameters()})
    outputs = [brute.lstm(plain, "rnn.", model.words(tokens).detach())[0] for tokens in batch[0].unbind(1)]
    return brute, model.head(torch.stack(outputs, 1))


LOOPS = {"cell": brute_cell, "shared": brute_siamese, "Merity": brute_weight_drop, "fastai": brute_weight_drop}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("has_loss", [True, False], ids=["fisher", "activation"])
def test_moments_of_cells_shared_modules_and_weight_drop(name, has_loss):
    model = STRANGERS[name].make().train()
    batch = STRANGERS[name].inputs()
    brute, outputs = LOOPS[name](model.eval(), batch)
    expected = brute.moments(weighed(outputs).sum() if has_loss else None)
    key = "left" if name == "shared" else ""
    assert name != "shared" or expected[f"{key}.weight_ih_l0"].rows == 3 * T * B
    assert_moments(calibrate(model, [batch], losses_of if has_loss else None), expected)


class InPlace(nn.Module):
    """Overwrites the inputs of its LSTM and its cell as soon as they were read; with ``overwrites`` off it does not."""

    def __init__(self, overwrites: bool) -> None:
        super().__init__()
        self.rnn, self.cell, self.overwrites = nn.LSTM(IN, H), nn.LSTMCell(H, H), overwrites

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        hidden = self.rnn(x)[0].clone()
        buffer, state = hidden[0], None
        for step in hidden.detach().clone():
            buffer = buffer.copy_(step) if self.overwrites else step
            state = self.cell(buffer.detach(), state)
            state = (state[0].mul_(0.9), state[1]) if self.overwrites else (0.9 * state[0], state[1])
        if self.overwrites:
            x.zero_()
        return state[0] + hidden[-1]


@pytest.mark.parametrize("loss", [None, lambda m, x: m(x).square()], ids=["activation", "fisher"])
def test_inputs_that_are_overwritten_later_are_counted_as_they_were(loss):
    models = [InPlace(overwrites).double() for overwrites in (True, False)]
    models[0].load_state_dict(models[1].state_dict())
    found, expected = (calibrate(model, [BATCH], loss) for model in models)
    assert found.sites.keys() == expected.sites.keys() >= {"rnn.weight_ih_l0", "cell.weight_hh"}
    assert_moments(found, expected.sites)


COMPRESSED = {
    "factored": LowRank(rank=2),
    "masked": Prune(keep=0.4),
    "factors and a dense matrix": LowRank(rank=2, target="ih"),
}


@pytest.mark.parametrize("config", COMPRESSED.values(), ids=COMPRESSED)
def test_moments_of_compressed_models_are_their_own(config):
    model = LanguageModel(nn.LSTM(IN, H)).double()
    compress_(model, config)
    tokens = torch.randint(V, (T, B))
    brute = Brute()
    outputs = [brute.lstm(model.rnn, "rnn.", model.words(column).detach())[0] for column in tokens.unbind(1)]
    total = weighed(model.head(torch.stack(outputs, 1))).sum()
    assert_moments(calibrate(model, [(tokens,)], losses_of), brute.moments(total))


def test_moments_of_quantised_models_are_their_own():
    model = LanguageModel(nn.LSTM(IN, H))
    compress_(model, Quantize("int8"))
    dense = deepcopy(model)
    dense.rnn = model.rnn.to_dense()
    batch = (torch.randint(V, (T, B)),)
    found, expected = calibrate(model, [batch], losses_of), calibrate(dense, [batch], losses_of)
    for key, moments in expected.sites.items():
        torch.testing.assert_close(found.sites[key].inputs, moments.inputs)
        torch.testing.assert_close(found.sites[key].gradients, moments.gradients)


def snapshot(model: nn.Module) -> list[object]:
    """Return everything that observing could change."""
    state = [(name, id(value), value.detach().clone(), value.grad) for name, value in model.named_parameters()]
    modules = [(name, id(module), module.training, vars(module).get("forward")) for name, module in model.named_modules()]
    return [*modules, *((name, key, None if grad is None else id(grad)) for name, key, _, grad in state)]


@every_stranger
def test_the_model_is_as_it_was(stranger):
    model = stranger.make().train()
    list(model.modules())[-1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = stranger.inputs()
    before, state = snapshot(model), {name: value.clone() for name, value in model.state_dict().items()}
    plain = stranger.call(model)
    found = calibrate(model, [batch], lambda m, b: m(*b).square())
    assert found.sites.keys() == stranger.sites.keys()
    assert snapshot(model) == before
    assert_same(dict(model.state_dict()), state, rtol=0.0, atol=0.0)
    assert all(bool((parameter.grad == 1.0).all()) for parameter in model.parameters())
    assert torch.equal(stranger.call(model), plain)


@every_stranger
def test_outputs_do_not_change_while_the_model_is_observed(stranger):
    model, seen = stranger.make().train(), []
    expected = stranger.call(model)
    torch.manual_seed(1)
    batch = stranger.inputs()
    found = calibrate(model, [batch], lambda m, b: seen.append(m(*b)) or seen[-1].square())
    torch.testing.assert_close(seen[0].detach(), expected, **EXACT)
    assert found.loss == pytest.approx(float(expected.square().mean()), rel=1e-9)
    assert mean_loss(model, [batch], lambda m, b: m(*b).square()) == pytest.approx(found.loss, rel=1e-9)
    assert (found.predictions, found.is_scaled, model.training) == (expected.numel(), True, True)


def test_the_model_is_as_it_was_when_the_loss_or_the_batches_fail():
    model = STRANGERS["tagger"].make().train()
    batch, own = STRANGERS["tagger"].inputs(), model.lstm.forward
    model.lstm.forward = own
    before, random = snapshot(model), torch.get_rng_state()

    def broken(m: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        m(*batch)
        raise RuntimeError("of the user's")

    def ending() -> Iterator[tuple[Tensor, ...]]:
        yield batch
        raise OSError("the disk is gone")

    with pytest.raises(RuntimeError, match="of the user's"):
        calibrate(model, [batch], broken)
    with pytest.raises(OSError, match="the disk is gone"):
        calibrate(model, ending())
    assert torch.equal(torch.get_rng_state(), random)
    assert snapshot(model) == before
    assert model.lstm.forward is own


def packed_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, lengths, labels = batch
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    hidden = pad_packed_sequence(model[0](packed)[0], total_length=len(x))[0]
    return masked(model, hidden, lengths, labels)


def padded_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, lengths, labels = batch
    return masked(model, model[0](x)[0], lengths, labels)


def masked(model: nn.Module, hidden: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    counts = torch.arange(len(hidden))[:, None] < lengths
    return cross_entropy(model[2](hidden)[counts], labels[counts], reduction="none")


def small_model(bidirectional: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    lstm = nn.LSTM(IN, H, num_layers=2, bidirectional=bidirectional)
    return nn.Sequential(lstm, First(), nn.Linear(H * (1 + bidirectional), V)).double()


def padded_batch(batch: int = 4, steps: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return randn(steps, batch, IN), torch.tensor([3, steps, 1, 4][:batch]), torch.randint(V, (steps, batch))


def test_padding_is_not_counted():
    """A padded batch has the moments of the packed one, even where the padding is enormous."""
    batch = padded_batch()
    huge = batch[0].clone()
    huge[torch.arange(6)[:, None] >= batch[1]] = 1e3
    packed = calibrate(small_model(), [batch], packed_loss)
    assert {moments.rows for moments in packed.sites.values()} == {14}
    for x in (batch[0], huge):
        padded = calibrate(small_model(), [(x, *batch[1:])], padded_loss)
        assert_moments(padded, packed.sites)
        assert (padded.loss, padded.predictions) == (pytest.approx(packed.loss, rel=1e-12), 14)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
def test_the_split_into_batches_does_not_matter(bidirectional):
    x, lengths, labels = padded_batch()
    model = small_model(bidirectional)
    assert_moments(calibrate(model, iter(x.split(1, dim=1))), calibrate(model, [x]).sites)
    whole = calibrate(model, [(x, lengths, labels)], packed_loss)
    parts = [(x[:, [b]], lengths[[b]], labels[:, [b]]) for b in range(len(lengths))]
    for batches in (parts, parts[::-1], [parts[0], (x[:, 1:], lengths[1:], labels[:, 1:])], iter(parts)):
        split = calibrate(model, batches, packed_loss)
        assert_moments(split, whole.sites)
        assert split.loss == pytest.approx(whole.loss, rel=1e-12)


ACTIVATION = {
    "tuple": lambda x: (x,),
    "list": lambda x: [x],
    "mapping": lambda x: {"input": x},
    "tensor": lambda x: x,
    "packed": lambda x: pack_padded_sequence(x, torch.full((x.shape[1],), len(x))),
}


@pytest.mark.parametrize("form", ACTIVATION.values(), ids=ACTIVATION)
def test_without_a_loss_batches_are_the_models_arguments(form):
    model, x = LowRankLSTM.from_dense(nn.LSTM(IN, H, dtype=torch.float64)), randn(T, B, IN)
    brute = Brute()
    for sequence in x.unbind(1):
        brute.lstm(model, "", sequence)
    found = calibrate(model, [form(x)])
    assert_moments(found, brute.moments(None))
    assert (found.loss, found.predictions) == (None, 0)


class Plain:
    """A batch of a class of one's own."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.file = x, None

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)


class WithLock(Plain):
    """A batch that Python cannot copy."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.lock = threading.Lock()


KINDS = {
    "dictionary": lambda x: {"x": x},
    "user's dictionary": lambda x: UserDict(x=x),
    "object": Plain,
    "dataclass": make_dataclass("Record", ["x"], bases=(Plain,)),
    "list of objects": lambda x: [Plain(x)],
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_batches_that_a_model_overwrites_stay_as_they_were(kind):
    model = nn.Sequential(nn.LSTM(3, 4))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = (batch[0] if isinstance(batch, list) else batch)["x"]
        return model(x.mul_(0.5))[0].square().mean(-1)

    tensors = [torch.randn(5, 2, 3) for _ in range(3)]
    before = [x.clone() for x in tensors]
    compress_(model, LowRank("fisher", rank=2), batches=[kind(x) for x in tensors], loss=loss)
    assert all(map(torch.equal, tensors, before))


def test_batches_that_python_cannot_copy_are_shared():
    model, batch = nn.Sequential(nn.LSTM(3, 4)), WithLock(torch.randn(5, 2, 3))
    found = calibrate(model, [batch], lambda model, batch: model(batch.x)[0].square().mean(-1))
    assert list(found.sites)


@pytest.mark.parametrize("sizes", [[1] * 700, [300, 300, 100], [200, 600, 5], [512, 1], [1, 511, 512]], ids=str)
def test_moments_do_not_depend_on_the_sizes_of_batches(sizes):
    """Rows of small batches wait until they fill a block."""
    model = small_model()
    rows = randn(1, sum(sizes), IN)
    found, expected = (
        calibrate(model, batches, lambda model, batch: model(batch).square().sum(-1))
        for batches in (rows.split(sizes, dim=1), [rows])
    )
    assert found.predictions == expected.predictions
    for key, moments in expected.sites.items():
        assert found.sites[key].rows == moments.rows
        assert found.sites[key].effective_rows == pytest.approx(moments.effective_rows)
        torch.testing.assert_close(found.sites[key].inputs, moments.inputs, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.sites[key].gradients, moments.gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [None, lambda m, x: m(x).square()], ids=["activation", "fisher"])
def test_a_calibration_takes_no_more_memory_for_more_batches(loss):
    """None of 40 batches stays alive, and no tensor computed from one."""
    batches: list[weakref.ref[Tensor]] = []
    tensors: dict[int, int] = {}

    def stream() -> Iterator[Tensor]:
        for index in range(40):
            batch = randn(T, B, IN)
            batches.append(weakref.ref(batch))
            yield batch
            del batch
            if index in (2, 38):
                tensors[index] = sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    seen: list[str] = []
    calibrate(small_model(), stream(), loss, progress=lambda label, _: seen.append(label))
    assert seen == [f"batch {number}" for number in range(1, 41)]
    assert tensors[38] <= tensors[2]
    assert not any(one() is not None for one in batches)


def test_gradients_switched_off_outside_do_not_matter():
    model, batch = small_model(), randn(T, B, IN)
    expected = calibrate(model, [batch], lambda m, x: m(x).square())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert_moments(calibrate(model, [batch], lambda m, x: m(x).square()), expected.sites)


def test_a_mean_loss_is_known_up_to_a_factor():
    model, batch = small_model(), randn(T, B, IN)
    single, mean = (calibrate(model, [batch], lambda m, x, f=f: f(m(x).square())) for f in (lambda v: v, Tensor.mean))
    assert (single.is_scaled, mean.is_scaled, mean.predictions) == (True, False, 1)
    assert mean.loss == pytest.approx(single.loss)
    for key, moments in single.sites.items():
        torch.testing.assert_close(mean.sites[key].gradients * single.predictions**2, moments.gradients, **NEAR)


def categorical(model: nn.Module, x: Tensor) -> Categorical:
    return Categorical(logits=model(x))


def test_drawn_labels_are_reproducible_and_leave_random_numbers_alone():
    model, batches = small_model(), [randn(T, B, IN), randn(T, B, IN)]
    before = torch.get_rng_state()
    first, again, other = (calibrate(model, batches, categorical, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for key, moments in first.sites.items():
        assert torch.equal(moments.gradients, again.sites[key].gradients)
        assert not torch.allclose(moments.gradients, other.sites[key].gradients, rtol=1e-3)
        assert torch.equal(moments.inputs, other.sites[key].inputs)
    assert (first.predictions, first.is_scaled) == (2 * T * B, True)
    assert calibrate(model, batches, lambda m, x: Categorical(logits=m(x)[0, 0])).is_scaled


class Carrying:
    """Classes that depend on how many batches came before."""

    def __init__(self):
        self.seen = []
        self.count = 0

    def __call__(self, model: nn.Module, x: Tensor) -> Categorical:
        self.seen.append(self.count)
        self.count += 1
        return categorical(model, x)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_few_rows_are_drawn_again_and_inputs_count_once():
    model, batches, loss = small_model(), [randn(T, B, IN), randn(T, B, IN)], Carrying()
    once = calibrate(model, iter(batches), categorical)
    found = calibrate(model, batches, loss)
    assert loss.seen == [0, 1] * (len(loss.seen) // 2), "every draw begins with the first state"
    assert len(loss.seen) > 2
    assert (found.predictions, found.loss) == (once.predictions, once.loss)
    for key, moments in found.sites.items():
        assert moments.rows == once.sites[key].rows
        assert moments.effective_rows > once.sites[key].effective_rows
        assert torch.equal(moments.inputs, once.sites[key].inputs)
        assert float(moments.gradients.trace() / once.sites[key].gradients.trace()) == pytest.approx(1.0, abs=0.5)


def test_many_rows_are_drawn_once():
    model, batches, loss = small_model(), [randn(T, 40 * B, IN)], Carrying()
    assert min(moments.effective_rows for moments in calibrate(model, batches, loss).sites.values()) > 100
    assert loss.seen == [0]


def test_drawn_labels_give_the_true_fisher_information():
    """G = Σ_y p(y) ∇log p(y) ∇log p(y)ᵀ over all labels, within the standard error of N draws."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(2, 2), First(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    x, draws = randn(1, 1, 2), 20_000
    many = x.expand(1, draws, 2)
    (log_p,) = model(x)[0].log_softmax(-1)
    expected = torch.zeros(8, 8, dtype=torch.float64)
    fourth = torch.zeros_like(expected)
    for one in log_p:
        (delta,) = torch.autograd.grad(one, [model[0].bias_ih_l0], retain_graph=True)
        square = torch.outer(delta, delta)
        expected, fourth = expected + one.exp().detach() * square, fourth + one.exp().detach() * square.square()
    error = ((fourth - expected.square()).clamp_min(0.0) / draws).sqrt()
    found = calibrate(model, [many], categorical)
    assert float(expected.abs().max()) > 20 * float(error.max())
    for moments in found.sites.values():
        assert bool(((moments.gradients - expected).abs() <= 4 * error + 1e-12).all())
    assert found.loss == pytest.approx(float(Categorical(logits=log_p.detach()).entropy()), abs=0.03)


def test_losses_of_small_changes_are_predicted():
    """With drawn labels, ½ tr(Δᵀ G Δ A) is the divergence of the model with W + Δ, for small Δ and equal rows."""
    model, x = nn.Sequential(nn.LSTM(IN, H), First(), nn.Linear(H, V)).double(), randn(1, 1, IN).expand(1, 20_000, IN)
    moments = calibrate(model, [x], categorical).sites["0.weight_ih_l0"]
    changed = deepcopy(model)
    difference = 0.01 * randn(4 * H, IN)
    with torch.no_grad():
        changed[0].weight_ih_l0 += difference
    divergence = kl_divergence(categorical(model, x[:, :1]), categorical(changed, x[:, :1]))
    assert moments.loss_of(difference) == pytest.approx(divergence.item(), rel=0.05)
    plain = Moments(moments.inputs, None, 1)
    expected = 0.5 * float((difference @ x[0, 0]).square().sum())
    assert plain.loss_of(difference) == pytest.approx(expected)


def test_losses_of_drawn_labels_have_no_mean():
    assert mean_loss(small_model(), [randn(T, B, IN)], categorical) is None


def same(ours: Calibration, theirs: Calibration) -> None:
    """Tensors are equal bit for bit, and shared ones stay shared."""
    assert (ours.loss, ours.predictions, ours.is_scaled) == (theirs.loss, theirs.predictions, theirs.is_scaled)
    assert list(ours.sites) == list(theirs.sites)
    for key, moments in ours.sites.items():
        other = theirs.sites[key]
        assert moments.rows == other.rows
        assert torch.equal(moments.inputs, other.inputs)
        assert (moments.gradients is None) == (other.gradients is None)
        assert moments.gradients is None or torch.equal(moments.gradients, other.gradients)


@pytest.mark.parametrize("loss", [None, categorical, lambda m, x: m(x).mean()], ids=["inputs", "drawn", "mean"])
def test_a_calibration_is_saved_and_loaded_bit_for_bit(loss, tmp_path):
    found = calibrate(small_model(True), [randn(T, B, IN)], loss)
    found.save(tmp_path / "one")
    loaded = Calibration.load(tmp_path / "one")
    same(loaded, found)
    loaded.save(tmp_path / "two")
    assert (tmp_path / "two").stat().st_size == (tmp_path / "one").stat().st_size
    same(Calibration.load(tmp_path / "two"), found)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


OURS = {"slimlstm": "calibration 2"}
SITE = '{"loss": 1, "predictions": 1, "is_scaled": true, "sites": {"a": {"rows": 1}}}'
MOMENT = {"a:inputs": torch.eye(2, dtype=torch.float64)}


def forged(path, header, **tensors):
    """Write a calibration file with any header and a SHA-256 that fits."""
    save_file(tensors, path, {**OURS, "header": header, "sha256": moments_file._digest(header, tensors)})


NO_CALIBRATION = {
    "missing": (lambda path, intact: None, "does not exist"),
    "empty": (lambda path, intact: path.write_bytes(b""), "no intact calibration file"),
    "text": (lambda path, intact: path.write_text("once upon a time"), "no intact calibration file"),
    "cut short": (lambda path, intact: path.write_bytes(intact[:-8]), "no intact calibration file"),
    "header cut": (lambda path, intact: path.write_bytes(intact[:50]), "no intact calibration file"),
    "header overwritten": (lambda path, intact: path.write_bytes(intact[:20] + b"\0" * 9 + intact[29:]), "no intact"),
    "weights": (
        lambda path, intact: save_file({"a": torch.ones(2)}, path),
        "holds no calibration that .*; calibrate again",
    ),
    "a later format": (
        lambda path, intact: save_file({"a": torch.ones(2)}, path, {"slimlstm": "calibration 3"}),
        "holds no calibration that this slimlstm can read",
    ),
    "no header": (
        lambda path, intact: save_file({"a": torch.ones(2)}, path, OURS),
        "no intact calibration file, so calibrate again: 'sha256'",
    ),
    "no JSON": (lambda path, intact: forged(path, "{", b=torch.eye(2)), "no intact calibration file"),
    "no moments": (lambda path, intact: forged(path, SITE, b=torch.eye(2)), "a:inputs"),
    "a list": (lambda path, intact: forged(path, "[]", b=torch.eye(2)), "no intact calibration file"),
    "sites in a list": (lambda path, intact: forged(path, SITE.replace('{"a": {"rows": 1}}', "[]")), "no intact"),
    "rows in words": (
        lambda path, intact: forged(path, SITE.replace(": 1}}", ': "1"}}'), **MOMENT),
        "counts are no numbers",
    ),
    "no square": (lambda path, intact: forged(path, SITE, **{"a:inputs": torch.ones(2, 3)}), "no square matrices"),
    "deep": (lambda path, intact: forged(path, "[" * 100_000), "no intact calibration file"),
    "a flipped bit": (lambda path, intact: path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1])), "is damaged"),
}


@pytest.mark.parametrize(("damage", "message"), NO_CALIBRATION.values(), ids=NO_CALIBRATION)
def test_files_that_are_no_calibration_are_refused(damage, message, tmp_path):
    path = tmp_path / "file"
    calibrate(small_model(), [randn(T, B, IN)]).save(path)
    intact = path.read_bytes()
    path.unlink()
    damage(path, intact)
    with pytest.raises(SlimLSTMError, match=message):
        Calibration.load(path)


def infinite(x: Tensor) -> Tensor:
    return torch.full_like(x, math.inf)


BATCH = randn(T, B, IN)
REFUSED = {
    "no LSTM": (nn.Linear(2, 3), [BATCH], None, r"holds no LSTM that can be calibrated; find_sites\(model\) lists"),
    "no batch": (small_model(), [], None, "no batch was given; .* an iterator, it may have been used up"),
    "used up": (small_model(), iter(()), lambda m, x: m(x), "no batch was given"),
    "another model": (
        small_model(),
        [BATCH],
        lambda m, x: small_model()(x),
        "ran none of the model's LSTMs; check that it calls",
    ),
    "NaN loss": (small_model(), [BATCH], lambda m, x: m(x) * math.nan, "returned NaN or infinite numbers; check"),
    "infinite mean": (small_model(), [BATCH], lambda m, x: m(x).sum() / 0.0, "returned NaN or infinite numbers; check"),
    "no losses": (small_model(), [BATCH], lambda m, x: m(x)[:0], "a tensor of 0 numbers; .* at least one"),
    "a float": (small_model(), [BATCH], lambda m, x: m(x).sum().item(), "returned float; it has to return a tensor or"),
    "nothing": (small_model(), [BATCH], lambda m, x: None, "returned NoneType; it has to return a tensor or a dist"),
    "detached": (small_model(), [BATCH], lambda m, x: m(x).detach(), "does not depend on the model's LSTMs in a way"),
    "without gradients": (small_model(), [BATCH], torch.no_grad()(lambda m, x: m(x)), "does not depend on the model's"),
    "beside the LSTM": (small_model(), [BATCH], lambda m, x: m[2](m[0](x)[0].detach()), "does not depend on the model's"),
    "infinite inputs": (small_model(), [infinite(BATCH)], None, r"the inputs of 0\.weight_ih_l0, .*; check the batches"),
}


@pytest.mark.parametrize(("model", "batches", "loss", "message"), REFUSED.values(), ids=REFUSED)
def test_calibration_is_refused_in_words(model, batches, loss, message):
    before = snapshot(model)
    with pytest.raises(SlimLSTMError, match=message):
        calibrate(model, batches, loss)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], lambda m, x: m(x), "no batch"),
        ([BATCH], lambda m, x: None, "NoneType"),
        ([BATCH], lambda m, x: m(x)[:0], "0 num"),
    ],
)
def test_means_of_nothing_are_refused(batches, loss, message):
    model = small_model()
    with pytest.raises(SlimLSTMError, match=message):
        mean_loss(model, batches, loss)
    assert model.training


def test_sites_that_no_loss_depends_on_are_left_out():
    model = STRANGERS["shared"].make()
    found = calibrate(model, [BATCH], lambda m, x: m.left(x)[0] + 0.0 * m.towers[0](x)[0].sum())
    assert list(found.sites) == ["left.weight_ih_l0", "left.weight_hh_l0"]
    assert calibrate(model, [BATCH]).sites.keys() == {site.key for site in find_sites(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_every_dtype_are_float64(dtype):
    model, x = small_model(), randn(T, B, IN)
    exact = calibrate(model, [x], lambda m, b: m(b).square())
    found = calibrate(model.to(dtype), [x.to(dtype)], lambda m, b: m(b).square())
    for key, moments in exact.sites.items():
        ours = found.sites[key]
        assert (ours.inputs.dtype, ours.gradients.dtype, ours.rows) == (torch.float64, torch.float64, moments.rows)
        allowed = 40 * torch.finfo(dtype).eps
        for name in ("inputs", "gradients"):
            ours, theirs = getattr(found.sites[key], name), getattr(moments, name)
            assert float((ours - theirs).norm() / theirs.norm()) < allowed, (key, name)


@pytest.mark.parametrize("scale", [1.0, 12.0], ids=["unsure", "confident"])
def test_gradients_of_predicted_classes_have_the_fisher_information_as_their_moment(scale: float):
    torch.manual_seed(0)
    logits = (scale * torch.randn(4, dtype=torch.float64)).expand(20_000, 4).clone().requires_grad_()
    losses, is_scaled = observed_losses(Categorical(logits=logits))
    (gradients,) = torch.autograd.grad(losses.sum(), logits)
    p = torch.softmax(logits[0].detach(), 0)
    wanted = torch.diag(p) - torch.outer(p, p)
    assert is_scaled
    torch.testing.assert_close(gradients.T @ gradients / len(gradients), wanted, rtol=0.05, atol=0.03 * float(wanted.max()))
    torch.testing.assert_close(losses.detach(), Categorical(logits=logits.detach()).entropy())


@pytest.mark.parametrize("dimensions", [0, 1], ids=["alone", "independent"])
@pytest.mark.parametrize("given", ["logits", "probs"])
def test_gradients_of_yes_or_no_have_the_fisher_information_as_their_moment(given: str, dimensions: int):
    torch.manual_seed(0)
    logits = torch.tensor([-9.0, -3.0, 0.0, 5.0], dtype=torch.float64).expand(20_000, 4).clone().requires_grad_()
    p = torch.sigmoid(logits)
    predicted = Independent(Bernoulli(**{given: logits if given == "logits" else p}), dimensions)
    losses, is_scaled = observed_losses(predicted)
    (gradients,) = torch.autograd.grad(losses.sum(), logits)
    wanted = (p * (1 - p)).detach()[0]
    assert is_scaled
    assert losses.shape == predicted.batch_shape
    torch.testing.assert_close(gradients.square().mean(0), wanted, rtol=0.05, atol=0.0)
    torch.testing.assert_close(losses.detach(), predicted.entropy().detach())


def test_impossible_answers_take_no_part():
    logits = torch.tensor([0.0, 40.0, -torch.inf, torch.inf], requires_grad=True)
    losses, _ = observed_losses(Bernoulli(logits=logits))
    (gradients,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradients).all()
    assert gradients[2:].tolist() == [0, 0]


def test_classes_without_probability_take_no_part():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    losses, _ = observed_losses(Categorical(logits=logits))
    (gradients,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradients).all()
    assert gradients[0, 2] == 0
