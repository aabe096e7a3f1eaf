"""The three task models, their data and measures, and the recipe that trains them and compresses the ELMo inside."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paper import task_data
from paper.bcn import BCN, BCNConfig
from paper.bidaf import BiDAF, BiDAFConfig, best_spans
from paper.elmo import BiLM, ELMo, ELMoConfig, characters_of, save_bilm
from paper.esim import ESIM, ESIMConfig
from paper.metrics import AnswerScore, accuracy, answer_score
from paper.task_data import Pair, Paragraph, Question, Sentence, read_task, read_vectors, spans_of, tokens_of
from paper.tasks import Batches, Remembering, losses, predictions, scores, texts_of, vocabulary_of
from slimlstm import SlimLSTMError
from slimlstm.demo.corpora import PublishedFile

RECIPE = Path(__file__).parents[2] / "recipes" / "tasks.py"
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
every_task = pytest.mark.parametrize("task", MODELS)
with_and_without_elmo = pytest.mark.parametrize("has_elmo", [False, True], ids=["plain", "elmo"])


def made(task, has_elmo):
    """A model of random weights and what makes its batches."""
    vocabulary = vocabulary_of(examples(task), WORDS)
    batches = Batches(WORDS, vocabulary, with_characters=True)
    model = MODELS[task](len(vocabulary), ELMo(bilm(), dropout=0.0) if has_elmo else None).eval()
    return model, batches


@every_task
@with_and_without_elmo
def test_padding_changes_nothing(task, has_elmo):
    """Every example alone has the logits that it has in a batch of longer ones."""
    model, batches = made(task, has_elmo)
    (together,) = batches(examples(task), 1000)
    with torch.no_grad():
        logits = model(*together.inputs)
        alone = [model(*batch.inputs) for one in examples(task) for batch in batches([one], 1)]
    keys = [id_of(example) for example in together.examples]
    for one, found in zip(examples(task), alone, strict=True):
        for row, example in zip(found, batches([one], 1)[0].examples, strict=True):
            expected = logits[keys.index(id_of(example))]
            torch.testing.assert_close(row, expected[: len(row)] if task == "squad" else expected)
            assert not torch.isfinite(expected[len(row) :]).any() or task != "squad"


def id_of(example):
    return example[1].id if isinstance(example, tuple) else repr(example)


@every_task
def test_gradients_come_from_every_parameter_and_padding_sends_none(task):
    model, batches = made(task, has_elmo=True)
    (batch,) = batches(examples(task), 1000)
    losses(model.train(), batch).sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    assert not model.embedder.words.weight.grad[0].any()
    assert not any(parameter.requires_grad for parameter in model.embedder.elmo.bilm.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_task
def test_ten_examples_are_learnt_by_heart(task):
    model, batches = made(task, has_elmo=False)
    (batch,) = batches(examples(task), 1000)
    assert len(batch.examples) == 10
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        loss = losses(model.train(), batch).mean()
        if loss < 0.1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = scores(predictions(model.eval(), batch), [batch])
    assert found.get("accuracy", found.get("exact_match")) == 100.0


def test_a_paragraph_is_encoded_once_for_all_its_questions():
    model, batches = made("squad", has_elmo=True)
    (batch,) = batches(examples("squad"), 1000)
    paragraph, question, places = batch.inputs
    seen = []
    model.encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    with torch.no_grad():
        once = model(paragraph, question, places)
        repeated = model(tuple(part[places] for part in paragraph), question)
    torch.testing.assert_close(once, repeated)
    assert seen == [5, 10, 10, 10]


def test_the_best_span_is_that_of_a_search_over_all():
    torch.manual_seed(1)
    logits = torch.randn(20, 9, 2)
    logits[:, 7:] = -torch.inf
    starts, ends = logits.softmax(dim=1).unbind(dim=2)
    for limit in (1, 3, 20):
        for row, found in enumerate(best_spans(logits, limit).tolist()):
            spans = [(i, j) for i in range(9) for j in range(i, min(9, i + limit))]
            assert tuple(found) == max(spans, key=lambda span: float(starts[row, span[0]] * ends[row, span[1]]))


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Broncos!", ["broncos"], 1.0, 1.0),
        ("a  Denver\tBroncos", ["Denver Broncos", "Broncos"], 1.0, 1.0),
        ("Denver", ["Denver Broncos"], 0.0, 2 / 3),
        ("the the cat", ["cat cat"], 0.0, 2 / 3),
        ("cat cat cat", ["cat cat dog"], 0.0, 2 / 3),
        ("1,000 m", ["1000 m", "one"], 1.0, 1.0),
        ("24–10", ["24-10"], 0.0, 0.0),  # only ASCII punctuation goes
        ("theatre", ["atre"], 0.0, 0.0),
        ("x", ["y"], 0.0, 0.0),
        ("the", ["a"], 1.0, 0.0),  # nothing is left of either: equal, and no word is shared
        ("ab cd", ["cd", "ab cd ef gh"], 0.0, 2 / 3),
    ],
)
def test_answers_are_scored_as_by_the_official_script(answer, references, exact, f1):
    assert answer_score(answer, references) == AnswerScore(exact, pytest.approx(f1))


def test_scores_refuse_what_cannot_be_compared():
    with pytest.raises(SlimLSTMError, match="reference"):
        answer_score("x", [])
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 0])) == 0.5
    for labels in (torch.tensor([1]), torch.tensor([])):
        with pytest.raises(SlimLSTMError, match="compared"):
            accuracy(torch.tensor([1, 2])[: len(labels) * 2], labels)


@pytest.mark.parametrize(
    ("task", "split", "label", "count"),
    [
        ("sst5", "train", "complete: 8,544 sentences", [1092, 2218, 1624, 2322, 1288]),
        ("sst5", "dev", "complete: 1,101 sentences", [139, 289, 229, 279, 165]),
        ("sst5", "test", "complete: 2,210 sentences", [279, 633, 389, 510, 399]),
        ("snli", "dev", "complete: 9,842 pairs", [3329, 3235, 3278]),
        ("snli", "test", "complete: 9,824 pairs", [3368, 3219, 3237]),
        ("snli", "train", None, None),
        ("squad", "train", None, None),
        ("squad", "dev", "complete: 10,570 questions", None),
    ],
)
def test_real_data_has_the_published_counts(data_folder, task, split, label, count):
    if not (data_folder / task).is_dir():
        pytest.skip(f"{data_folder} has no {task}")
    found = read_task(task, split)
    if label is not None:
        assert found.label == label
    else:
        expected = {"snli": "19,999 of 549,367 pairs", "squad": "4,000 of 87,599 questions"}
        assert found.label in (f"subset: {expected[task]}", f"complete: {found.published:,} {found.unit}")
    assert all(tokens and all(tokens) for example in found.examples for tokens in texts_of(example))
    if count is not None:
        labels = torch.tensor([example.label for example in found.examples])
        assert labels.bincount().tolist() == count
    if task == "squad":
        asked = [(p, q) for p in found.examples for q in p.questions]
        exact = [
            answer_score(p.answer(*span), [answer]).exact_match
            for p, q in asked
            for answer, span in zip(q.answers, q.spans, strict=True)
        ]
        # The rest are parts of words, such as "gold" of "golden".
        assert sum(exact) > 0.985 * len(exact)


def test_a_tree_gives_its_leaves_and_the_label_of_its_root_and_of_all_its_phrases():
    found = task_data.tree("(3 (2 It) (4 (4 (2 's) (0 good\xa0fun)) (2 -LRB-)))")
    assert (found.tokens, found.label) == (["It", "'s", "good\xa0fun", "-LRB-"], 3)
    assert [(phrase.tokens, phrase.label) for phrase in found.phrases] == [
        (["It"], 2),
        (["'s"], 2),
        (["good\xa0fun"], 0),
        (["'s", "good\xa0fun"], 4),
        (["-LRB-"], 2),
        (["'s", "good\xa0fun", "-LRB-"], 4),
    ]
    for wrong in ("", "It works", "(3 )", "(7 (7 It))", "(3 (2 It) (2 works)", "(3 (2 It)) (2 works)", "(3 (2 It)))"):
        with pytest.raises(SlimLSTMError, match="is no tree"):
            task_data.tree(wrong)


def test_long_phrases_are_learnt_from_once_beside_their_sentences():
    phrase = "(1 (2 (2 is) (2 not)) (1 (2 very) (3 good)))"
    lines = [f"(3 (2 It) {phrase})", "(0 No)", f"(2 (2 So) {phrase})"]
    found = task_data.with_phrases([task_data.tree(line) for line in lines])
    assert [("".join(one.tokens), one.label) for one in found] == [
        ("isnotverygood", 1),
        ("Itisnotverygood", 3),
        ("No", 0),
        ("Soisnotverygood", 2),
    ]


def test_tokens_stand_where_their_spans_say():
    text = 'It cost "$1.5". He can\'t\u2028say why (in 2015.) The U.S. won!'
    spans = spans_of(text)
    assert [text[first:last] for first, last in spans] == tokens_of(text)
    assert tokens_of("Won in 2015. The end.") == ["Won", "in", "2015", ".", "The", "end", "."]
    assert "".join(tokens_of(text)) == "".join(text.split())
    assert tokens_of(" ") == [""]


def test_answers_are_mapped_to_the_tokens_that_hold_them():
    text = "In 1999. The 12th-century  church fell."
    questions = [
        {"id": str(index), "question": "What?", "answers": [{"text": answer, "answer_start": text.index(answer)}]}
        for index, answer in enumerate(("1999", "12th", "church fell"))
    ]
    content = json.dumps({"data": [{"paragraphs": [{"context": text, "qas": questions}]}]})
    (paragraph,) = task_data.squad_paragraphs(content)
    answers = [paragraph.answer(*question.spans[0]) for question in paragraph.questions]
    assert answers == ["1999", "12th-century", "church fell"]


def test_an_answer_outside_of_its_paragraph_is_refused():
    qa = {"id": "0", "question": "What?", "answers": [{"text": "x", "answer_start": 50}]}
    with pytest.raises(SlimLSTMError, match="between the characters 50 and 51"):
        task_data.squad_paragraphs(json.dumps({"data": [{"paragraphs": [{"context": "A b.", "qas": [qa]}]}]}))


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """Nothing is found in the cache or in SLIMLSTM_DATA."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SLIMLSTM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def pairs_text(labels):
    entries = [{"gold_label": label, "sentence1": "A man\u2028sits.", "sentence2": "He sits."} for label in labels]
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def test_the_complete_edition_goes_before_a_subset(own_data, monkeypatch):
    def edition(name, content):
        path = own_data / "snli" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return PublishedFile(name, None, hashlib.sha256(content).hexdigest())

    subset = edition("subset.jsonl", pairs_text(["neutral"]).encode())
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("snli_1.0/snli_1.0_train.jsonl", pairs_text(["neutral", "-", "entailment"]))
    complete = edition("snli_1.0.zip", archive.getvalue())
    monkeypatch.setattr(task_data, "_SNLI", complete)
    monkeypatch.setitem(task_data.SOURCES["snli"], "train", task_data._Source([complete, subset], 2))
    assert read_task("snli", "train").label == "complete: 2 pairs"
    (own_data / "snli" / "snli_1.0.zip").unlink()
    assert read_task("snli", "train").label == "subset: 1 of 2 pairs"
    (own_data / "snli" / "subset.jsonl").unlink()
    with pytest.raises(SlimLSTMError, match=r"put snli_1.0.zip or subset.jsonl.* into snli/"):
        read_task("snli", "train")


