"""Examples of the paper's tasks, tiny models and files for them, for tests of models and of recipes."""

import json

import torch

from paper import task_data
from paper.bcn import BCN, BCNConfig
from paper.bidaf import BiDAF, BiDAFConfig
from paper.elmo import BiLM, ELMo
from paper.elmo_config import ELMoConfig
from paper.esim import ESIM, ESIMConfig
from paper.task_data import Pair, Paragraph, Question, Sentence
from paper.tasks import Batches, vocabulary_of

WORDS = ("Fine", "film", ",", "bad", "story", "the", "of", "Gdańsk", "it", "was")
ELMO = ELMoConfig(hidden_size=10, proj_size=6, character_size=4, filters=((1, 4), (2, 6)), num_highways=1)


def bilm():
    torch.manual_seed(3)
    found = BiLM(ELMO)
    for lstm in (*found.forward_lstms, *found.backward_lstms):
        # Larger than PyTorch's, so that they matter.
        for parameter in lstm.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return found.eval()


def sentence(generator, length):
    return [WORDS[index] for index in torch.randint(len(WORDS), (length,), generator=generator).tolist()]


def examples(task, count=10):
    """Examples of several lengths with labels drawn by chance."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    labels = torch.randint(3, (count,), generator=generator).tolist()
    if task == "sst5":
        return [Sentence(sentence(generator, length), label) for length, label in zip(lengths, labels, strict=True)]
    if task == "snli":
        rows = zip(lengths, reversed(lengths), labels, strict=True)
        return [Pair(sentence(generator, n), sentence(generator, m), label) for n, m, label in rows]
    found = []
    for place in range(count // 2):
        tokens = sentence(generator, lengths[place] + 4)
        text = " ".join(tokens)
        questions = []
        for asked in range(2):
            first = (place + asked) % (len(tokens) - 1)
            span = first, first + labels[place] % 2
            answer = " ".join(tokens[span[0] : span[1] + 1])
            questions.append(Question(f"{place}-{asked}", sentence(generator, 3 + asked), [answer], [span]))
        found.append(Paragraph(text, tokens, offsets_of(tokens), questions))
    return found


def offsets_of(tokens):
    starts = [sum(len(token) + 1 for token in tokens[:index]) for index in range(len(tokens))]
    return [(start, start + len(token)) for start, token in zip(starts, tokens, strict=True)]


MODELS = {
    "sst5": lambda size, elmo: BCN(BCNConfig(size, 5, 8, 8, 4, 0.0, 0.0, 0.0, (0.0, 0.0, 0.0)), elmo),
    "snli": lambda size, elmo: ESIM(ESIMConfig(size, 3, 8, 8, dropout=0.0), elmo),
    "squad": lambda size, elmo: BiDAF(BiDAFConfig(size, 8, 4, 6, 3, 8, dropout=0.0), elmo),
}


def as_file(task, given):
    """Return the examples in the format of the task's files."""
    if task == "sst5":
        return "".join(f"({one.label} {' '.join(f'(2 {token})' for token in one.tokens)})\n" for one in given)
    if task == "snli":
        rows = (
            {
                "gold_label": task_data.SNLI_LABELS[one.label],
                "sentence1": " ".join(one.premise),
                "sentence2": " ".join(one.hypothesis),
            }
            for one in given
        )
        return "".join(json.dumps(row) + "\n" for row in rows)
    paragraphs = [
        {
            "context": one.text,
            "qas": [
                {
                    "id": question.id,
                    "question": " ".join(question.tokens),
                    "answers": [{"text": question.answers[0], "answer_start": one.offsets[question.spans[0][0]][0]}],
                }
                for question in one.questions
            ],
        }
        for one in given
    ]
    return json.dumps({"data": [{"title": "made up", "paragraphs": paragraphs}]})


TINY = ELMoConfig(
    hidden_size=24, proj_size=8, cell_clip=0.3, proj_clip=0.1, character_size=4, filters=((1, 4), (2, 8), (3, 8))
)
SENTENCES = [["Rank", "is", "enough", "."], ["No"], [], ["A", "thin", "factor"]]


def tiny(config=TINY):
    model = BiLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that clips act.
            parameter.mul_(3.0)
    return model


def made(task, has_elmo):
    """A model of random weights and what makes its batches."""
    vocabulary = vocabulary_of(examples(task), WORDS)
    batches = Batches(WORDS, vocabulary, with_characters=True)
    model = MODELS[task](len(vocabulary), ELMo(bilm(), dropout=0.0) if has_elmo else None).eval()
    return model, batches
