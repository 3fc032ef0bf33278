"""Renders a conversation as a prompt, with a plain template if the export's tokenizer has none.

The plain template writes one line per message and leaves the assistant's turn open:

    system: Answer briefly.
    user: What is an API?
    assistant:

A base model continues with the other speaker's lines, so the stop strings end its turn where the
next speaker would begin.
"""

from collections.abc import Callable
from typing import Any

from workers.serving.generation import Chat

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
PLAIN_STOP = ("\nuser:", "\nsystem:", "\ndeveloper:", "\nassistant:")


def render_chat(tokenizer: Any, chat: Chat) -> str:
    """Render with the tokenizer's template, or the plain one.

    Raises ValueError if the template rejects the messages.
    """
    from jinja2.exceptions import TemplateError

    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    render: Callable[..., str] = tokenizer.apply_chat_template
    try:
        return render(
            messages,
            chat_template=tokenizer.chat_template or PLAIN_TEMPLATE,
            add_generation_prompt=True,
            tokenize=False,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template rejects these messages: {error}") from error