def test_data_of_ones_own_is_said_to_be_so(own_data):
    own_data.mkdir()
    (own_data / "dev.jsonl").write_text(pairs_text(["contradiction", "-"]), encoding="utf-8")
    found = read_task("snli", "dev", own_data)
    assert found.label == "own data: 1 pairs"
    assert found.examples == [Pair(["A", "man", "sits", "."], ["He", "sits", "."], 2)]


def test_errors_say_which_data_is_wrong(own_data):
    own_data.mkdir()
    (own_data / "dev.json").write_text("{}", encoding="utf-8")
    (own_data / "train.txt").write_text("\n", encoding="utf-8")
    for arguments, message in (
        (("mnli", "dev"), "no task is called 'mnli'"),
        (("squad", "test"), "squad has no split 'test'"),
        (("squad", "dev", own_data), "is not in the format of squad: KeyError"),
        (("sst5", "train", own_data), "holds no sentences"),
        (("sst5", "dev", own_data), "cannot be read"),
    ):
        with pytest.raises(SlimLSTMError, match=message):
            read_task(*arguments)


def test_vectors_are_read_for_the_words_at_hand(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("of 1 2\nthe 0.5 -1\nthe 9 9\nnobody 3 4\n", encoding="utf-8")
    words, vectors = read_vectors(path, ["the", "of", "Gdańsk"])
    assert words == ["of", "the"]
    assert vectors.tolist() == [[1.0, 2.0], [0.5, -1.0]]
    path.write_text("of 1 2\nthe 0.5\n", encoding="utf-8")
    for words in (["the", "of"], ["Gdańsk"]):
        with pytest.raises(SlimLSTMError, match="one length is needed"):
            read_vectors(path, words)
    with pytest.raises(SlimLSTMError, match="cannot be read"):
        read_vectors(tmp_path / "none.txt", ["the"])


def test_batches_hold_every_example_once_and_like_lengths_together():
    given = [Sentence(["it"] * (1 + index % 7), 0) for index in range(23)]
    batches = Batches(["it"], vocabulary_of(given), with_characters=False)(given, 5)
    sizes = [len(batch.examples) for batch in batches]
    assert sizes == [5, 5, 5, 5, 3]
    assert sorted(len(example.tokens) for batch in batches for example in batch.examples) == sorted(map(size_of_one, given))
    assert all(batch.inputs[0][1] is None for batch in batches)


def size_of_one(example):
    return len(example.tokens)


def test_a_remembering_model_gives_the_same_and_computes_once():
    inner, calls = bilm(), []
    inner.register_forward_hook(lambda *_: calls.append(1))
    one, other = characters_of([["it", "was"]]), characters_of([["a", "film"]])
    expected = [inner(characters)[0].detach() for characters in (one, other)]
    size = expected[0].numel() * 4
    remembering = Remembering(inner, gigabytes=1.5 * size / 1e9)
    calls.clear()
    for _ in range(3):
        found = [remembering(characters)[0] for characters in (one, other)]
        assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True, True]
    assert len(calls) == 1 + 3  # there is room for the first only


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
GRID = ("--ranks", 2, "--methods", "svd", "prune", "fisher", "--targets", "hh", "--calibration", 6)


