import hashlib
import lzma
import socketserver
import threading
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimlstm.demo import corpora as data
from slimlstm.demo.corpora import CORPORA, EOS, UNKNOWN, Vocabulary, cache_folder, read_text, read_words, words_of
from slimlstm.errors import SlimLSTMError

TEXT = " the cat <unk> sat \n\n on the mat \n"
CONTENT = TEXT.encode()


@dataclass
class WebSite:
    """The answer of a local web server, and the paths that were requested."""

    address: str = ""
    status: int = 200
    content: bytes = CONTENT
    promised: int = len(CONTENT)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site():
    site = WebSite()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            self.send_response(site.status)
            self.send_header("Content-Length", str(site.promised))
            self.end_headers()
            self.wfile.write(site.content)

        def log_message(self, *_):
            pass

    yield from serve(site, ThreadingHTTPServer(("127.0.0.1", 0), Handler))


@pytest.fixture
def site_without_http():
    """A server that answers with something other than HTTP."""
    site = WebSite()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")

    yield from serve(site, socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))


def serve(site, server):
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Empty folders for local copies and for the cache; any proxy is kept away from the local server."""
    local, cache = tmp_path / "local", tmp_path / "cache"
    monkeypatch.setenv("SLIMLSTM_DATA", str(local))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return local, cache


@pytest.fixture
def publish(monkeypatch, folders):
    """Makes a small text the train split of "ptb", published at a local site."""

    def publish(site, tokens=9):
        split = replace(
            CORPORA["ptb"].splits["train"],
            url=f"{site.address}/train.txt",
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            tokens=tokens,
        )
        monkeypatch.setitem(data.CORPORA, "ptb", replace(CORPORA["ptb"], splits={"train": split}))
        return split

    return publish


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("\n", [EOS]),
        ("a", ["a", EOS]),
        ("a\n", ["a", EOS]),
        (" a  b\t c \nd\n", ["a", "b", "c", EOS, "d", EOS]),
        ("a\n\n \nb", ["a", EOS, EOS, EOS, "b", EOS]),
        ("a\r\nb\r\n", ["a", EOS, "b", EOS]),
        (TEXT, ["the", "cat", "<unk>", "sat", EOS, EOS, "on", "the", "mat", EOS]),
    ],
)
def test_every_line_end_is_a_word(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\xa0", "\u3000", "\r"]
)
def test_only_a_newline_is_a_line_end(separator):
    assert words_of(f"a{separator}b\nc{separator}\n") == ["a", "b", EOS, "c", EOS]


@given(st.lists(st.lists(st.text("ab\xe9\u200b", min_size=1), max_size=4), min_size=1, max_size=5))
def test_a_text_has_one_line_end_per_line(lines):
    text = "\n".join(" ".join(line) for line in lines) + "\n"
    assert words_of(text) == [word for line in lines for word in (*line, EOS)]


@given(st.lists(st.text("abc", min_size=1, max_size=2)))
def test_ids_lead_back_to_the_words(words):
    vocabulary = Vocabulary(words)
    ids = vocabulary.encode(words)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(words),)
    assert [vocabulary.words[index] for index in ids] == words
    assert len(vocabulary) == len(set(words))


def test_ids_follow_the_order_of_first_appearance():
    assert Vocabulary(["b", "a", "b", "c", "a"]).words == ["b", "a", "c"]


def test_a_foreign_word_is_unknown():
    assert Vocabulary(["a", UNKNOWN]).encode(["b", "a", "c"]).tolist() == [1, 0, 1]


def test_foreign_words_without_an_id_for_them_are_refused():
    with pytest.raises(SlimLSTMError, match="2 words outside the vocabulary, which has no <unk>"):
        Vocabulary(["a"]).encode(["b", "a", "c"])


@pytest.mark.parametrize("text", ["<eos>\nä\nb", "<eos>\nä\nb\n"])
def test_a_vocabulary_is_read_by_line_number(tmp_path, text):
    path = tmp_path / "vocab.txt"
    path.write_text(text, encoding="utf-8")
    assert Vocabulary.read(path).words == ["<eos>", "ä", "b"]


def test_a_vocabulary_with_a_word_twice_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("a\nb\na\n", encoding="utf-8")
    with pytest.raises(SlimLSTMError, match="a word more than once, so ids would shift"):
        Vocabulary.read(path)


def test_a_vocabulary_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SlimLSTMError, match=r"vocabulary .*vocab\.txt cannot be read"):
        Vocabulary.read(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("wikitext", "train", "no corpus is called 'wikitext'; the corpora are 'ptb', 'wikitext-2'"),
        ("ptb", "dev", "ptb has no split 'dev'; it has 'train', 'valid', 'test'"),
    ],
)
def test_corpora_and_splits_that_do_not_exist_are_refused(name, split, message):
    with pytest.raises(SlimLSTMError, match=message):
        read_text(name, split)


def test_a_download_is_kept_and_not_repeated(site, publish, folders):
    split = publish(site)
    assert [read_text("ptb", "train") for _ in range(2)] == [TEXT, TEXT]
    assert site.asked == ["/train.txt"]
    assert files_in(folders[1]) == [f"slimlstm/ptb/{split.file}"]
    assert cache_folder() == folders[1] / "slimlstm"


def test_a_damaged_file_in_the_cache_is_refused(site, publish, folders):
    split = publish(site)
    read_text("ptb", "train")
    (cache_folder() / "ptb" / split.file).write_bytes(CONTENT[:-1])
    with pytest.raises(SlimLSTMError, match="delete it and fetch it again"):
        read_text("ptb", "train")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"content": CONTENT.upper()}, "is not ptb.train.txt as published: SHA-256 .* expected"),
        ({"content": CONTENT[:-5]}, "train.txt"),
        ({"status": 404}, "could not be downloaded .*404.*put a copy at DIR/ptb/ptb.train.txt .* SLIMLSTM_DATA"),
        ({"status": 500}, "could not be downloaded .*500"),
    ],
    ids=["wrong checksum", "truncated", "missing", "broken server"],
)
def test_a_bad_download_is_refused_and_leaves_nothing(site, publish, folders, answer, message):
    publish(site)
    for name, value in answer.items():
        setattr(site, name, value)
    with pytest.raises(SlimLSTMError, match=message):
        read_text("ptb", "train")
    assert len(site.asked) == 1
    assert files_in(folders[1]) == []


def test_a_server_that_is_not_there_is_named(publish):
    publish(WebSite(address="http://127.0.0.1:1"))
    with pytest.raises(SlimLSTMError, match=r"http://127\.0\.0\.1:1/train\.txt could not be downloaded"):
        read_text("ptb", "train")


def test_a_server_that_does_not_speak_http_is_named(site_without_http, publish):
    publish(site_without_http)
    with pytest.raises(SlimLSTMError, match=r"train\.txt could not be downloaded"):
        read_text("ptb", "train")


def test_a_download_works_again_after_one_that_failed(site, publish):
    publish(site)
    site.status = 503
    with pytest.raises(SlimLSTMError, match="503"):
        read_text("ptb", "train")
    site.status = 200
    assert read_text("ptb", "train") == TEXT


LOCAL_COPIES = {"plain": ("", CONTENT), "xz": (".xz", lzma.compress(CONTENT))}


@pytest.mark.parametrize(("ending", "stored"), LOCAL_COPIES.values(), ids=LOCAL_COPIES)
@pytest.mark.parametrize("place", ["SLIMLSTM_DATA", "cache"])
def test_a_local_copy_is_taken_instead(site, publish, folders, ending, stored, place):
    split = publish(site)
    folder = (folders[0] if place == "SLIMLSTM_DATA" else cache_folder()) / "ptb"
    folder.mkdir(parents=True)
    (folder / (split.file + ending)).write_bytes(stored)
    assert read_text("ptb", "train") == TEXT
    assert site.asked == []


def test_the_folder_of_data_sets_comes_before_the_cache(site, publish, folders):
    split = publish(site)
    for folder, content in ((folders[0], CONTENT), (cache_folder(), b"another edition")):
        (folder / "ptb").mkdir(parents=True)
        (folder / "ptb" / split.file).write_bytes(content)
    assert read_text("ptb", "train") == TEXT


@pytest.mark.parametrize(
    ("ending", "stored"),
    [
        ("", CONTENT[:-1]),
        ("", b""),
        (".xz", lzma.compress(CONTENT.upper())),
        (".xz", lzma.compress(CONTENT)[:-10]),
        (".xz", b"this is no xz file"),
        (".xz", b""),
    ],
    ids=["plain, cut", "plain, empty", "xz, another text", "xz, cut", "not xz", "xz, empty"],
)
def test_a_damaged_local_copy_is_refused_by_name(site, publish, folders, ending, stored):
    split = publish(site)
    (folders[0] / "ptb").mkdir(parents=True)
    (folders[0] / "ptb" / (split.file + ending)).write_bytes(stored)
    with pytest.raises(SlimLSTMError, match=rf"{split.file}{ending} .*damaged"):
        read_text("ptb", "train")
    assert site.asked == []


def test_words_are_as_many_as_published(site, publish):
    publish(site, tokens=10)
    assert len(read_words("ptb", "train")) == 10
    publish(site, tokens=11)
    with pytest.raises(SlimLSTMError, match="ptb train has 10 tokens, not the published 11"):
        read_words("ptb", "train")
