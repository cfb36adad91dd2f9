"""From a question's prompt to token ids in which the image token stands for each picture. No pixels here.

What a client writes is text. Control tokens come from the chat template, from what a family writes for a picture, and
from prompts of ids; the one mark with a meaning is `<image>` in the prompt of /v1/generate. In a chat every picture is
a part of its message, so there `<image>` is text as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from service.contract import ValidRequest
from service.errors import InvalidRequest
from service.families import Family
from service.families.family import read_json
from service.gateway.question import Question
from service.gateway.text.chat import ChatTemplate
from service.gateway.text.control_tokens import ControlTokens
from service.gateway.text.disguise import Disguise

MARK = "<image>"
CHUNK_CHARS = 1 << 14  # of a long text that is measured before it is encoded


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises InvalidRequest, for an operator, if the folder has no readable tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidRequest(f"{folder} has no tokenizer.json.", param="MODEL_PATH")
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise InvalidRequest(f"{path} is not a tokenizer.", param="MODEL_PATH") from error
    tokenizer.no_truncation()  # a file may carry either, and would cut a prompt without a word
    tokenizer.no_padding()
    return tokenizer


class PromptBuilder:
    def __init__(self, family: Family, tokenizer: Tokenizer, threads: Executor, default_max_tokens: int) -> None:
        self._family = family
        self._control_tokens = ControlTokens(tokenizer)
        self._threads = threads
        self._default_max_tokens = default_max_tokens
        self._chat = None
        if family.chat_template is not None:
            self._chat = ChatTemplate(family.chat_template, family.image_text, special_tokens(family.folder))
        longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._max_chars = family.decoder.max_positions * longest_token  # more cannot fit, whatever the text

    async def build(self, question: Question, image_keys: tuple[str, ...]) -> ValidRequest:
        """Raises InvalidRequest naming `prompt`, `messages` or `max_tokens`."""
        num_images = len(image_keys)
        prompt = question.prompt
        field = "messages" if isinstance(prompt, list) else "prompt"
        if isinstance(prompt, tuple):
            input_ids = self._check_ids(prompt)
        else:
            loop = asyncio.get_running_loop()
            input_ids = await loop.run_in_executor(self._threads, self._encode, prompt, num_images)
        if not input_ids:
            raise InvalidRequest("The prompt is empty.", param=field)
        image_token = self._family.image_token_id
        positions = tuple(position for position, token in enumerate(input_ids) if token == image_token)
        if len(positions) != num_images:
            raise InvalidRequest(
                f"The prompt has {len(positions)} image tokens for {num_images} pictures.", param=field
            )
        return ValidRequest(
            input_ids=input_ids,
            image_keys=image_keys,
            image_positions=positions,
            sampling=replace(question.sampling, max_tokens=self._max_tokens(question, len(input_ids), field)),
        )

    def _encode(self, prompt: str | list[dict[str, Any]], num_images: int) -> tuple[int, ...]:
        if isinstance(prompt, str):
            field, text = "prompt", self._replace_marks(prompt, num_images)
        elif self._chat is None:
            raise InvalidRequest("This model has no chat template; use /v1/generate.", param="messages")
        else:
            field, text = "messages", self._fill_template(self._chat, prompt)
        self._check_length(text, field)
        # a template writes its own special tokens
        return self._control_tokens.encode(text, add_special_tokens=field == "prompt")

    def _fill_template(self, chat: ChatTemplate, messages: list[dict[str, Any]]) -> str:
        """What the template writes about the messages, whose texts add no control token to its own.

        A template may look into the texts. If it writes other control tokens when it is not shown the signs that these
        are made of, then some may be made of the texts, of two parts put together, say: so the signs are not shown.
        """
        tokens = self._control_tokens
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        self._check_length("".join(texts), "messages")
        disguise = Disguise(tokens, texts)
        written = chat.render(_with_texts(messages, disguise.hide_spellings))
        opaque = chat.render(_with_texts(messages, disguise.hide_marks))
        if [match[2] for match in tokens.find(written)] != [match[2] for match in tokens.find(opaque)]:
            written = opaque
        return disguise.reveal(tokens.write(written))

    def _check_length(self, text: str, field: str) -> None:
        """Refuses what cannot fit without encoding all of it: no text costs more than some contexts full of tokens."""
        if len(text) > self._max_chars:
            raise self._over_long(field)
        if len(text) <= CHUNK_CHARS:
            return
        num_tokens = 0
        for start in range(0, len(text), CHUNK_CHARS):
            num_tokens += self._control_tokens.count(text[start : start + CHUNK_CHARS])
            if num_tokens > 2 * self._family.decoder.max_positions:  # twice: a cut may make tokens
                raise self._over_long(field)

    def _replace_marks(self, text: str, num_images: int) -> str:
        """Each `<image>` becomes what the family writes for a picture; without any, the pictures go first.

        Only that has control tokens: between the marks is text.
        """
        pieces = text.split(MARK)
        if len(pieces) == 1:
            pieces = [""] * num_images + pieces
        if len(pieces) - 1 != num_images:
            raise InvalidRequest(f"{len(pieces) - 1} {MARK} marks for {num_images} pictures.", param="prompt")
        written = pieces[0]
        for index, piece in enumerate(pieces[1:]):
            after_image = index > 0 and not pieces[index]
            written += self._control_tokens.write(self._family.image_text(after_image)) + piece
        return written

    def _check_ids(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if len(ids) > self._family.decoder.max_positions:  # length before content
            raise self._over_long("prompt", len(ids))
        vocab_size = self._family.decoder.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            index = next(index for index, token in enumerate(ids) if not 0 <= token < vocab_size)
            raise InvalidRequest(f"Token ids are between 0 and {vocab_size - 1}.", param=f"prompt[{index}]")
        return ids

    def _max_tokens(self, question: Question, num_prompt_tokens: int, field: str) -> int:
        room = self._family.decoder.max_positions - num_prompt_tokens
        if room < 1:
            raise self._over_long(field, num_prompt_tokens)
        if not question.max_tokens_given:
            return min(self._default_max_tokens, room)
        if question.sampling.max_tokens > room:
            raise InvalidRequest(
                f"The context holds {self._family.decoder.max_positions} tokens; the prompt takes {num_prompt_tokens},"
                f" which leaves {room}, and max_tokens asks for {question.sampling.max_tokens}.",
                param="max_tokens",
            )
        return question.sampling.max_tokens

    def _over_long(self, field: str, num_tokens: int | None = None) -> InvalidRequest:
        size = "more" if num_tokens is None else str(num_tokens)
        limit = self._family.decoder.max_positions
        return InvalidRequest(f"The context holds {limit} tokens, and the prompt alone takes {size}.", param=field)


def _with_texts(messages: list[dict[str, Any]], change: Callable[[str], str]) -> list[dict[str, Any]]:
    """The messages with each text changed."""
    return [
        {
            **message,
            "content": [
                {**part, "text": change(part["text"])} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` … of tokenizer_config.json, as chat templates expect them."""
    tokens = {}
    for name, value in read_json(folder / "tokenizer_config.json").items():
        if name.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
    return tokens
