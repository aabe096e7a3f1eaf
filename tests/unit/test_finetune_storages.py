"""Fine-tuning of models with storages: on the grid at every step, learning all the same, saved as they are."""

import pytest
import torch
from torch import nn

from slimlstm import LowRank, Quantize, SlimLSTMError, compress_, find_sites, finetune, load, save
from slimlstm.methods import rounded

CONFIGS = {
    **{storage: [Quantize(storage)] for storage in ("int8", "bfloat16", "int4", "int3")},
    "hh alone": [Quantize("int8", target="hh")],
    "factors": [LowRank(rank=2), Quantize("int8")],
    "factors in int4": [LowRank(rank=2, storage="int4")],
}
every_config = pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
BATCHES = [torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def tagger(seed=0, proj_size=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.LSTM(5, 8, proj_size=proj_size))


def compressed(configs):
    model = tagger()
    for config in configs:
        compress_(model, config)
    return model


def loss(model, x):
    return (model(x)[0] - 0.1).square()


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@every_config
@pytest.mark.parametrize("validated", [False, True], ids=["last", "best"])
def test_a_tuned_model_is_saved_and_loaded_to_the_bit(configs, validated, tmp_path):
    model = compressed(configs)
    before, sites = state_of(model), find_sites(model)

    def validate(tuned):
        save(tuned, tmp_path)  # on the grid at every validation
        return float(sum(loss(tuned, x).mean() for x in BATCHES))

    history = finetune(model, BATCHES, loss, steps=30, lr=0.01, validate=validate if validated else None)
    assert history.losses[-1] < history.losses[0]
    assert find_sites(model) == sites
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if "weight" in name)
    save(model, tmp_path)
    loaded = load(tmp_path, tagger(seed=1)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_steps_smaller_than_the_distance_of_two_codes_add_up():
    """Rounding after every step without an exact copy would undo each of them."""
    model = compressed([Quantize("int3", target="hh")])
    hh = model[0].weight_hh_l0
    before = hh.detach().clone()
    # 60 steps of at most 0.002 each; the codes of int3 are some 0.1 apart.
    finetune(model, BATCHES, loss, steps=60, lr=0.002, parameters=[hh])
    assert not torch.equal(hh, before)
    assert torch.equal(hh, rounded(hh.detach(), "int3"))


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    whole, parts = compressed([Quantize("int4")]), compressed([Quantize("int4")])
    options = {"steps": 12, "lr": 0.01, "validate": lambda model: float(loss(model, BATCHES[0]).mean()), "validations": 4}
    finetune(whole, BATCHES, loss, **options)
    seen = []

    def failing(model, x):
        seen.append(x)
        if len(seen) > 7:
            raise KeyboardInterrupt
        return loss(model, x)

    with pytest.raises(KeyboardInterrupt):
        finetune(parts, BATCHES, failing, checkpoint=tmp_path / "run", **options)
    parts = compressed([Quantize("int4")])
    finetune(parts, BATCHES, loss, checkpoint=tmp_path / "run", **options)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in parts.state_dict().items())


def test_an_error_restores_the_weights_of_the_grid(tmp_path):
    model = compressed([Quantize("int4")])
    before, calls = state_of(model), []

    def failing(model, x):
        calls.append(x)
        return loss(model, x) * (float("nan") if len(calls) == 5 else 1.0)

    with pytest.raises(SlimLSTMError, match="at step 4 the loss is nan"):
        finetune(model, BATCHES, failing, steps=9, lr=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    save(model, tmp_path)
