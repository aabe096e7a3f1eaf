"""Data sets of the tasks: parsing, tokens, editions, vectors."""

import hashlib
import io
import json
import zipfile

import pytest

from paper import task_data
from paper.task_data import Pair, read_task, read_vectors, spans_of, tokens_of
from slimlstm import SlimLSTMError
from slimlstm.demo.corpora import PublishedFile


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


@pytest.mark.slow
def test_tokens_stand_where_their_spans_say():
    text = 'It cost "$1.5". He can\'t\u2028say why (in 2015.) The U.S. won!'
    spans = spans_of(text)
    assert [text[first:last] for first, last in spans] == tokens_of(text)
    assert tokens_of("Won in 2015. The end.") == ["Won", "in", "2015", ".", "The", "end", "."]
    assert "".join(tokens_of(text)) == "".join(text.split())
    assert tokens_of(" ") == [""]


@pytest.mark.slow
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
    with pytest.raises(SlimLSTMError, match=r"put snli_1.0.zip or subset.jsonl.*snli"):
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
