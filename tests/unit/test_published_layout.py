"""AWD-LSTMs in the layout of the published code."""

import torch
from safetensors.torch import save_file

from slimlstm.demo.awd_lstm import AWDLSTM, AWDLSTMConfig, load_awd_lstm


def test_the_published_layout_is_read(tmp_path):
    torch.manual_seed(0)
    model = AWDLSTM(AWDLSTMConfig(11, embedding_size=4, hidden_size=6)).eval()
    published = {"encoder.weight": model.embedding.weight, "decoder.weight": model.embedding.weight.clone()}
    published["decoder.bias"] = model.decoder.bias
    for index, lstm in enumerate(model.lstms):
        published |= {f"rnns.{index}.module.{name}": value for name, value in lstm.named_parameters()}
        # Weight drop leaves a dropped copy beside the weights.
        published[f"rnns.{index}.module.weight_hh_l0_raw"] = lstm.weight_hh_l0
        published[f"rnns.{index}.module.weight_hh_l0"] = torch.zeros_like(lstm.weight_hh_l0)
    save_file({name: tensor.detach().contiguous() for name, tensor in published.items()}, tmp_path / "model.safetensors")
    tokens = torch.arange(8).view(4, 2)
    assert torch.equal(load_awd_lstm(tmp_path)(tokens)[0], model(tokens)[0])
