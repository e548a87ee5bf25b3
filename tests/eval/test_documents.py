"""Documents: where they come from, and how they are cut."""

import json

import pytest

from rope_scaling import RopeScalingError
from rope_scaling.eval.documents import make_documents
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.texts import read_texts


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


def text_of(tokenizer, count):
    """Text of at least `count` tokens."""
    return "x = [1, 2, 3]\n" * count


def test_one_bos_then_the_text_cut_at_the_longest_length(tokenizer):
    text = text_of(tokenizer, 100)
    (document,) = make_documents([("a", text)], tokenizer, [32, 64]).items
    expected = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"][:63]]
    assert document.ids.tolist() == expected


def test_short_documents_are_skipped_and_counted(tokenizer):
    documents = make_documents(
        [("short", "x"), ("middle", text_of(tokenizer, 4)), ("long", text_of(tokenizer, 100))], tokenizer, [32, 64]
    )
    assert [document.name for document in documents.items] == ["middle", "long"]
    assert documents.skipped == 1
    assert 32 <= len(documents.items[0].ids) < 64 == len(documents.items[1].ids)


def test_pieces_cover_the_text_without_overlap(tokenizer):
    text = text_of(tokenizer, 100)
    documents = make_documents([("a", text)], tokenizer, [64], pieces=True).items
    joined = [token for document in documents for token in document.ids.tolist()[1:]]
    assert joined == tokenizer(text, add_special_tokens=False)["input_ids"][: len(joined)]
    assert [document.name for document in documents[:2]] == ["a[0]", "a[1]"]
    assert len(make_documents([("a", text)], tokenizer, [64], pieces=True, max_documents=2).items) == 2


def test_hashes_follow_the_tokens(tokenizer):
    one, same, other = (
        make_documents([("a", "x = 1\n" * 50 + end)], tokenizer, [16, 4096]).items[0] for end in ("", "", "y")
    )
    assert one.sha256 == same.sha256 != other.sha256


def test_none_long_enough(tokenizer):
    with pytest.raises(
        RopeScalingError, match=r"No document has 64 tokens, the shortest length: the longest of 2 has \d+ tokens"
    ):
        make_documents([("a", "x"), ("b", "y = 1")], tokenizer, [64])
    with pytest.raises(RopeScalingError, match="there are none"):
        make_documents([], tokenizer, [64])


def test_standard_library():
    texts = dict(read_texts("stdlib"))
    assert "argparse.py" in texts and "import" in texts["argparse.py"]


def test_files_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub" / "a.md").write_text("ay")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert dict(read_texts(str(tmp_path))) == {"b.txt": "bee", "sub/a.md": "ay"}
    assert dict(read_texts(str(tmp_path / "b.txt"))) == {"b.txt": "bee"}


def test_tables(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": word}) + "\n" for word in ("one", "two")))
    assert [text for _, text in read_texts(str(file), column="body")] == ["one", "two"]
    with pytest.raises(RopeScalingError, match="no column 'text'; it has body. Name one with `--column`"):
        list(read_texts(str(file)))


def test_unreadable_sources(tmp_path):
    with pytest.raises(RopeScalingError, match="There is no file or folder './missing.txt'"):
        list(read_texts("./missing.txt"))
    with pytest.raises(RopeScalingError, match="holds no text files"):
        list(read_texts(str(tmp_path)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RopeScalingError, match="Cannot read .*latin.txt' as UTF-8 text"):
        list(read_texts(str(tmp_path / "latin.txt")))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(RopeScalingError, match="Cannot load .*broken.jsonl' as a dataset"):
        list(read_texts(str(tmp_path / "broken.jsonl")))


def test_a_hub_dataset_that_cannot_be_reached():
    with pytest.raises(
        RopeScalingError, match="Cannot load 'no-such-org/no-such-set' as a dataset.*`stdlib`, a file, a folder"
    ):
        list(read_texts("no-such-org/no-such-set"))


def test_a_stream_that_breaks_says_why(monkeypatch):
    import datasets

    def rows():
        yield {"text": "one"}
        raise ConnectionError("Connection reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    found = read_texts("org/texts")
    assert next(found)[1] == "one"
    with pytest.raises(
        RopeScalingError, match="Reading the dataset 'org/texts' failed: .*reset by peer. Check the conn"
    ):
        next(found)
