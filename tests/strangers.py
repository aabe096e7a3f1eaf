"""Models as other people write them, without knowledge of slimlstm; small, in float64, and equal at every call.

T time steps, B sequences, IN input size, H hidden size, P projection size, V words.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

T, B, IN, H, P, V = 4, 3, 6, 8, 4, 11


class BidirectionalBlock(nn.Module):
    """An LSTM and a linear layer, stacked in recognisers of text lines."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, H, bidirectional=True)
        self.embedding = nn.Linear(2 * H, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(self.rnn(x)[0])


class CRNN(nn.Module):
    """Convolutions over an image, two bidirectional LSTMs over its columns, character logits."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, IN, 3, padding=1), nn.BatchNorm2d(IN), nn.ReLU(), nn.AdaptiveMaxPool2d((1, T))
        )
        self.rnn = nn.Sequential(BidirectionalBlock(IN, IN), BidirectionalBlock(IN, V))

    def forward(self, image: Tensor) -> Tensor:
        return self.rnn(self.cnn(image).squeeze(2).permute(2, 0, 1)).transpose(0, 1)


class Seq2Seq(nn.Module):
    """A bidirectional encoder, and a decoder that attends to it one token at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(V, IN), nn.Embedding(V, IN)
        self.encoder = nn.LSTM(IN, H, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * H, H)
        self.decoder = nn.LSTM(IN + H, H, batch_first=True)
        self.head = nn.Linear(2 * H, V)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        encoded, (h, c) = self.encoder(self.source(source))
        memory, context = self.bridge(encoded), encoded.new_zeros(len(source), H)
        state, logits = (h.mean(0, keepdim=True), c.mean(0, keepdim=True)), []
        for token in self.target(target).unbind(1):
            out, state = self.decoder(torch.cat([token, context], 1)[:, None], state)
            weights = (memory @ out.transpose(1, 2)).softmax(1)
            context = (weights * memory).sum(1)
            logits.append(self.head(torch.cat([out[:, 0], context], 1)))
        return torch.stack(logits, 1)


class Tagger(nn.Module):
    """Labels for every word of sentences of unequal length."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(V, IN, padding_idx=0)
        self.lstm = nn.LSTM(IN, H, num_layers=2, bidirectional=True, dropout=0.5, batch_first=True)
        self.labels = nn.Linear(2 * H, V)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
        return self.labels(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


class Siamese(nn.Module):
    """One LSTM under two names, and a third in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.LSTM(IN, IN)
        self.right = self.left
        self.towers = nn.ModuleList([nn.LSTM(IN, H), self.left])

    def forward(self, x: Tensor) -> Tensor:
        for lstm in (self.left, self.right, self.towers[1], self.towers[0]):
            x = lstm(x)[0]
        return x


class WeightDrop(nn.Module):
    """Weight drop as in Merity's AWD-LSTM: the LSTM holds the raw weight, and receives a thinned one at every call."""

    def __init__(self, module: nn.LSTM, rate: float) -> None:
        super().__init__()
        self.module, self.rate = module, rate
        raw = module.weight_hh_l0
        del module.weight_hh_l0
        module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))

    def forward(self, *inputs):
        raw = self.module.weight_hh_l0_raw
        self.module.weight_hh_l0 = dropout(raw, self.rate, training=True) if self.training else raw.clone()
        return self.module(*inputs)


class WeightDropout(nn.Module):
    """Weight drop as in fastai: the wrapper holds the raw weight, the LSTM a copy with a gradient history."""

    def __init__(self, module: nn.LSTM, rate: float) -> None:
        super().__init__()
        self.module, self.rate = module, rate
        raw = module.weight_hh_l0
        del module.weight_hh_l0
        self.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
        module.weight_hh_l0 = raw.clone()

    def forward(self, *inputs):
        self.module.weight_hh_l0 = dropout(self.weight_hh_l0_raw, self.rate, self.training).clone()
        return self.module(*inputs)


class Dropped(nn.Module):
    """A parametrization that drops weights while training."""

    def forward(self, weight: Tensor) -> Tensor:
        return dropout(weight, 0.5, self.training)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class LanguageModel(nn.Module):
    """Embedding and softmax around one LSTM-like module."""

    def __init__(self, rnn: nn.Module, features: int = H) -> None:
        super().__init__()
        self.words, self.rnn, self.head = nn.Embedding(V, IN), rnn, nn.Linear(features, V)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(tokens))[0])


