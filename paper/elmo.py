"""ELMo (Peters et al. 2018, arXiv 1802.05365): a language model over characters both ways, and what tasks see of it.

Dimensions: B sentences, T tokens, C characters a token, P projection size, H cells, L LSTM layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from slimlstm.errors import SlimLSTMError

CHARACTERS = 261
# Beyond the 256 values of a byte; every id is one higher in tensors, where zero is padding.
_SENTENCE_BEGIN, _SENTENCE_END, _WORD_BEGIN, _WORD_END, _NO_CHARACTER = range(256, CHARACTERS)
_ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}

State = list[list[tuple[Tensor, Tensor]]]
"""By direction and layer: h [1, B, P] and c [1, B, H]."""


@dataclass(frozen=True)
class ELMoConfig:
    """Sizes of a :class:`BiLM`; the defaults are those of the original released model.

    ``filters`` are (width, number) pairs of the character CNN. A clip of None means none.
    """

    hidden_size: int = 4096
    proj_size: int = 512
    num_layers: int = 2
    cell_clip: float | None = 3.0
    proj_clip: float | None = 3.0
    use_skip_connections: bool = True
    character_size: int = 16
    filters: tuple[tuple[int, int], ...] = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    num_highways: int = 2
    max_characters: int = 50
    activation: str = "relu"
    dropout: float = 0.0

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> ELMoConfig:
        """From the content of an official ``options.json``.

        Raises:
            SlimLSTMError: an entry is missing or of no use.
        """
        try:
            lstm, cnn = options["lstm"], options["char_cnn"]
            config = cls(
                hidden_size=lstm["dim"],
                proj_size=lstm["projection_dim"],
                num_layers=lstm["n_layers"],
                cell_clip=lstm.get("cell_clip"),
                proj_clip=lstm.get("proj_clip"),
                use_skip_connections=lstm.get("use_skip_connections", False),
                character_size=cnn["embedding"]["dim"],
                filters=tuple((width, number) for width, number in cnn["filters"]),
                num_highways=cnn["n_highway"],
                max_characters=cnn["max_characters_per_token"],
                activation=cnn.get("activation", "relu"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SlimLSTMError(f"these are not the options of an ELMo: {type(error).__name__} {error}") from error
        if config.activation not in _ACTIVATIONS:
            raise SlimLSTMError(f"no activation {config.activation!r} is known; there are {', '.join(_ACTIVATIONS)}")
        return config

    def to_options(self) -> dict[str, Any]:
        """The content of an official ``options.json``."""
        return {
            "lstm": {
                "dim": self.hidden_size,
                "projection_dim": self.proj_size,
                "n_layers": self.num_layers,
                "cell_clip": self.cell_clip,
                "proj_clip": self.proj_clip,
                "use_skip_connections": self.use_skip_connections,
            },
            "char_cnn": {
                "embedding": {"dim": self.character_size},
                "filters": [list(pair) for pair in self.filters],
                "n_highway": self.num_highways,
                # As in the released files: one more than the rows of the table, for padding.
                "n_characters": CHARACTERS + 1,
                "max_characters_per_token": self.max_characters,
                "activation": self.activation,
            },
        }


def characters_of(sentences: Sequence[Sequence[str]], max_characters: int = 50) -> Tensor:
    """The bytes of the tokens in the official scheme, int64 [B, T, C]; padding is zero.

    A token longer than C - 2 bytes is cut.
    """
    steps = max((len(sentence) for sentence in sentences), default=0)
    found = torch.zeros(len(sentences), steps, max_characters, dtype=torch.int64)
    for row, sentence in enumerate(sentences):
        for column, token in enumerate(sentence):
            found[row, column] = _token(token.encode(), max_characters)
    return found


class Highway(nn.Module):
    """x [..., E] to g ⊙ relu(W x + b) + (1 - g) ⊙ x, g = σ(V x + c) (Srivastava et al. 2015), layer after layer."""

    def __init__(self, size: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, 2 * size) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            new, gate = layer(x).chunk(2, dim=-1)
            x = torch.lerp(x, new.relu(), gate.sigmoid())
        return x


class CharacterEncoder(nn.Module):
    """Tokens of characters, ids [N, C] that are not zero, to vectors [N, P]: a CNN, its maxima over the token, highways.

    A token that occurs more than once is computed once.
    """

    def __init__(self, config: ELMoConfig) -> None:
        super().__init__()
        size = sum(number for _, number in config.filters)
        self.activation = config.activation
        self.embedding = nn.Embedding(CHARACTERS + 1, config.character_size, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(config.character_size, n, width) for width, n in config.filters)
        self.highway = Highway(size, config.num_highways)
        self.projection = nn.Linear(size, config.proj_size)
        for layer in self.highway.layers:
            # Inputs are carried through at first (Srivastava et al. 2015).
            nn.init.constant_(cast(nn.Linear, layer).bias[size:], -2.0)

    def forward(self, characters: Tensor) -> Tensor:
        distinct, places = characters.unique(dim=0, return_inverse=True)
        x, activation = self.embedding(distinct).transpose(1, 2), _ACTIVATIONS[self.activation]
        x = torch.cat([activation(convolution(x).amax(dim=2)) for convolution in self.convolutions], dim=1)
        return self.projection(self.highway(x))[places]


class ClippedLSTM(nn.LSTM):
    """One projected layer whose cells are clipped to ``cell_clip`` and whose outputs to ``proj_clip``, one way or none.

    Takes and returns what ``nn.LSTM`` with ``batch_first`` does.
    """

    def __init__(
        self, input_size: int, hidden_size: int, proj_size: int, cell_clip: float | None, proj_clip: float | None
    ) -> None:
        super().__init__(input_size, hidden_size, proj_size=proj_size, batch_first=True)
        self.cell_clip, self.proj_clip = cell_clip, proj_clip

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self.cell_clip is None and self.proj_clip is None:
            return super().forward(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        gates = self._gates(input).unbind(1)
        h, c = self._first(input, len(input)) if hx is None else (hx[0][0], hx[1][0])
        outputs: list[Tensor] = []
        for gates_of_x in gates:
            h, c = self._step(gates_of_x, h, c)
            outputs.append(h)
        return torch.stack(outputs, dim=1), (h[None], c[None])

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> Any:
        data, batch_sizes, order, back = packed
        h, c = self._first(data, int(batch_sizes[0])) if hx is None else (hx[0][0], hx[1][0])
        if hx is not None and order is not None:
            h, c = h[order], c[order]
        outputs: list[Tensor] = []
        for gates_of_x in self._gates(data).split(batch_sizes.tolist()):
            active = len(gates_of_x)
            new_h, new_c = self._step(gates_of_x, h[:active], c[:active])
            outputs.append(new_h)
            h, c = torch.cat([new_h, h[active:]]), torch.cat([new_c, c[active:]])
        if back is not None:
            h, c = h[back], c[back]
        return PackedSequence(torch.cat(outputs), batch_sizes, order, back), (h[None], c[None])

    def _gates(self, x: Tensor) -> Tensor:
        return linear(x, cast(Tensor, self.weight_ih_l0), cast(Tensor, self.bias_ih_l0) + cast(Tensor, self.bias_hh_l0))

    def _first(self, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        return x.new_zeros(batch, self.proj_size), x.new_zeros(batch, self.hidden_size)

    def _step(self, gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (gates + linear(h, cast(Tensor, self.weight_hh_l0))).chunk(4, dim=-1)
        c = _clip(f.sigmoid() * c + i.sigmoid() * g.tanh(), self.cell_clip)
        return _clip(linear(o.sigmoid() * c.tanh(), cast(Tensor, self.weight_hr_l0)), self.proj_clip), c


class BiLM(nn.Module):
    """The language model of both directions.

    ``forward(characters, state)`` takes ids [B, T, C] as :func:`characters_of` makes them, puts a token for the begin and
    one for the end around every sentence, and returns the activations of all layers at the sentence's own tokens,
    [L + 1, B, T, 2 P] (those of the character encoder first, twice; forward before backward; zero at padding), and the
    state behind the sentences, from which the next ones may go on; None stands for zeros.
    """

    def __init__(self, config: ELMoConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CharacterEncoder(config)
        sizes = config.proj_size, config.hidden_size, config.proj_size, config.cell_clip, config.proj_clip
        self.forward_lstms = nn.ModuleList(ClippedLSTM(*sizes) for _ in range(config.num_layers))
        self.backward_lstms = nn.ModuleList(ClippedLSTM(*sizes) for _ in range(config.num_layers))
        marks = [_token([mark], config.max_characters) for mark in (_SENTENCE_BEGIN, _SENTENCE_END)]
        self.register_buffer("marks", torch.stack(marks), persistent=False)

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if characters.ndim != 3 or characters.shape[2] != self.config.max_characters:
            raise SlimLSTMError(
                f"characters have to be [B, T, {self.config.max_characters}], not {list(characters.shape)}; "
                "characters_of makes them from tokens"
            )
        present = characters.any(dim=2)
        lengths = present.sum(dim=1)
        begin, end = cast(Tensor, self.marks)
        marked = pad(characters, (0, 0, 1, 1))
        marked[:, 0] = begin
        marked[torch.arange(len(lengths), device=lengths.device), lengths + 1] = end
        activations, state = self.run(self.tokens(marked), lengths + 2, state)
        return activations[:, :, 1:-1] * present[..., None], state

    def tokens(self, characters: Tensor) -> Tensor:
        """The vectors [B, T, P] of tokens [B, T, C], zero at padding."""
        present = characters.any(dim=2)
        found = self.encoder(characters[present])
        return found.new_zeros(*present.shape, found.shape[1]).masked_scatter(present[..., None], found)

    def run(self, tokens: Tensor, lengths: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The activations [L + 1, B, T, 2 P] of all layers at token vectors [B, T, P], and the state behind them.

        ``lengths`` [B], at least one each, say how many tokens of a row count. Each direction ends where a row ends for it.
        """
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        turned = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)[..., None]
        is_ragged = bool((lengths != tokens.shape[1]).any())
        counts = lengths.cpu() if is_ragged else None
        sides: list[list[Tensor]] = []
        new_state = State()
        for index, lstms in enumerate((self.forward_lstms, self.backward_lstms)):
            x = tokens if index == 0 else tokens.gather(1, turned.expand_as(tokens))
            outputs, pairs = [tokens], list[tuple[Tensor, Tensor]]()
            for layer, lstm in enumerate(lstms):
                rate = self.config.dropout
                before = dropout(x, rate, self.training)
                after, pair = _recur(lstm, before, counts, None if state is None else state[index][layer])
                x = after + before if layer > 0 and self.config.use_skip_connections else after
                outputs.append(x if index == 0 else x.gather(1, turned.expand_as(x)))
                pairs.append(pair)
            sides.append(outputs)
            new_state.append(pairs)
        return torch.stack([torch.cat(pair, dim=2) for pair in zip(*sides, strict=True)]), new_state


