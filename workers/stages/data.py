"""The stages that turn documents into tokens."""

from collections.abc import Iterator
from dataclasses import asdict

from service.core.errors import StageInputInvalid, Stopped
from service.core.executor import StageCall
from service.core.manifest import Manifest
from service.core.stage_specs import PackStage, TokenizerStage
from service.ingest.reading import training_documents
from workers.data.pack import write_pack
from workers.data.tokenizer import TextEncoder, adopt_tokenizer, load_tokenizer, train_tokenizer
from workers.stages.context import StageContext


def tokenizer(call: StageCall, context: StageContext) -> Manifest:
    """Train or adopt a tokenizer. Result: ``vocab_size``, and ``end_of_text``, the id of that token."""
    stage = TokenizerStage.model_validate(call.spec)
    if stage.source_key is not None:
        trained = adopt_tokenizer(context.artifacts.open(stage.source_key))
    elif stage.data_key is not None and stage.vocab_size is not None:
        texts = _training_texts(context, stage.data_key, (), stage.slice_keys)
        trained = train_tokenizer(texts, stage.vocab_size)
    else:
        raise StageInputInvalid("a tokenizer stage needs a source_key, or a data_key and a vocab_size")
    with context.artifacts.writing(call.key) as directory:
        trained.save_pretrained(directory)
        result = {"vocab_size": len(trained), "end_of_text": trained.eos_token_id}
        return context.artifacts.publish(call.key, directory, result)


def pack(call: StageCall, context: StageContext) -> Manifest:
    """Tokenise a data version. Result: the pack's header; planning reads its ``rows`` and ``tokens``."""
    stage = PackStage.model_validate(call.spec)
    encoder = TextEncoder(load_tokenizer(context.artifacts.open(stage.tokenizer_key)))
    texts = _training_texts(context, stage.data_key, stage.earlier_keys, stage.slice_keys)
    with context.artifacts.writing(call.key) as directory:
        header = write_pack(
            directory,
            encoder.encode(texts),
            sequence_length=stage.sequence_length,
            vocab_size=encoder.vocab_size,
        )
        return context.artifacts.publish(call.key, directory, asdict(header))


def _training_texts(
    context: StageContext, data_key: str, earlier_keys: tuple[str, ...], slice_keys: tuple[str, ...]
) -> Iterator[str]:
    open_folder = context.artifacts.open
    documents = training_documents(
        open_folder(data_key),
        [open_folder(key) for key in earlier_keys],
        [open_folder(key) for key in slice_keys],
    )
    for document in documents:
        if context.should_stop():
            raise Stopped("stopped while reading documents")
        yield document.text