class CellLoop(nn.Module):
    """A cell that is stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(IN, H)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0])
        return torch.stack(outputs)


class TiedRecurrence(nn.Module):
    """Two LSTMs with one hidden-to-hidden matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(IN, H), nn.LSTM(H, H)
        self.second.weight_hh_l0 = self.first.weight_hh_l0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[0])[0]


class First(nn.Module):
    """Selects the first result of a module, for ``nn.Sequential``."""

    def forward(self, values: tuple[Tensor, object]) -> Tensor:
        return values[0]


def parametrized() -> nn.Module:
    lstm = nn.LSTM(IN, H, num_layers=2)
    parametrize.register_parametrization(lstm, "weight_hh_l0", Dropped())
    for name in ("weight_ih_l0", "weight_ih_l1", "weight_hh_l1"):
        parametrizations.weight_norm(lstm, name)
    return LanguageModel(lstm)


def hooked() -> nn.Module:
    """Return a model with a hook that doubles an LSTM's output."""
    model = nn.Sequential(nn.LSTM(IN, H), First(), nn.Linear(H, V))
    model[0].register_forward_hook(lambda module, inputs, outputs: (2 * outputs[0], outputs[1]))
    return model


def signal() -> tuple[Tensor, ...]:
    return (torch.randn(T, B, IN, dtype=torch.float64),)


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(V, (T, B)),)


def sentences() -> tuple[Tensor, ...]:
    return torch.randint(1, V, (B, T)), torch.tensor([2, T, 1])


def lstm_shapes(path: str, inputs: int, hidden: int = H, endings: tuple[str, ...] = ("_l0",), outputs: int = 0) -> dict:
    """Return the sites of an LSTM whose layers and directions, ``endings``, have equal input sizes."""
    sizes = {"weight_ih": inputs, "weight_hh": outputs or hidden}
    return {f"{path}.{kind}{ending}": (4 * hidden, size) for ending in endings for kind, size in sizes.items()}


BOTH = ("_l0", "_l0_reverse")


@dataclass(frozen=True)
class Stranger:
    """A model, its inputs, and its sites."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    sites: dict[str, tuple[int, int]]

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build().double()

    def call(self, model: nn.Module) -> Tensor:
        """Return the outputs of inference for a fixed input."""
        torch.manual_seed(1)
        inputs = self.inputs()
        training = {module: module.training for module in model.modules()}
        with torch.no_grad():
            outputs = model.eval()(*inputs)
        for module, mode in training.items():
            module.training = mode
        return outputs


STRANGERS = {
    "CRNN": Stranger(
        CRNN,
        lambda: (torch.randn(B, 1, 8, 2 * T, dtype=torch.float64),),
        lstm_shapes("rnn.0.rnn", IN, endings=BOTH) | lstm_shapes("rnn.1.rnn", IN, endings=BOTH),
    ),
    "seq2seq": Stranger(
        Seq2Seq,
        lambda: (torch.randint(V, (B, T)), torch.randint(V, (B, T - 1))),
        lstm_shapes("encoder", IN, endings=BOTH) | lstm_shapes("decoder", IN + H),
    ),
    "tagger": Stranger(
        Tagger,
        sentences,
        lstm_shapes("lstm", IN, endings=BOTH) | lstm_shapes("lstm", 2 * H, endings=("_l1", "_l1_reverse")),
    ),
    "shared": Stranger(Siamese, signal, lstm_shapes("left", IN, IN) | lstm_shapes("towers.0", IN)),
    "Merity": Stranger(lambda: LanguageModel(WeightDrop(nn.LSTM(IN, H), 0.5)), tokens, lstm_shapes("rnn", IN)),
    "fastai": Stranger(lambda: LanguageModel(WeightDropout(nn.LSTM(IN, H), 0.5)), tokens, lstm_shapes("rnn", IN)),
    "parametrized": Stranger(parametrized, tokens, lstm_shapes("rnn", IN) | lstm_shapes("rnn", H, endings=("_l1",))),
    "cell": Stranger(CellLoop, signal, lstm_shapes("cell", IN, endings=("",))),
    "projected": Stranger(
        lambda: LanguageModel(nn.LSTM(IN, H, num_layers=2, proj_size=P), P),
        tokens,
        lstm_shapes("rnn", IN, outputs=P) | lstm_shapes("rnn", P, endings=("_l1",), outputs=P),
    ),
    "tied": Stranger(TiedRecurrence, signal, lstm_shapes("first", IN) | lstm_shapes("second", H)),
    "hooked": Stranger(hooked, signal, lstm_shapes("0", IN)),
}