class ELMo(nn.Module):
    """What a task sees of a :class:`BiLM`: γ Σ_k softmax(s)_k h_k over its layers (Peters et al., eq. 1), with dropout.

    ``forward(characters)`` takes ids [B, T, C] and returns [B, T, 2 P]. The language model is frozen: its weights take no
    gradients unless they are told to, and until then it does not go into training mode. A ``stateful`` one begins every
    batch with the states that the last left behind, row by row, as the reference implementation does.
    """

    def __init__(self, bilm: BiLM, dropout: float = 0.5, stateful: bool = False) -> None:
        super().__init__()
        self.bilm = bilm.requires_grad_(False)
        self.dropout, self.stateful, self.output_size = dropout, stateful, 2 * bilm.config.proj_size
        self.weights = nn.Parameter(torch.zeros(bilm.config.num_layers + 1))
        self.gamma = nn.Parameter(torch.ones(()))
        self._state: State | None = None
        self.train(self.training)

    def train(self, mode: bool = True) -> ELMo:
        """As of any module, a frozen language model aside."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.bilm.parameters()):
            self.bilm.eval()
        return self

    def forward(self, characters: Tensor) -> Tensor:
        activations = self.activations(characters)
        mixed = self.gamma * torch.einsum("lbtp,l->btp", activations, self.weights.softmax(dim=0))
        return dropout(mixed, self.dropout, self.training)

    def activations(self, characters: Tensor) -> Tensor:
        """Those of all layers, [L + 1, B, T, 2 P]; a stateful model remembers the states."""
        if not self.stateful:
            return self.bilm(characters)[0]
        activations, state = self.bilm(characters, _rows(self._state, len(characters)))
        self._state = _put(self._state, state)
        return activations

    def reset_state(self) -> None:
        """Forgets the states of earlier batches."""
        self._state = None


def load_bilm(folder: str | Path) -> BiLM:
    """The language model that a folder holds in the official format, ``*options.json`` and ``*weights*.hdf5``.

    It is in evaluation mode.

    Raises:
        SlimLSTMError: a file is missing, damaged, or does not fit the other.
        ImportError: h5py is not installed.
    """
    folder = Path(folder)
    found = sorted(folder.glob("*options.json")), sorted(folder.glob("*weights*.hdf5"))
    if [len(paths) for paths in found] != [1, 1]:
        raise SlimLSTMError(
            f"{folder} has {len(found[0])} files *options.json and {len(found[1])} files *weights*.hdf5; "
            "one each makes an ELMo"
        )
    return read_bilm(found[0][0], found[1][0])


def read_bilm(options: str | Path, weights: str | Path) -> BiLM:
    """As :func:`load_bilm`, from two files."""
    h5py: Any = __import__("h5py")
    try:
        config = ELMoConfig.from_options(json.loads(Path(options).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise SlimLSTMError(f"{options} cannot be read: {error}") from error
    model = BiLM(config)
    expected = official_tensors(model)
    try:
        with h5py.File(weights, "r") as file:
            tensors = {name: torch.from_numpy(file[name][...]).float() for name in expected}
    except (OSError, KeyError, TypeError) as error:
        raise SlimLSTMError(f"{weights} does not hold the weights of an ELMo: {error}") from error
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise SlimLSTMError(
                f"{name} of {weights} is {list(tensor.shape)}; {options} wants {list(expected[name].shape)}"
            )
    _take(model, tensors)
    return model.eval()


def save_bilm(model: BiLM, folder: str | Path) -> None:
    """Writes ``options.json`` and ``weights.hdf5`` in the official format into ``folder``, which is made if need be.

    Raises:
        SlimLSTMError: the model is compressed; :func:`slimlstm.save` writes such ones.
        ImportError: h5py is not installed.
    """
    h5py: Any = __import__("h5py")
    if not all(isinstance(lstm, nn.LSTM) for lstm in (*model.forward_lstms, *model.backward_lstms)):
        raise SlimLSTMError("the official format holds dense matrices; write a compressed model with slimlstm.save")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "weights.part"
    with h5py.File(part, "w") as file:
        for name, tensor in official_tensors(model).items():
            file[name] = tensor.float().cpu().numpy()
    (folder / "options.json").write_text(json.dumps(model.config.to_options(), indent=1) + "\n", encoding="utf-8")
    part.replace(folder / "weights.hdf5")


def official_tensors(model: BiLM) -> dict[str, Tensor]:
    """The weights by their names in the official file, in its layout: matrices apply from the right, gates are i, g, f, o,
    one is to be added to the bias of f."""
    encoder, size = model.encoder, model.encoder.projection.in_features
    found = {
        "char_embed": encoder.embedding.weight[1:],
        "CNN_proj/W_proj": encoder.projection.weight.t(),
        "CNN_proj/b_proj": encoder.projection.bias,
    }
    for index, convolution in enumerate(cast(Sequence[nn.Conv1d], encoder.convolutions)):
        assert convolution.bias is not None  # noqa: S101 (the type allows it)
        found[f"CNN/W_cnn_{index}"] = convolution.weight.permute(2, 1, 0)[None]
        found[f"CNN/b_cnn_{index}"] = convolution.bias
    for index, highway in enumerate(cast(Sequence[nn.Linear], encoder.highway.layers)):
        for part, name in ((slice(size), "transform"), (slice(size, None), "carry")):
            found[f"CNN_high_{index}/W_{name}"] = highway.weight[part].t()
            found[f"CNN_high_{index}/b_{name}"] = highway.bias[part]
    for path, lstm in _lstms(model).items():
        bias = _other_gates(lstm["bias_ih_l0"] + lstm["bias_hh_l0"]).clone()
        hidden = len(bias) // 4
        bias[2 * hidden : 3 * hidden] -= 1.0
        matrices = torch.cat([lstm["weight_ih_l0"], lstm["weight_hh_l0"]], dim=1)
        found |= {f"{path}/W_0": _other_gates(matrices).t(), f"{path}/B": bias, f"{path}/W_P_0": lstm["weight_hr_l0"].t()}
    return {name: tensor.detach() for name, tensor in found.items()}


def _take(model: BiLM, tensors: Mapping[str, Tensor]) -> None:
    """The opposite of :func:`official_tensors`."""
    encoder, size = model.encoder, model.encoder.projection.in_features
    with torch.no_grad():
        encoder.embedding.weight[1:] = tensors["char_embed"]
        encoder.projection.weight.copy_(tensors["CNN_proj/W_proj"].t())
        encoder.projection.bias.copy_(tensors["CNN_proj/b_proj"])
        for index, convolution in enumerate(cast(Sequence[nn.Conv1d], encoder.convolutions)):
            assert convolution.bias is not None  # noqa: S101 (the type allows it)
            convolution.weight.copy_(tensors[f"CNN/W_cnn_{index}"][0].permute(2, 1, 0))
            convolution.bias.copy_(tensors[f"CNN/b_cnn_{index}"])
        for index, highway in enumerate(cast(Sequence[nn.Linear], encoder.highway.layers)):
            for part, name in ((slice(size), "transform"), (slice(size, None), "carry")):
                highway.weight[part] = tensors[f"CNN_high_{index}/W_{name}"].t()
                highway.bias[part] = tensors[f"CNN_high_{index}/b_{name}"]
        for path, lstm in _lstms(model).items():
            matrices, hidden = _other_gates(tensors[f"{path}/W_0"].t()), model.config.hidden_size
            lstm["weight_ih_l0"].copy_(matrices[:, : model.config.proj_size])
            lstm["weight_hh_l0"].copy_(matrices[:, model.config.proj_size :])
            lstm["weight_hr_l0"].copy_(tensors[f"{path}/W_P_0"].t())
            lstm["bias_ih_l0"].copy_(_other_gates(tensors[f"{path}/B"]))
            lstm["bias_ih_l0"][hidden : 2 * hidden] += 1.0
            lstm["bias_hh_l0"].zero_()


def _lstms(model: BiLM) -> dict[str, dict[str, Tensor]]:
    """The parameters of every layer by the path of its cell in the official file."""
    return {
        f"RNN_{index}/RNN/MultiRNNCell/Cell{layer}/LSTMCell": dict(lstm.named_parameters())
        for index, lstms in enumerate((model.forward_lstms, model.backward_lstms))
        for layer, lstm in enumerate(lstms)
    }


def _other_gates(stacked: Tensor) -> Tensor:
    """Gates [4H, ...] in the order i, f, g, o from i, g, f, o, or back."""
    i, f, g, o = stacked.chunk(4)
    return torch.cat([i, g, f, o])


def _token(content: Sequence[int], max_characters: int) -> Tensor:
    """A token's ids, one higher than its characters."""
    ids = [_WORD_BEGIN, *content[: max_characters - 2], _WORD_END]
    return torch.tensor([*ids, *[_NO_CHARACTER] * (max_characters - len(ids))]) + 1


