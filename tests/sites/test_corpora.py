"""Corpora: the harvest is deterministic and mends itself; one's own data fit in, or the message says why not."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from perturbed.data import corpora, vocabulary
from perturbed.data.documents import Document, held_out
from perturbed.data.vocabulary import Text, byte_lengths, train_bpe
from perturbed.errors import PerturbedError, PlanError


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of our own in place of the installed ones, and an empty cache."""
    root = tmp_path / "zoo"
    for name, text in {
        "__init__.py": '"""' + "The zoo. " * 40 + '"""',
        "b/animals.py": 'class Cat:\n    """' + "A cat. " * 40 + '"""\n    def purr(self):\n        """' + "Purr. " * 50
        + '"""\n    def bark(self):\n        """Too short."""\n',
        "a.py": 'def f():\n    """' + "A cat. " * 40 + '"""\n\ndef g():\n    """' + "Gé. " * 70 + '\\udc80"""\n',
        "broken.py": "def (:\n",
        "tests/test_zoo.py": '"""' + "Not prose. " * 40 + '"""',
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(corpora, "_roots", lambda: iter([("zoo", root)]))
    monkeypatch.setenv("PERTURBED_HOME", str(tmp_path / "fresh"))
    return root


def test_harvest_takes_each_docstring_once_in_the_order_of_names(package):
    found = [(d.metadata["module"], d.metadata["object"]) for d in corpora.harvest()]
    # the cat of b.animals has the text of a.f, so it is not taken again
    assert found == [("zoo", ""), ("zoo.a", "f"), ("zoo.a", "g"), ("zoo.b.animals", "Cat.purr")]
    texts = [d.text for d in corpora.harvest()]
    assert texts[3] == ("Purr. " * 50).strip()
    assert texts[2].encode("utf-8").decode() == texts[2]


def test_harvest_does_not_depend_on_the_order_of_the_file_system(package, monkeypatch):
    before = list(corpora.harvest())
    kind = type(package)
    rglob = kind.rglob
    monkeypatch.setattr(kind, "rglob", lambda self, pattern: reversed(list(rglob(self, pattern))))
    assert list(corpora.harvest()) == before


def test_a_damaged_cache_is_told_and_made_again(package, capsys):
    first = corpora.load()
    (file,) = (corpora.home() / "cache").glob("??/*-harvest.safetensors")
    kept = file.stat().st_mtime_ns
    corpora._load.cache_clear()
    assert corpora.load() == first
    assert file.exists()
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    corpora._load.cache_clear()
    capsys.readouterr()
    assert corpora.load() == first
    told = capsys.readouterr().err
    assert "damaged" in told
    assert "collecting" in told
    assert file.stat().st_mtime_ns != kept


def test_hash_tells_content(tmp_path):
    one, two = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("cat\n\ndog\n")
    two.write_text("cat\n\ndot\n")
    assert corpora.load(str(one)).hash != corpora.load(str(two)).hash


def test_the_installed_packages_give_real_text_and_a_tokenizer_that_loses_nothing():
    corpus = corpora.load()
    assert sum(len(d.text) for d in corpus.documents) > 5_000_000
    assert {"stdlib", "numpy", "scipy", "sklearn"} <= {d.metadata["package"] for d in corpus.documents}
    assert any(d.metadata["module"] == "numpy.linalg._linalg" for d in corpus.documents)
    text = Text()
    tokenizer = text.tokenizer()
    assert len(tokenizer) == 1024
    strange = ["ünï 漢字 🙂\x00\x7f", "  two  spaces\t\n\n end ", "x=31415", "<|endoftext|> is no border"]
    for sample in [*(d.text for d in corpus.documents[::500]), *strange[:3]]:
        assert tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False)) == sample
    assert [t for t in tokenizer.tokenize("code 830415.") if t.isdigit()] == list("830415")
    sizes = byte_lengths(tokenizer)
    ids = tokenizer.encode(strange[0], add_special_tokens=False)
    assert int(sizes[ids].sum()) == len(strange[0].encode())
    assert int(sizes[tokenizer.eos_token_id]) == 0


