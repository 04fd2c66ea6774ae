"""Documents as they are stored, cut, limited, and as a model with another tokenizer reads them."""

import json

import numpy as np
import pytest
from evaluated import Given

from acodm_env.corpus.preparation.prepare import Preparation, prepare
from acodm_env.corpus.preparation.sources import Source
from acodm_env.corpus.tokenizer import load_tokenizer
from acodm_env.corpus.tokens import TokenStore
from acodm_env.errors import ConfigError, DataError
from acodm_env.experiments.evaluation.documents import (
    Reader,
    check_documents,
    num_stored_tokens,
    stored_documents,
    tokenizer_fingerprint,
)

TEXTS = ["naïve café 日本語 🙂\n", "", "plain words only", "a <|endofdocument|> spelled out"]


def own(store):
    return Reader.of(store, store.path / "tokenizer.json", store.end_of_document)


def ids(store, texts):
    tokenizer = load_tokenizer(str(store.path))
    tokenizer.encode_special_tokens = True
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, store.end_of_document] for text in texts]


def flat(parts):
    return [token for part in parts for token in part]


def test_all_documents_of_a_split(tiny_store):
    for domain, number in zip(tiny_store.domains, tiny_store.num_documents("test"), strict=True):
        documents = own(tiny_store).read(domain, "test")
        assert len(documents.ends) == len(documents.num_bytes) == number
        assert np.array_equal(documents.tokens, tiny_store.tokens(domain, "test"))
        assert (documents.tokens[documents.ends - 1] == tiny_store.end_of_document).all()


def test_bytes_are_those_of_the_texts(tiny_store):
    store = Given(tiny_store, {"mixed": flat(ids(tiny_store, TEXTS))})
    documents = own(store).read("mixed", "test")
    assert documents.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert documents.num_bytes.tolist() == [28, 0, 16, 31]


def test_many_batches_give_the_same(tiny_store, monkeypatch):
    store = Given(tiny_store, {"mixed": flat(ids(tiny_store, TEXTS * 5))})
    whole = own(store).read("mixed", "test")
    monkeypatch.setattr("acodm_env.experiments.evaluation.documents._BATCH_TOKENS", 20)
    parts = own(store).read("mixed", "test")
    assert np.array_equal(whole.num_bytes, parts.num_bytes)
    assert np.array_equal(whole.ends, parts.ends)


def test_a_stream_that_was_cut_ends_with_half_a_document(tiny_store):
    end = tiny_store.end_of_document
    tokens, ends = stored_documents(Given(tiny_store, {"cut": [5, 6, end, 7]}), "cut", "test")
    assert (tokens.tolist(), ends.tolist()) == ([5, 6, end, 7], [3, 4])
    _, ends = stored_documents(Given(tiny_store, {"cut": [5, 6]}), "cut", "test")
    assert ends.tolist() == [2]
    _, ends = stored_documents(Given(tiny_store, {"cut": [end, end]}), "cut", "test")
    assert ends.tolist() == [1, 2]  # two empty documents
    cut = own(Given(tiny_store, {"cut": [*ids(tiny_store, ["abc"])[0], *ids(tiny_store, ["de"])[0][:-1]]}))
    assert cut.read("cut", "test").num_bytes.tolist() == [3, 2]


def test_limit_takes_the_first_documents(tiny_store):
    domain = tiny_store.domains[1]
    whole, some = own(tiny_store).read(domain, "test"), own(tiny_store).read(domain, "test", limit=3)
    assert some.ends.tolist() == whole.ends[:3].tolist()
    assert np.array_equal(some.tokens, whole.tokens[: whole.ends[2]])
    assert np.array_equal(some.num_bytes, whole.num_bytes[:3])
    assert len(own(tiny_store).read(domain, "test", limit=10**6).ends) == len(whole.ends)
    assert num_stored_tokens(tiny_store, "test") == sum(tiny_store.sizes_tokens("test"))
    limited = [stored_documents(tiny_store, name, "test", 3)[1][-1] for name in tiny_store.domains]
    assert num_stored_tokens(tiny_store, "test", 3) == sum(limited)


@pytest.fixture(scope="module")
def other_store(tmp_path_factory, tiny_corpus):
    """The tiny corpus under another tokenizer."""
    root = tmp_path_factory.mktemp("other")
    source = Source(name=str(tiny_corpus.parent / "data.jsonl"), domain_field="domain")
    prepare(Preparation(source=source, splits=(0.8, 0.1, 0.1), tokenizer="train:280"), root / "store")
    return TokenStore.open(root / "store")


def test_encoded_again_is_what_the_other_tokenizer_stores(tiny_store, other_store):
    reader = Reader.of(tiny_store, other_store.path / "tokenizer.json", other_store.end_of_document)
    assert reader.tokenizer_file is not None
    for domain in tiny_store.domains:
        found, expected = reader.read(domain, "test"), own(other_store).read(domain, "test")
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.ends, expected.ends)
        assert np.array_equal(found.num_bytes, expected.num_bytes)
        assert len(reader.read(domain, "test", limit=2).ends) == 2
    assert sum(other_store.sizes_tokens("test")) > sum(tiny_store.sizes_tokens("test"))  # fewer entries, more tokens


def test_a_cut_document_is_ended_when_it_is_encoded_again(tiny_store, other_store):
    stream = [*ids(tiny_store, ["alpha beta"])[0], *ids(tiny_store, ["gamma"])[0][:-1]]
    reader = Reader.of(
        Given(tiny_store, {"cut": stream}), other_store.path / "tokenizer.json", other_store.end_of_document
    )
    documents = reader.read("cut", "test")
    assert documents.tokens.tolist() == flat(ids(other_store, ["alpha beta", "gamma"]))


def test_fingerprint_is_of_what_a_tokenizer_does(tiny_store, other_store, tmp_path):
    from transformers import PreTrainedTokenizerFast

    file = tiny_store.path / "tokenizer.json"
    PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endofdocument|>").save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() != file.read_bytes()  # written anew
    assert tokenizer_fingerprint(tmp_path / "tokenizer.json") == tokenizer_fingerprint(file)
    assert tokenizer_fingerprint(other_store.path / "tokenizer.json") != tokenizer_fingerprint(file)
    assert Reader.of(tiny_store, tmp_path / "tokenizer.json", tiny_store.end_of_document).tokenizer_file is None
    assert Reader.of(tiny_store, tmp_path / "tokenizer.json", 5).tokenizer_file is not None  # another end token

    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_fingerprint(tmp_path / "tokenizer.json") != tokenizer_fingerprint(file)


def test_bad_input(tiny_store):
    store = Given(tiny_store, {"full": [5], "empty": []})
    with pytest.raises(DataError, match=r"domain=empty: must hold a document in the test split"):
        check_documents(store, "test")
    with pytest.raises(DataError, match="domain=empty"):
        stored_documents(store, "empty", "test")
    with pytest.raises(ConfigError, match="limit=0: must be at least 1"):
        check_documents(tiny_store, "test", 0)
    with pytest.raises(ConfigError, match="did you mean 'test'"):
        check_documents(tiny_store, "tset")
    with pytest.raises(ConfigError, match="did you mean 'letters'"):
        stored_documents(tiny_store, "lettres", "test")
    with pytest.raises(DataError, match="must be an existing"):
        tokenizer_fingerprint(tiny_store.path / "nothing.json")