def _recur(
    lstm: nn.Module, x: Tensor, counts: Tensor | None, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Runs a layer over x [B, T, P], of which ``counts`` [B] steps count, or all; what is beyond them is zero."""
    if counts is None:
        return lstm(x, state)
    packed = pack_padded_sequence(x, counts, batch_first=True, enforce_sorted=False)
    output, state = lstm(packed, state)
    return pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0], cast(Any, state)


def _clip(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def _rows(state: State | None, batch: int) -> State | None:
    """The first ``batch`` rows of a state, zeros where it has fewer."""
    if state is None:
        return None

    def fitted(part: Tensor) -> Tensor:
        return pad(part[:, :batch], (0, 0, 0, max(0, batch - part.shape[1])))

    return [[(fitted(h), fitted(c)) for h, c in pairs] for pairs in state]


def _put(state: State | None, new: State) -> State:
    """``new``, detached, and behind it the rows that ``state`` has more."""
    if state is None:
        return [[(h.detach(), c.detach()) for h, c in pairs] for pairs in new]

    def joined(old: Tensor, part: Tensor) -> Tensor:
        return torch.cat([part.detach(), old[:, part.shape[1] :]], dim=1)

    return [
        [(joined(old_h, h), joined(old_c, c)) for (old_h, old_c), (h, c) in zip(old, pairs, strict=True)]
        for old, pairs in zip(state, new, strict=True)
    ]
