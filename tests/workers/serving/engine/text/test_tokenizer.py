"""Prompts and conversations are encoded by the export's tokenizer."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.tiny_export import CONTEXT_LENGTH
from workers.serving.engine.text.chat_template import PLAIN_STOP
from workers.serving.engine.text.tokenizer import ExportTokenizer
from workers.serving.generation import Chat, ChatMessage

PROMPT = "The cat sat on"


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> ExportTokenizer:
    return ExportTokenizer(export)


def test_an_empty_prompt_is_the_start_token(tokenizer: ExportTokenizer) -> None:
    assert tokenizer.encode("", CONTEXT_LENGTH) == (0,)


def test_a_conversation_without_a_template_is_plain_text(tokenizer: ExportTokenizer) -> None:
    chat = Chat((ChatMessage("system", "Be brief."), ChatMessage("user", "Hello")))
    plain = tokenizer.encode("system: Be brief.\nuser: Hello\nassistant:", CONTEXT_LENGTH)
    assert tokenizer.encode_chat(chat, CONTEXT_LENGTH) == (plain, PLAIN_STOP)


def test_the_tokenizers_own_template_is_used_and_may_reject_messages(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    )
    tokenizer = ExportTokenizer(tmp_path)
    expected = (tokenizer.encode("[Hi]", CONTEXT_LENGTH), ())
    assert tokenizer.encode_chat(Chat((ChatMessage("user", "Hi"),)), CONTEXT_LENGTH) == expected
    with pytest.raises(ValueError, match="no system here"):
        tokenizer.encode_chat(Chat((ChatMessage("system", "Hi"),)), CONTEXT_LENGTH)


def test_a_prompt_far_beyond_the_context_is_read_only_in_part(
    tokenizer: ExportTokenizer, export: Path
) -> None:
    far = tokenizer.encode(PROMPT * 1_000_000, CONTEXT_LENGTH)
    assert 2 * CONTEXT_LENGTH < len(far) <= 32 * CONTEXT_LENGTH
    chat = Chat((ChatMessage("user", PROMPT * 1_000_000),))
    assert 2 * CONTEXT_LENGTH < len(tokenizer.encode_chat(chat, CONTEXT_LENGTH)[0]) <= 32 * CONTEXT_LENGTH
    near = PROMPT * CONTEXT_LENGTH
    ids = tokenizer.encode(near, CONTEXT_LENGTH)
    assert len(ids) > CONTEXT_LENGTH
    assert tuple(AutoTokenizer.from_pretrained(export)(near)["input_ids"]) == ids