def run(task, workplace, *options, elmo=True):
    """Runs the recipe on the workplace's data; gives the folder of results."""
    output = workplace / f"results-{task}"
    command = [RECIPE, "--task", task, "--data", workplace / task, "--output", output, "--runs", workplace / "runs"]
    command += ["--batch", 8, "--lr", 0.01, "--epochs", 2, "--seeds", 1, 2, *options]
    command += ["--elmo", workplace / "elmo"] if elmo else []
    subprocess.run([sys.executable, *map(str, command)], env=ENVIRONMENT, check=True, capture_output=True)
    return output


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def as_file(task, given):
    """The examples in the format of the task's files."""
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


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Made-up data for every task and a tiny ELMo."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in MODELS:
        (folder / task).mkdir()
        for split in task_data.SOURCES[task]:
            content = as_file(task, examples(task, 24))
            (folder / task / (split + task_data.FORMATS[task].ending)).write_text(content, encoding="utf-8")
    save_bilm(bilm(), folder / "elmo")
    return folder


@pytest.fixture(scope="module")
def trained(workplace):
    return run("sst5", workplace, *GRID)


def test_the_recipe_trains_and_fills_its_table(trained):
    names = ["dense", "svd-hh-002", "prune-hh-002", "fisher-hh-002"]
    expected = [f"{name}-seed{seed}.json" for name in names for seed in (1, 2)]
    assert sorted(path.name for path in trained.iterdir()) == sorted([*expected, "trained-elmo.json"])
    summary = read(trained / "trained-elmo.json")
    accuracies = [seed["scores"]["accuracy"] for seed in summary["seeds"]]
    assert summary["scores"]["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert summary["label"] == "own data: 24 sentences, with the phrases of over three tokens in them 24 examples"
    for seed, accuracy_of_seed in zip((1, 2), accuracies, strict=True):
        assert read(trained / f"dense-seed{seed}.json")["scores"]["accuracy"] == pytest.approx(accuracy_of_seed)
        for name in names[1:]:
            cell = read(trained / f"{name}-seed{seed}.json")
            # Four matrices [4H, P] = [40, 6] become factors, or as many weights.
            assert cell["parameters"]["elmo"]["before"] - cell["parameters"]["elmo"]["after"] == 4 * (240 - 2 * 46)
            assert cell["parameters"]["model"]["before"] == summary["seeds"][0]["parameters"]["model"]
            assert {site["method"] for site in cell["sites"]} == {cell["method"]}
            assert all("_lstms." in site["key"] for site in cell["sites"])
            assert cell["provenance"]["torch"] == torch.__version__


def test_what_is_there_is_not_made_again(workplace, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*-seed*.json")}
    (trained / "svd-hh-002-seed2.json").unlink()
    run("sst5", workplace, *GRID)
    after = {path: path.stat().st_mtime_ns for path in trained.glob("*-seed*.json")}
    assert before.keys() == after.keys()
    assert [path.name for path in before if before[path] != after[path]] == ["svd-hh-002-seed2.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--lr", 0.02), "is of a run with lr=0.01, not 0.02"), ((*GRID, "--limit", 5), "is of a run with limit=None, not 5")],
)
def test_a_run_with_other_settings_is_not_taken_for_this_one(workplace, trained, options, message):
    with pytest.raises(subprocess.CalledProcessError) as error:
        run("sst5", workplace, *options)
    assert message in error.value.stderr.decode()


