"""EleutherAI's lm-eval, unmodified, gets the same results from the server as from transformers."""

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer, LlamaForCausalLM

from service.artifacts import Artifacts
from tests.support.tiny_export import CONTEXT_LENGTH
from workers.serving.local_serving import LocalServing

QUESTIONS = [
    "The cat sat",
    "The dog sat by",
    "Grüße aus",
    "The door, and the cat",
    "日本語: the mat",
    "5 € für",
]
CHOICES = [" on the mat", " by the door.", " aus Köln: 5 €", " 日本語."]
# One text longer than two context windows, and one shorter than one.
TEXTS = ["The cat sat on the mat, and the dog sat by the door of Köln. " * 14, "Grüße für 5 €."]
MAX_GEN_TOKENS = 24
CHAT = "user: {}\nassistant:"


class Reference:
    """The served version in plain transformers, in float32, one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Return the log-likelihood of the continuation and whether each of its tokens is the likeliest."""
        logits_TV = self._model(torch.tensor([[*context, *continuation]])).logits[0]
        logprobs_TV = logits_TV[len(context) - 1 : -1].log_softmax(-1)
        logprobs_T = logprobs_TV[range(len(continuation)), list(continuation)]
        return float(logprobs_T.sum()), logprobs_TV.argmax(-1).tolist() == list(continuation)

    def rolling(self, text: str) -> float:
        """Return the log-likelihood of a text, window by window, as lm-eval computes it.

        The first window follows the BOS token and the last one is as long as the others. lm-eval leaves room
        in the context for that token and for one to generate.
        """
        tokens = [self.tokenizer.bos_token_id, *self.tokenizer.encode(text)]
        size = CONTEXT_LENGTH - 2
        total = 0.0
        for begin in range(1, len(tokens), size):
            end = min(begin + size, len(tokens))
            total += self.score(tokens[max(0, end - size - 1) : begin], tokens[begin:end])[0]
        return total

    @torch.inference_mode()
    def greedy(self, prompt: str, max_tokens: int = MAX_GEN_TOKENS) -> str:
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        answer = self._model.generate(ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        text: str = self.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class Tasks:
    """A folder of lm-eval tasks, and the expected contents of their documents."""

    folder: Path
    choices: list[list[str]]
    answers: list[str]
    chat_answers: list[str]


@pytest.fixture(scope="module")
def version(artifacts: Artifacts) -> Path:
    return artifacts.open("export/1")


@pytest.fixture(scope="module")
def reference(version: Path) -> Reference:
    return Reference(version)


@pytest.fixture(scope="module")
def tasks(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    folder = tmp_path_factory.mktemp("tasks")
    # One choice is the model's own greedy continuation.
    choices = [[*CHOICES, reference.greedy(question, 1)] for question in QUESTIONS]
    greedy = [reference.greedy(question) for question in QUESTIONS]
    chat_greedy = [reference.greedy(CHAT.format(question)) for question in QUESTIONS]
    until = [_within(greedy[0]), _within(chat_greedy[1])]
    answers = [_cut(text, until) for text in greedy]
    chat_answers = [_cut(text, until) for text in chat_greedy]
    for whole, cut in ((greedy, answers), (chat_greedy, chat_answers)):
        assert 0 < sum(text in whole for text in cut) < len(cut)

    choosing = [
        {"question": question, "choices": question_choices, "answer": number % 5}
        for number, (question, question_choices) in enumerate(zip(QUESTIONS, choices, strict=True))
    ]
    _write(
        folder,
        "choosing",
        choosing,
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="choices",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=_metrics("acc"),
    )
    _write(
        folder,
        "rolling",
        [{"text": text} for text in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=_metrics("bits_per_byte", aggregation="bits_per_byte", higher_is_better=False),
    )
    for name, expected in (("generating", answers), ("chatting", chat_answers)):
        documents = [
            {"question": question, "answer": text}
            for question, text in zip(QUESTIONS, [*expected[:-1], "something else"], strict=True)
        ]
        _write(
            folder,
            name,
            documents,
            output_type="generate_until",
            doc_to_text="question",
            doc_to_target="answer",
            generation_kwargs={"until": until, "max_gen_toks": MAX_GEN_TOKENS, "do_sample": False},
            metric_list=_metrics("exact_match"),
        )
    return Tasks(folder, choices, answers, chat_answers)


def _write(folder: Path, name: str, documents: list[dict[str, Any]], **task: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task |= {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def _metrics(metric: str, aggregation: str = "mean", higher_is_better: bool = True) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": aggregation, "higher_is_better": higher_is_better}]


def _within(text: str) -> str:
    """Return two adjacent characters of the text, to use as its stop string."""
    found = re.search("[!-~]{2}", text[3:])
    assert found is not None
    return found[0]


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


def evaluate(
    tasks: Tasks, names: list[str], model: str, url: str, *, batch_size: int = 1, **options: Any
) -> dict[str, Any]:
    """Return what ``lm_eval --model MODEL --tasks NAMES`` reports, including samples."""
    import lm_eval  # imported here because it takes half a second
    from lm_eval.tasks import TaskManager

    report = lm_eval.simple_evaluate(
        model,
        model_args={"model": "line", "base_url": url, "max_length": CONTEXT_LENGTH, **options},
        tasks=names,
        batch_size=batch_size,
        task_manager=TaskManager(include_path=tasks.folder, include_defaults=False),
        apply_chat_template=model == "local-chat-completions",
        bootstrap_iters=0,
    )
    assert report is not None
    return dict(report)


def _responses(report: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


# Small enough that the server rejects nothing: lm-eval gives up on a request after three rejections.
@pytest.mark.parametrize(("num_concurrent", "batch_size"), [(1, 8), (4, 4)])
def test_completions_score_and_generate_like_the_model(
    serving: LocalServing,
    version: Path,
    reference: Reference,
    tasks: Tasks,
    num_concurrent: int,
    batch_size: int,
) -> None:
    report = evaluate(
        tasks,
        ["choosing", "rolling", "generating"],
        "local-completions",
        f"{serving.url()}/v1/completions",
        tokenizer=str(version),
        tokenizer_backend="huggingface",
        num_concurrent=num_concurrent,
        batch_size=batch_size,
    )

    encode = reference.tokenizer.encode
    num_right = num_greedy = 0
    for number, scores in enumerate(_responses(report, "choosing")):
        context = encode(QUESTIONS[number])
        expected = [
            reference.score(context, encode(QUESTIONS[number] + choice)[len(context) :])
            for choice in tasks.choices[number]
        ]
        assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
        num_greedy += sum(greedy for _, greedy in expected)
        num_right += expected.index(max(expected)) == number % 5
    assert 0 < num_greedy < 5 * len(QUESTIONS)
    assert report["results"]["choosing"]["acc,none"] == pytest.approx(num_right / len(QUESTIONS))

    rolled = [reference.rolling(text) for text in TEXTS]
    assert len(encode(TEXTS[0])) > 2 * CONTEXT_LENGTH
    bits = -sum(rolled) / sum(len(text.encode()) for text in TEXTS) / math.log(2)
    assert [score for [score] in _responses(report, "rolling")] == pytest.approx(rolled, rel=1e-6, abs=1e-4)
    assert report["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)

    assert _responses(report, "generating") == [[text] for text in tasks.answers]
    right = (len(QUESTIONS) - 1) / len(QUESTIONS)
    assert report["results"]["generating"]["exact_match,none"] == pytest.approx(right)


@pytest.mark.parametrize("num_concurrent", [1, 4])
def test_chats_generate_like_the_model(serving: LocalServing, tasks: Tasks, num_concurrent: int) -> None:
    url = f"{serving.url()}/v1/chat/completions"
    report = evaluate(tasks, ["chatting"], "local-chat-completions", url, num_concurrent=num_concurrent)
    assert _responses(report, "chatting") == [[text] for text in tasks.chat_answers]


class _OnRejection(logging.Handler):
    """Calls ``callback`` when lm-eval warns about a request that was answered with 429."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.num_rejected = 0
        self.callback: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        if "rate_limit_exceeded" in record.getMessage():
            self.num_rejected += 1
            self.callback()


@pytest.fixture
def on_rejection() -> Iterator[_OnRejection]:
    handler = _OnRejection()
    logging.getLogger("lm_eval").addHandler(handler)
    yield handler
    logging.getLogger("lm_eval").removeHandler(handler)


def test_requests_are_retried_when_the_server_is_busy(
    serving: LocalServing, client: OpenAI, version: Path, tasks: Tasks, on_rejection: _OnRejection
) -> None:
    # Hundreds of sequences wait until one request has been rejected; lm-eval retries twice, a second apart.
    with client.completions.create(
        model="line", prompt=["a"] * 4, n=128, max_tokens=120, stream=True
    ) as busy:
        on_rejection.callback = busy.close
        next(iter(busy))
        report = evaluate(
            tasks,
            ["generating"],
            "local-completions",
            f"{serving.url()}/v1/completions",
            tokenizer=str(version),
            tokenizer_backend="huggingface",
        )
    assert on_rejection.num_rejected > 0
    assert _responses(report, "generating") == [[text] for text in tasks.answers]
