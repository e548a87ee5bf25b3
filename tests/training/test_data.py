"""Training sequences: lengths, no crossing of documents, mixing by tokens, streaming."""

import pytest

from rope_scaling import RopeScalingError
from rope_scaling.hf.loading import load_tokenizer
from rope_scaling.texts import read_texts
from rope_scaling.training import make_sequences, mix, statistics


TOKENIZER = load_tokenizer("demo")
TEXTS = [(str(i), f"document {i} " * (5 * i)) for i in range(1, 9)]


def test_pieces_do_not_cross_documents():
    data = make_sequences(TEXTS, TOKENIZER, 32, min_length=8)
    assert data.column_names == ["input_ids", "labels"] and data["input_ids"] == data["labels"]
    for row in data["input_ids"]:
        assert 8 <= len(row) <= 32 and row[0] == TOKENIZER.bos_token_id
        text = TOKENIZER.decode(row, skip_special_tokens=True)
        assert len({word for word in text.split() if word.isdigit() and len(word) == 1}) <= 1
    whole = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for _, text in TEXTS]
    ends = sum(row[-1] == TOKENIZER.eos_token_id for row in data["input_ids"])
    assert 0 < ends <= len(whole)


def test_by_default_all_are_alike():
    assert {len(row) for row in make_sequences(TEXTS, TOKENIZER, 32)["input_ids"]} == {32}
    assert len(make_sequences(TEXTS, TOKENIZER, 32, max_sequences=3)) == 3


def test_too_short_says_how_long_the_longest_was():
    with pytest.raises(RopeScalingError, match=r"8 read, the longest has \d+ tokens, and 5000 are needed"):
        make_sequences(TEXTS, TOKENIZER, 5000)
    with pytest.raises(RopeScalingError, match="0 read"):
        make_sequences([], TOKENIZER, 8)
    with pytest.raises(RopeScalingError, match="`min_length` 9 is more than `length` 8"):
        make_sequences(TEXTS, TOKENIZER, 8, min_length=9)


def test_streaming_gives_the_same():
    def texts():
        yield from TEXTS

    stream = make_sequences(texts, TOKENIZER, 32, streaming=True)
    wanted = make_sequences(TEXTS, TOKENIZER, 32)["input_ids"]
    assert next(iter(stream))["input_ids"] == wanted[0]
    for _ in range(2):  # every epoch
        assert [row["input_ids"] for row in stream] == wanted
    few = make_sequences(texts, TOKENIZER, 32, max_sequences=3, streaming=True)
    assert [row["input_ids"] for row in few] == wanted[:3]
    with pytest.raises(RopeScalingError, match="as a function that returns them"):
        make_sequences(TEXTS, TOKENIZER, 32, streaming=True)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_mixing_is_by_tokens(share):
    texts = list(read_texts("stdlib"))[:12]
    long, short = make_sequences(texts, TOKENIZER, 512), make_sequences(texts, TOKENIZER, 64)
    mixed = [len(row) for row in mix(long, short, share, seed=1)["input_ids"]]
    tokens = sum(length for length in mixed if length == 64)
    assert abs(tokens / sum(mixed) - share) < 0.12
    for wrong in (0, 1, 1.5):
        with pytest.raises(RopeScalingError, match="between 0 and 1"):
            mix(long, short, wrong)


def test_statistics():
    found = statistics(make_sequences(TEXTS, TOKENIZER, 32), 8)
    assert found.longest == 32 and found.tokens == 32 * found.sequences and found.beyond == 24 * found.sequences
    assert "75% of tokens beyond the trained length" in str(found)


def test_the_standard_library_has_two_splits():
    assert not dict(read_texts("stdlib", split="train")).keys() & dict(read_texts("stdlib", split="test")).keys()
