"""ELMo (Peters et al. 2018, arXiv 1802.05365): a bidirectional language model over characters, and its vectors for tasks.

Dimensions: B sentences, T tokens, C characters a token, P projection size, H cells, L LSTM layers.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from paper.characters import CharacterEncoder, sentence_marks
from paper.elmo_config import ELMoConfig
from slimlstm.errors import SlimLSTMError

State = list[list[tuple[Tensor, Tensor]]]
"""By direction and layer: h [1, B, P] and c [1, B, H]."""


class ClippedLSTM(nn.LSTM):
    """Unidirectional LSTM layer with projection, whose cells and outputs are clipped to ``cell_clip`` and ``proj_clip``.

    A clip of None leaves values unbounded. Inputs and outputs are as in ``nn.LSTM`` with ``batch_first``.
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
    """Language model that reads sentences in both directions.

    ``forward(characters, state)`` takes ids [B, T, C] from :func:`paper.characters.characters_of` and a state, None for
    zeros. It puts a begin and an end token around every sentence. It returns the activations of all layers at the
    sentence's own tokens, [L + 1, B, T, 2 P], and the state after the sentences, from which the next ones may start.
    Layer 0 is the character encoder, twice; the forward direction comes before the backward one; activations at padding
    are zero.
    """

    def __init__(self, config: ELMoConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CharacterEncoder(config)
        sizes = config.proj_size, config.hidden_size, config.proj_size, config.cell_clip, config.proj_clip
        self.forward_lstms = nn.ModuleList(ClippedLSTM(*sizes) for _ in range(config.num_layers))
        self.backward_lstms = nn.ModuleList(ClippedLSTM(*sizes) for _ in range(config.num_layers))
        self.register_buffer("marks", sentence_marks(config.max_characters), persistent=False)

    def forward(self, characters: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if characters.ndim != 3 or characters.shape[2] != self.config.max_characters:
            raise SlimLSTMError(
                f"characters have to be [B, T, {self.config.max_characters}], not {list(characters.shape)}; "
                "paper.characters.characters_of makes them from tokens"
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
        """Return the vectors [B, T, P] of tokens [B, T, C], zero at padding."""
        present = characters.any(dim=2)
        found = self.encoder(characters[present])
        return found.new_zeros(*present.shape, found.shape[1]).masked_scatter(present[..., None], found)

    def run(self, tokens: Tensor, lengths: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the activations [L + 1, B, T, 2 P] of all layers at token vectors [B, T, P], and the state after them.

        ``lengths`` [B], at least 1 each, are the numbers of tokens without padding.
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
    """Weighted sum of a :class:`BiLM`'s layers for a task: γ Σ_k softmax(s)_k h_k (Peters et al., eq. 1), with dropout.

    ``forward(characters)`` takes ids [B, T, C] and returns [B, T, 2 P]. The language model is frozen: its weights require
    no gradients, and as long as none does, it stays in evaluation mode. If ``stateful``, every batch starts from the
    states after the batch before, row by row, as in the reference implementation.
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
        """Set the mode of all modules but a frozen language model."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.bilm.parameters()):
            self.bilm.eval()
        return self

    def forward(self, characters: Tensor) -> Tensor:
        activations = self.activations(characters)
        mixed = self.gamma * torch.einsum("lbtp,l->btp", activations, self.weights.softmax(dim=0))
        return dropout(mixed, self.dropout, self.training)

    def activations(self, characters: Tensor) -> Tensor:
        """Return the activations of all layers, [L + 1, B, T, 2 P]; a stateful model remembers the states."""
        if not self.stateful:
            return self.bilm(characters)[0]
        activations, state = self.bilm(characters, _rows(self._state, len(characters)))
        self._state = _put(self._state, state)
        return activations

    def reset_state(self) -> None:
        """Forget the states of earlier batches."""
        self._state = None


def _recur(
    lstm: nn.Module, x: Tensor, counts: Tensor | None, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a layer over the first ``counts`` [B] steps of x [B, T, P], or over all; outputs beyond them are zero."""
    if counts is None:
        return lstm(x, state)
    packed = pack_padded_sequence(x, counts, batch_first=True, enforce_sorted=False)
    output, state = lstm(packed, state)
    return pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0], cast(Any, state)


def _clip(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def _rows(state: State | None, batch: int) -> State | None:
    """Return the first ``batch`` rows of a state, with rows of zeros if it has fewer."""
    if state is None:
        return None

    def fitted(part: Tensor) -> Tensor:
        return pad(part[:, :batch], (0, 0, 0, max(0, batch - part.shape[1])))

    return [[(fitted(h), fitted(c)) for h, c in pairs] for pairs in state]


def _put(state: State | None, new: State) -> State:
    """Return ``new``, detached, followed by the rows of ``state`` beyond it."""
    if state is None:
        return [[(h.detach(), c.detach()) for h, c in pairs] for pairs in new]

    def joined(old: Tensor, part: Tensor) -> Tensor:
        return torch.cat([part.detach(), old[:, part.shape[1] :]], dim=1)

    return [
        [(joined(old_h, h), joined(old_c, c)) for (old_h, old_c), (h, c) in zip(old, pairs, strict=True)]
        for old, pairs in zip(state, new, strict=True)
    ]
