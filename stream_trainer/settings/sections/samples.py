"""Settings of how a record becomes token ids."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stream_trainer.settings.base import Count, Section

Name = Annotated[str, Field(min_length=1)]
Ours = Literal[
    "text",
    "prompt",
    "response",
    "messages",
    "role",
    "content",
    "system",
    "tools",
    "id",
    "weight",
    "timestamp",
    "domain",
]
GIVEN_BY_US = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})


class SampleSettings(Section):
    """How a record becomes token ids."""

    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Maximum number of tokens in a sample."""
    too_long: Literal["truncate", "dead_letter"] = "truncate"
    """What to do with a longer sample: cut off its end (`truncate`), or dead-letter the record."""
    max_bytes: Count = 1_000_000
    """Maximum size of a record in bytes. Larger records are dead-lettered unread."""
    fields: dict[Ours, Name | tuple[Name, ...]] = Field(default={})
    """Other names of the producers for our fields, as `{prompt: [instruction, input], response: output}` or
    `{messages: conversations, role: from, content: value}`. Several names are joined by a line break."""
    ignore: tuple[Name, ...] = ()
    """Fields of a record or a message that may be left aside although they look as if they meant something."""
    template_arguments: dict[Name, Any] = Field(default={})
    """Arguments of the chat template, such as `enable_thinking`. A record's own `chat_template_kwargs` come first."""
    formatted_text: Literal["text", "tokens", "dead_letter"] = "text"
    """What to do with a text, prompt or response that carries the markers of a chat template already. `text` takes them
    letter by letter and warns, `tokens` takes them as the tokens that they name, `dead_letter` refuses the record."""
    duplicates: Literal["keep", "id", "content"] = "keep"
    """What makes a record a duplicate of an earlier one: the same `id`, or the same tokens (`content`). A duplicate is
    counted and not trained on."""
    duplicate_window: Count = 10_000
    """Number of the last samples among which duplicates are looked for. Each takes some 50 bytes of a checkpoint."""

    @model_validator(mode="after")
    def _arguments_are_free(self) -> Self:
        for taken in GIVEN_BY_US & self.template_arguments.keys():
            raise ValueError(f"template_arguments.{taken} is given by the record; leave it out")
        return self