def test_split_is_by_document_and_encoding_keeps_every_one():
    text = Text()
    train, test = text.train(), text.test()
    documents = corpora.load().documents
    kept = [d for d in documents if not held_out(d.text, text.held_out)]
    assert len(train) == len(kept)
    assert len(test) == len(documents) - len(kept)
    assert 0.04 < len(test) / len(documents) < 0.06
    last = train.ids[train.starts[-2] : train.starts[-1]].tolist()
    tokenizer = text.tokenizer()
    assert last[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(last[:-1]) == kept[-1].text


def test_training_the_tokenizer_twice_gives_the_same(tmp_path):
    texts = [d.text for d in corpora.load().documents[:300]]
    one, two = (train_bpe(texts, 400).backend_tokenizer.to_str() for _ in range(2))
    assert one == two
    with pytest.raises(PlanError, match="vocab=256 must be at least 257"):
        train_bpe(texts, 256)


def test_files_of_each_format(tmp_path):
    rows = [
        {"text": "one\u2028line", "lang": "en", "n": 3},
        {"text": "two", "lang": "de", "n": 4},
        {"text": " ", "n": 5},
    ]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8")
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    plain = tmp_path / "a.txt"
    plain.write_text("one\u2028line\n  \n\n\ntwo\n", encoding="utf-8")
    for file in (lines, table, plain):
        assert [d.text for d in corpora.load(str(file)).documents] == ["one\u2028line", "two"]
    assert dict(corpora.load(str(lines)).documents[1].metadata) == {"lang": "de"}


def test_a_folder_goes_through_datasets(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.csv").write_text("text,who\nhello there,me\nfarewell,you\n")
    found = corpora.load(str(folder)).documents
    assert found == (Document("hello there", {"who": "me"}), Document("farewell", {"who": "you"}))


def test_bad_data_are_named(tmp_path, monkeypatch):
    def fails(name, content, match, column="text"):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(PerturbedError, match=match):
            corpora.load(str(file), column)

    fails("empty.txt", b" \n\n", "holds no text.*empty data set")
    fails("empty.jsonl", b"", "holds no text.*empty data set")
    fails("a.docx", b"x", r"unknown format '.docx'.*\.txt, \.md, \.jsonl, \.parquet")
    fails("a.jsonl", b'{"body": "x", "id": 1}\n', "no column 'text': set column to one of body, id")
    fails("b.jsonl", b'{"text": "x"}\n{oops\n', "line 2 is not JSON")
    fails("c.parquet", b"not parquet", "not a Parquet file")
    fails("d.txt", b"ab\xff", "not UTF-8 at byte 2")
    for missing in ("./nowhere.txt", "nowhere.jsonl", str(tmp_path / "nothing")):
        with pytest.raises(PerturbedError, match=r"there is no file.*check the path"):
            corpora.load(missing)
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        PerturbedError, match=r"no loadable hub data set 'some/name': no route to the hub \(give a path"
    ):
        corpora.load("some/name")


def test_hub_data_are_asked_for_by_name_and_kept(monkeypatch, capsys):
    import datasets

    asked = []

    def load(path, name, split, streaming):
        asked.append((path, name, split))
        return iter([{"text": "x" * 40}] * 5)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(corpora, "HUB_BYTES", 100)
    name = f"some/name:plain-{sys.hexversion}-test"
    found = corpora.load(name)
    assert asked == [("some/name", name.partition(":")[2], "train")]
    assert len(found) == 3
    assert "the first 0 MB" in capsys.readouterr().err
    corpora._load.cache_clear()
    assert corpora.load(name) == found
    assert len(asked) == 1


def test_too_few_documents_to_hold_some_out(tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("just one document\n")
    with pytest.raises(PlanError, match="leaves no document to"):
        Text(str(file), vocab=300).train()
    with pytest.raises(ValueError, match="has no tokens: encode it first"):
        vocabulary.concatenate([Document("raw")])
    with pytest.raises(ValueError, match="loss_mask has 1 entries for 2 tokens"):
        Document("x", tokens=(1, 2), loss_mask=(True,))
