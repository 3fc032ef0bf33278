"""Tokenizers train reproducibly, load in transformers, and keep documents apart."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from service.core.errors import StageInputInvalid
from tests.support.training import texts_of
from workers.data.tokenizer import (
    END_OF_TEXT,
    TextEncoder,
    adopt_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [*texts_of(1, 40), "Grüße aus Köln: 5 € für 日本語.", "  indented\n\n\ttabbed  "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400).save_pretrained(folder)
    return folder


def test_training_in_another_process_on_any_number_of_cores_gives_equal_bytes(folder: Path) -> None:
    code = (
        "import hashlib; from tests.workers.data.test_tokenizer import TEXTS, train_tokenizer;"
        "print(hashlib.sha256(train_tokenizer(TEXTS, 400).backend_tokenizer.to_str().encode()).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = load_tokenizer(folder).backend_tokenizer.to_str()
    assert done.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_a_trained_tokenizer_loads_in_transformers_and_round_trips_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.eos_token_id) == (400, END_OF_TEXT, 0)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_documents_end_with_end_of_text_and_cannot_contain_it(folder: Path) -> None:
    encoder = TextEncoder(load_tokenizer(folder))
    (block,) = encoder.encode(["one", f"two {END_OF_TEXT} half", ""])
    assert [index for index, token in enumerate(block.ids) if token == 0][1:] == [
        len(block.ids) - 2,
        len(block.ids) - 1,
    ]
    assert block.ids.tolist().count(0) == 3
    assert (block.documents, block.text_bytes) == (3, len("one") + len(f"two {END_OF_TEXT} half"))


def test_long_texts_are_encoded_in_several_blocks(folder: Path) -> None:
    encoder = TextEncoder(load_tokenizer(folder))
    blocks = list(encoder.encode(["word " * 100_000] * 5))
    assert [block.documents for block in blocks] == [3, 2]


def test_an_adopted_tokenizer_keeps_the_special_tokens_of_its_configuration(
    folder: Path, tmp_path: Path
) -> None:
    adopted = adopt_tokenizer(folder)
    adopted.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert adopted.eos_token_id == 0


def test_a_usual_end_token_is_found_without_a_configuration(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    assert adopt_tokenizer(tmp_path).eos_token == END_OF_TEXT


def test_a_tokenizer_without_an_end_token_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(StageInputInvalid, match=r"no tokenizer\.json"):
        adopt_tokenizer(tmp_path)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(StageInputInvalid, match="ends a document"):
        adopt_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<nowhere>"}}))
    with pytest.raises(StageInputInvalid, match="nowhere"):
        adopt_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(StageInputInvalid, match="cannot be read"):
        adopt_tokenizer(tmp_path)