def test_a_run_that_was_ended_goes_on_to_the_same_end(workplace, trained, tmp_path):
    """Ended after its first step and, going on, after its second."""
    runs = tmp_path / "runs"
    for minutes in (0, 0, 5):
        assert not list(runs.glob("*/seed-1/result.json"))
        run("sst5", workplace, "--runs", runs, "--seeds", 1, "--max-minutes", minutes)
    (folder,) = runs.glob("*/seed-1")
    (expected,) = (workplace / "runs").glob("*elmo/seed-1")
    found, whole = (load_file(path / "model.safetensors") for path in (folder, expected))
    assert not [name for name, tensor in whole.items() if not torch.equal(found[name], tensor)]
    assert not [name for name in whole if "bilm" in name]
    logs = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (folder, expected)]
    for one, other in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


@pytest.mark.parametrize("task", ["snli", "squad"])
def test_the_other_tasks_run_from_end_to_end(workplace, task):
    output = run(task, workplace, "--seeds", 1, "--epochs", 1, "--limit", 7, *GRID)
    cell, summary = read(output / "fisher-hh-002-seed1.json"), read(output / "trained-elmo.json")
    unit = task_data.FORMATS[task].unit
    examined = {"snli": 7, "squad": 8}[task]  # whole paragraphs of two questions
    assert cell["limit"] == f"first {examined} of own data: 24 {unit}"
    assert cell["label"] == summary["label"]
    assert cell["label"].startswith(f"own data: 24 {unit}")
    assert ("held out" in cell["label"]) == (task == "squad")
    assert set(cell["scores"]) == set(summary["scores"]) == {"snli": {"accuracy"}, "squad": {"f1", "exact_match"}}[task]


def test_a_model_without_elmo_is_trained_beside(workplace):
    summary = read(run("squad", workplace, "--seeds", 2, "--epochs", 1, elmo=False) / "trained-plain.json")
    assert summary["seeds"][0]["parameters"]["elmo"] == 0
    assert summary["config"]["elmo"] == "none"


def test_latency_is_told_with_backends(workplace, trained):
    found = read(run("sst5", workplace, "--ranks", 2, "--targets", "hh", "--latency") / "latency.json")
    assert list(found["elmo"]) == list(found["model"]) == ["dense", "dense, kernel", "svd, hh, 2"]
    assert found["elmo"]["dense"]["faster"] == 1.0
    assert found["elmo"]["dense"]["backends"] == {"nn.LSTM": 4}
    assert found["model"]["svd, hh, 2"]["backends"] in (
        {"fused": 4, "nn.LSTM": 2},
        {"dense": 4, "nn.LSTM": 2},
        {"reference": 4, "nn.LSTM": 2},
    )
    assert all(row["rounding_error"] < 1e-4 for part in ("elmo", "model") for row in found[part].values())
