"""Resemblyzer's speaker encoder: three LSTMs of 256 units, from mel spectra of 1.6 s to embeddings of speakers."""

import torch
from registry import package, speech, study
from torch import nn
from torch.distributions import Independent, Normal

import slimlstm as sl


class SpeakerEncoder(nn.Module):
    """The published network; takes spectra [B, 160, 40], returns embeddings [B, 256] of norm 1."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels):
        return nn.functional.normalize(self.linear(self.lstm(mels)[1][0][-1]).relu())


def mel_spectra(sound):
    """Return energies [T, 40] every 10 ms, in bands that are linear up to 1 kHz and logarithmic above (Slaney 1998)."""
    spectrum = (
        torch.stft(sound, 400, 160, window=torch.hann_window(400), pad_mode="constant", return_complex=True).abs() ** 2
    )
    mels = torch.linspace(0, 15 + 27 * torch.log(torch.tensor(8.0)) / torch.log(torch.tensor(6.4)), 42)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    rising = (torch.arange(201)[:, None] * 40 - edges[:-1]) / edges.diff()
    bands = torch.minimum(rising[:, :-1], 1 - rising[:, 1:]).clamp(min=0) * 2 / (edges[2:] - edges[:-2])
    return spectrum.T @ bands


def slices_of(sound):
    """Return the mel spectra [N, 160, 40] of overlapping slices of 1.6 s."""
    return mel_spectra(sound).unfold(0, 160, 20).transpose(1, 2).contiguous()


def published():
    """Return the network with the published weights."""
    folder = package("Resemblyzer==0.1.4", "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f")
    state = torch.load(folder / "resemblyzer/pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    model = SpeakerEncoder().eval()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def prepared():
    """Return the dense model, inputs to time it with, and the data that calibrate and judge smaller models."""
    dense, slices = published(), slices_of(speech())
    third = len(slices) // 3
    seen, held_out = slices[: third - 8], [slices[third : 2 * third - 8], slices[2 * third :]]  # no frame is in two parts
    with torch.no_grad():
        validation, test = [(part, dense(part)) for part in held_out]
    # Labels are sampled around the outputs of the dense model, so the recording needs none.
    data = {"batches": seen.split(16), "loss": lambda model, batch: Independent(Normal(model(batch), 1.0), 1)}
    return dense, (slices[:1],), data | {"validation": validation, "test": test}


@torch.no_grad()
def similarity(model, part):
    mels, embeddings = part
    return (model(mels) * embeddings).sum(1)


if __name__ == "__main__":
    dense, inputs, data = prepared()
    # Mel energies range over orders of magnitude, so int8 with one scale per row would lose the small ones.
    not_mels = {"storage": "int8", "filter": lambda site: not site.key.endswith("weight_ih_l0")}
    configs = {
        "bfloat16": sl.Quantize("bfloat16"),
        "int8 but for mels": sl.Quantize(**not_mels),
        "int8": sl.Quantize("int8"),
        "fisher 80%, int8 but for mels": sl.LowRank("fisher", keep=0.8, **not_mels),
    }
    study("resemblyzer", "cosine similarity", dense, configs, similarity, *inputs, **data)
