"""A tiny text and a model trained on it, for all tests of recipes that need a language model."""

import pytest
import torch
from recipe_helpers import TINY, run


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sentences in which every word but the first follows from the one before."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    for split, lines in (("train", 400), ("valid", 40), ("test", 40)):
        starts = torch.randint(5, (lines,), generator=generator).tolist()
        sentences = [" ".join(f"w{(start + step) % 5}" for step in range(6)) for start in starts]
        (folder / f"{split}.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    options = ("--optimizer", "adamw", "--lr", "0.1", "--dropout", "0", "--epochs", "3")
    run(text, output, *TINY, *options)
    return output
