"""The AWD-LSTM language model (Merity, Keskar, Socher 2018, arXiv 1708.02182).

Dimensions: T time steps, B streams, E embedding size, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_in
from safetensors.torch import load_file
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout, embedding

from slimlstm.errors import SlimLSTMError, reason_of, refusing
from slimlstm.files import alone_in, check_memory, check_regular, memory_limit_of, replacing, sha256, write_json
from slimlstm.shards import join, split

LSTMStates = list[tuple[Tensor, Tensor]]
"""One pair (h, c), each [1, B, H], for every layer."""

WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "model.pt"


@dataclass(frozen=True)
class AWDLSTMConfig:
    """Sizes and dropout rates of an :class:`AWDLSTM`; the defaults are the published ones for Penn Treebank.

    The last layer has ``embedding_size`` units, so that the softmax can share the embedding's weights.

    Examples:
        >>> AWDLSTMConfig(vocab_size=100).scaled(0.5).dropout_input
        0.2
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
        """Return the same sizes with every dropout rate multiplied by ``rate``."""
        names = ("dropout_embedding", "dropout_input", "dropout_hidden", "dropout_output", "weight_drop")
        return replace(self, **{name: rate * getattr(self, name) for name in names})


def locked_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Apply dropout to x [T, B, F] with the same mask at all time steps.

    Examples:
        >>> y = locked_dropout(torch.ones(3, 1, 4), 0.5, training=True)
        >>> torch.equal(y[0], y[2])
        True
    """
    if not training or rate == 0.0:
        return x
    return x * dropout(x.new_ones(1, *x.shape[1:]), rate)


def _weight_dropout(weight: Tensor, rate: float) -> Tensor:
    """Apply dropout to a matrix.

    On a CPU, each number of 64 bits that PyTorch draws serves four weights, since drawing takes most of the time.
    """
    if weight.device.type != "cpu" or rate == 1.0:
        return dropout(weight, rate)
    count = weight.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[:count].view(weight.shape) >= round(rate * 2**16) - 2**15
    return weight * kept.to(weight.dtype).mul_(1.0 / (1.0 - rate))


class AWDLSTM(nn.Module):
    """Stacked LSTMs between an embedding and a softmax that share their weights.

    ``forward(tokens, state)`` takes token ids [T, B] and the state before the first step, one pair (h, c) per layer or None
    for zeros. It returns logits [T, B, V] and the state after the last step.

    Examples:
        >>> model = AWDLSTM(AWDLSTMConfig(vocab_size=11, embedding_size=4, hidden_size=6, num_layers=2))
        >>> logits, state = model(torch.zeros(5, 3, dtype=torch.int64))
        >>> list(logits.shape), [list(h.shape) for h, c in state]
        ([5, 3, 11], [[1, 3, 6], [1, 3, 4]])
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

    def forward(self, tokens: Tensor, state: LSTMStates | None = None) -> tuple[Tensor, LSTMStates]:
        hidden, state = self.features(tokens, state)
        return self.decoder(hidden), state

    def features(self, tokens: Tensor, state: LSTMStates | None = None) -> tuple[Tensor, LSTMStates]:
        """Return the inputs of the softmax, which are the last layer's outputs [T, B, E] after dropout, and the state."""
        config, new_state = self.config, LSTMStates()
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
            # Drop whole words, not single numbers.
            weight = weight * dropout(weight.new_ones(len(weight), 1), self.config.dropout_embedding)
        return embedding(tokens, weight)

    def _recur(self, lstm: nn.Module, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        rate = self.config.weight_drop
        if not self.training or rate == 0.0:
            return lstm(x, state)
        # Match by the end of the name, because a mask makes it longer. Factors have other names and get no weight dropout.
        dropped = {
            name: _weight_dropout(weight, rate)
            for name, weight in lstm.named_parameters()
            if name.removesuffix(".original").endswith("weight_hh_l0")
        }
        return functional_call(lstm, dropped, (x, state))


def config_of(tensors: Mapping[str, Tensor]) -> AWDLSTMConfig:
    """Return the sizes of the dense or compressed AWD-LSTM with these tensors, and the published dropout rates.

    Raises:
        SlimLSTMError: the tensors do not belong to an AWD-LSTM.

    Examples:
        >>> config = AWDLSTMConfig(vocab_size=11, embedding_size=4, hidden_size=6, num_layers=2)
        >>> config_of(AWDLSTM(config).state_dict()) == config
        True
    """
    try:
        vocab_size, embedding_size = tensors["embedding.weight"].shape
        layers = sum(name.endswith(".bias_hh_l0") for name in tensors)
        config = AWDLSTMConfig(vocab_size, embedding_size, len(tensors["lstms.0.bias_hh_l0"]) // 4, layers)
    except (KeyError, ValueError, TypeError) as error:
        raise SlimLSTMError(f"these are not the tensors of an AWD-LSTM: {reason_of(error)}") from error
    most = memory_limit_of(sum(tensor.nbytes for tensor in tensors.values()))
    widest = max(config.embedding_size, config.hidden_size)
    needed = 4 * (config.vocab_size * config.embedding_size + config.num_layers * 8 * widest * config.hidden_size)
    check_memory(needed, most, "an AWD-LSTM of these sizes")
    return config


def load_awd_lstm(folder: str | Path) -> AWDLSTM:
    """Load the AWD-LSTM in ``folder``, in float32 and evaluation mode.

    The first of these files that exists is read: ``model.safetensors``; ``model.safetensors.index.json``, which names the
    shards that :func:`save_awd_lstm` writes; ``model.pt``, a pickled dictionary of tensors only. Tensors have PyTorch's
    names (``embedding.weight`` [V, E], ``lstms.{i}.weight_ih_l0`` and so on, ``decoder.bias`` [V]) or the names of the
    published code (``encoder.weight``, ``rnns.{i}.module.weight_ih_l0``, ``rnns.{i}.module.weight_hh_l0_raw``).

    Raises:
        SlimLSTMError: no file exists, or it is damaged, holds pickled code, or holds another model.

    Examples:
        >>> from slimlstm.demo.model import FOLDER
        >>> load_awd_lstm(FOLDER).config.num_layers
        3
    """
    path = next((found for name in (WEIGHTS, INDEX, PICKLED) if (found := Path(folder) / name).is_file()), None)
    if path is None:
        raise SlimLSTMError(f"{folder} has no {WEIGHTS}, {INDEX} or {PICKLED}; give the folder of an AWD-LSTM checkpoint")
    try:
        with refusing("it is damaged"):
            read = {WEIGHTS: load_file, INDEX: _read_shards, PICKLED: _read_pickled}[path.name]
            state = {name: _as_float(name, tensor) for name, tensor in _renamed(read(path)).items()}
            model = AWDLSTM(config_of(state))
            if not state.setdefault("decoder.weight", state["embedding.weight"]).equal(state["embedding.weight"]):
                raise SlimLSTMError("its softmax does not share the embedding's weights")
            _check_same_shapes(state, model.state_dict())
            model.load_state_dict(state)
    except SlimLSTMError as error:
        raise SlimLSTMError(f"{path} does not hold an AWD-LSTM: {error}") from error
    return model.eval()


def _as_float(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.is_meta or tensor.layout != torch.strided:
        raise SlimLSTMError(f"{name} is no plain array of floating-point numbers")
    check_memory(4 * tensor.numel(), memory_limit_of(tensor.untyped_storage().nbytes()), name)
    return tensor.float()


def _check_same_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    odd = sorted(name for name in state.keys() | expected.keys() if _shape(state, name) != _shape(expected, name))
    if odd:
        raise SlimLSTMError(f"{', '.join(odd[:5])}: missing, surplus, or of another shape")


def _shape(tensors: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


def save_awd_lstm(model: AWDLSTM, folder: str | Path, *, shard_bytes: int = 16_000_000) -> None:
    """Write a dense AWD-LSTM in half precision, as safetensors files of at most ``shard_bytes`` each and an index.

    The index, ``model.safetensors.index.json``, has the format of the Hugging Face libraries and names the SHA-256 of every
    shard. It is written last, so that a reader finds the old model or the new one; shards of the old one are removed after.
    A tensor larger than a shard is cut along its rows into ``{name}.part0``, ``{name}.part1`` and so on. The weights that
    embedding and softmax share are written once.

    Args:
        model: a dense model.
        folder: the folder to write; a missing folder is made.
        shard_bytes: the largest size of a safetensors file.

    Raises:
        SlimLSTMError: the model is compressed or parametrized, a weight is too large for half precision, a row is too large
            for a shard, or the folder holds another checkpoint, which :func:`load_awd_lstm` would read instead.

    Examples:
        >>> import tempfile
        >>> model = AWDLSTM(AWDLSTMConfig(vocab_size=11, embedding_size=4, hidden_size=6, num_layers=2))
        >>> folder = tempfile.mkdtemp()
        >>> save_awd_lstm(model, folder)
        >>> load_awd_lstm(folder).config.hidden_size
        6
    """
    folder = Path(folder)
    state = {name: tensor.detach().cpu().half() for name, tensor in model.state_dict().items() if name != "decoder.weight"}
    expected = AWDLSTM(model.config).state_dict().keys() - {"decoder.weight"}
    if state.keys() != expected:
        odd = ", ".join(sorted(state.keys() ^ expected))
        raise SlimLSTMError(f"only a dense AWD-LSTM can be written in half precision; this model has or lacks {odd}")
    infinite = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if infinite:
        raise SlimLSTMError(
            f"half precision cannot hold {', '.join(infinite)}, whose numbers exceed 65504 or are not finite; was training "
            "stable?"
        )
    for name in (WEIGHTS, PICKLED):
        if (folder / name).exists():
            raise SlimLSTMError(f"{folder / name} exists and would be read instead; name another folder, or remove it")
    shards, _ = split(state, shard_bytes)
    contents = [tensors_as_bytes(shard) for shard in shards]
    digests = [sha256(content) for content in contents]
    names = [f"model-{at:05d}-of-{len(shards):05d}-{digest[:16]}.safetensors" for at, digest in enumerate(digests, 1)]
    index = {
        "metadata": {
            "total_size": sum(2 * tensor.numel() for tensor in state.values()),
            "sha256": dict(zip(names, digests, strict=True)),
        },
        "weight_map": {part: name for name, shard in zip(names, shards, strict=True) for part in shard},
    }
    with alone_in(folder):
        before = _own_shards(folder)
        for name, content in zip(names, contents, strict=True):
            with replacing(folder / name) as draft:
                draft.write_bytes(content)
        write_json(folder / INDEX, index)
        for name in before - set(names):
            (folder / name).unlink(missing_ok=True)


def _own_shards(folder: Path) -> set[str]:
    """Return the shards that the folder's index names with a SHA-256, which only indices by slimlstm hold."""
    try:
        _, digests = _read_index(folder / INDEX)
    except (OSError, SlimLSTMError):
        return set()
    return set(digests)


def _read_shards(path: Path) -> dict[str, Tensor]:
    """Return the tensors of all shards that an index names; join the tensors that were cut."""
    file_of, digests = _read_index(path)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(file_of.values())):
        check_regular(path.with_name(file))
        content = path.with_name(file).read_bytes()
        if digests.get(file, sha256(content)) != sha256(content):
            raise SlimLSTMError(f"{file} is damaged: its SHA-256 is not the one in the index")
        tensors.update(tensors_in(content))
    if tensors.keys() != file_of.keys():
        raise SlimLSTMError(f"index and shards differ in {', '.join(sorted(tensors.keys() ^ file_of.keys()))}")
    return join(tensors, Counter(name.partition(".part")[0] for name in tensors if ".part" in name))


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the file of each tensor, and the SHA-256 of each file where the index has it."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        file_of, digests = dict(index["weight_map"]), dict(index.get("metadata", {}).get("sha256", {}))
        if any(Path(file).name != file for file in (*file_of.values(), *digests)):
            raise ValueError("a shard lies outside the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SlimLSTMError(f"its index cannot be read ({reason_of(error)})") from error
    return file_of, digests


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled dictionary, without running any code in it."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in many ways
        raise SlimLSTMError(
            f"it is damaged, or holds pickled code, which slimlstm does not run ({reason_of(error)}); load it where its "
            "code is, and save model.state_dict() instead"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise SlimLSTMError("it is not a dictionary of tensors; save model.state_dict() alone")
    return dict(content)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the names of the published code by the names used here."""
    renamed = {
        re.sub(r"^rnns\.(\d+)\.(module\.)?", r"lstms.\1.", name).replace("encoder.weight", "embedding.weight"): tensor
        for name, tensor in tensors.items()
    }
    # Weight drop stores the weights as *_raw, beside copies with dropped entries.
    raw = {name.removesuffix("_raw"): tensor for name, tensor in renamed.items() if name.endswith("_raw")}
    return {name: tensor for name, tensor in renamed.items() if not name.endswith("_raw")} | raw
