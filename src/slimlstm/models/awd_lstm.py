"""The AWD-LSTM language model (Merity, Keskar, Socher 2018, arXiv 1708.02182).

Dimensions: T time steps, B streams, E embedding size, H hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout, embedding

from slimlstm.errors import SlimLSTMError

State = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AWDLSTMConfig:
    """Sizes and dropout rates of an :class:`AWDLSTM`; the defaults are the published Penn Treebank ones.

    The last of ``num_layers`` layers has ``embedding_size`` units, so that the softmax can share the embedding's weights.
    """

    vocab_size: int
    embedding_size: int = 400
    hidden_size: int = 1150
    num_layers: int = 3
    dropout_embedding: float = 0.1
    dropout_input: float = 0.4
    dropout_hidden: float = 0.25
    dropout_output: float = 0.4
    weight_drop: float = 0.5

    def scaled(self, rate: float) -> AWDLSTMConfig:
        """The same sizes with every dropout rate multiplied by ``rate``."""
        names = ("dropout_embedding", "dropout_input", "dropout_hidden", "dropout_output", "weight_drop")
        return replace(self, **{name: rate * getattr(self, name) for name in names})


def locked_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout with one mask for all time steps; x is [T, B, F]."""
    if not training or rate == 0.0:
        return x
    return x * dropout(x.new_ones(1, *x.shape[1:]), rate)


class AWDLSTM(nn.Module):
    """Stacked LSTMs between an embedding and a softmax that shares its weights.

    ``forward(tokens, state)`` takes token ids [T, B] and returns logits [T, B, V] and the state after the last step, one
    ``(h, c)`` pair per layer. A state of ``None`` stands for zeros.
    """

    def __init__(self, config: AWDLSTMConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [config.embedding_size, *[config.hidden_size] * (config.num_layers - 1), config.embedding_size]
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstms = nn.ModuleList(nn.LSTM(n, m) for n, m in pairwise(sizes))
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size)
        self.decoder.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        hidden, state = self.features(tokens, state)
        return self.decoder(hidden), state

    def features(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the softmax sees: the last layer's outputs [T, B, E] after dropout, and the state."""
        config, new_state = self.config, State()
        x = locked_dropout(self._embed(tokens), config.dropout_input, self.training)
        for index, lstm in enumerate(self.lstms):
            x, pair = self._recur(lstm, x, None if state is None else state[index])
            new_state.append(pair)
            last = index == len(self.lstms) - 1
            x = locked_dropout(x, config.dropout_output if last else config.dropout_hidden, self.training)
        return x, new_state

    def _embed(self, tokens: Tensor) -> Tensor:
        weight = self.embedding.weight
        if self.training and self.config.dropout_embedding > 0.0:
            # Whole words are dropped, not single numbers.
            weight = weight * dropout(weight.new_ones(len(weight), 1), self.config.dropout_embedding)
        return embedding(tokens, weight)

    def _recur(self, lstm: nn.Module, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        rate = self.config.weight_drop
        if not self.training or rate == 0.0 or not isinstance(lstm, nn.LSTM):
            return lstm(x, state)
        # Under a mask or another parametrization it has a longer name.
        name, weight = next(entry for entry in lstm.named_parameters() if "weight_hh_l0" in entry[0])
        return functional_call(lstm, {name: dropout(weight, rate)}, (x, state))


def config_of(tensors: Mapping[str, Tensor]) -> AWDLSTMConfig:
    """The sizes of the AWD-LSTM that these tensors belong to, dense or compressed; dropout rates are the published ones.

    Raises:
        SlimLSTMError: they do not belong to an AWD-LSTM.
    """
    try:
        vocab_size, embedding_size = tensors["embedding.weight"].shape
        layers = sum(name.endswith(".bias_hh_l0") for name in tensors)
        return AWDLSTMConfig(vocab_size, embedding_size, len(tensors["lstms.0.bias_hh_l0"]) // 4, layers)
    except (KeyError, ValueError) as error:
        raise SlimLSTMError(f"these are not the tensors of an AWD-LSTM: {error}") from error


def load_awd_lstm(folder: str | Path) -> AWDLSTM:
    """The AWD-LSTM of ``model.safetensors`` in ``folder``, in float32 and evaluation mode.

    Names are PyTorch's: ``embedding.weight`` [V, E], ``lstms.{i}.weight_ih_l0`` and so on, ``decoder.bias`` [V]; or those
    of the published code: ``encoder.weight``, ``rnns.{i}.module.weight_ih_l0``, ``rnns.{i}.module.weight_hh_l0_raw``.

    Raises:
        SlimLSTMError: the file is missing, damaged, or does not hold such a model.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise SlimLSTMError(f"no model.safetensors in {folder}; give the folder of an AWD-LSTM checkpoint")
    try:
        state = {name: tensor.float() for name, tensor in _renamed(load_file(path)).items()}
        model = AWDLSTM(config_of(state))
        if not state.setdefault("decoder.weight", state["embedding.weight"]).equal(state["embedding.weight"]):
            raise SlimLSTMError("its softmax has weights of its own, not the embedding's")
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, SlimLSTMError) as error:
        raise SlimLSTMError(f"{path} does not hold an AWD-LSTM: {error}") from error
    return model.eval()


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names here, where they have those of the published code."""
    renamed = {
        re.sub(r"^rnns\.(\d+)\.(module\.)?", r"lstms.\1.", name).replace("encoder.weight", "embedding.weight"): tensor
        for name, tensor in tensors.items()
    }
    # Weight drop keeps the weights as *_raw, and beside them what it has made of them.
    raw = {name.removesuffix("_raw"): tensor for name, tensor in renamed.items() if name.endswith("_raw")}
    return {name: tensor for name, tensor in renamed.items() if not name.endswith("_raw")} | raw
