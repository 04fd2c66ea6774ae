"""Tokenizers from files and the hub; special tokens in a text are text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from acodm_env.corpus.tokenizer import encode, end_of_document, load_tokenizer
from acodm_env.errors import ConfigError, DataError


def unigram():
    """A tokenizer whose model, not only its special tokens, knows the end token."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "abs</>")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def byte_level():
    """Bytes only, with <|endoftext|> as id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.mark.parametrize(("tokenizer", "text"), [(unigram(), "a</s></s>b"), (byte_level(), "a <|endoftext|> b")])
def test_an_end_token_in_a_text_is_spelled(tokenizer, text):
    end = end_of_document(tokenizer)
    [ids] = encode(tokenizer, [text], end)
    assert end not in ids
    assert "".join(tokenizer.id_to_token(token) for token in ids).replace("Ġ", " ") == text


def test_a_file_or_its_folder_and_never_truncated(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert len(load_tokenizer(str(name)).encode("twelve bytes").ids) == 12


def test_a_damaged_file_and_a_path_where_nothing_is(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"must be a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="nothing is there"):
        load_tokenizer(str(tmp_path / "absent.json"))


def test_a_hub_name_without_network_says_what_to_do_at_once(monkeypatch, capfd):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(DataError, match=r"tokenizer=owner/name.*cannot be reached.*download its tokenizer\.json"):
        load_tokenizer("owner/name")
    assert capfd.readouterr() == ("", "")


def test_a_malformed_hub_name_names_the_choices():
    with pytest.raises(ConfigError, match=r"tokenizer=trian:300: must be train:N"):
        load_tokenizer("trian:300")


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="end-of-text token"):
        end_of_document(Tokenizer(models.BPE()))
