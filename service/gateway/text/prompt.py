"""From a question's prompt to token ids in which the image token stands for each picture. No pixels here."""

from __future__ import annotations

import asyncio
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

MARK = "<image>"


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
        self._tokenizer = tokenizer
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
                f"The prompt has {len(positions)} image tokens for {num_images} pictures; a text must not spell them.",
                param=field,
            )
        return ValidRequest(
            input_ids=input_ids,
            image_keys=image_keys,
            image_positions=positions,
            sampling=replace(question.sampling, max_tokens=self._max_tokens(question, len(input_ids), field)),
        )

    def _encode(self, prompt: str | list[dict[str, Any]], num_images: int) -> tuple[int, ...]:
        if isinstance(prompt, str):
            text, add_special_tokens = self._replace_marks(prompt, num_images), True
        elif self._chat is None:
            raise InvalidRequest("This model has no chat template; use /v1/generate.", param="messages")
        else:
            text, add_special_tokens = self._chat.render(prompt), False  # a template writes its own
        if len(text) > self._max_chars:
            raise self._over_long("prompt" if isinstance(prompt, str) else "messages")
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _replace_marks(self, text: str, num_images: int) -> str:
        """Each `<image>` becomes what the family writes for a picture; without any, the pictures go first."""
        pieces = text.split(MARK)
        if len(pieces) == 1:
            pieces = [""] * num_images + pieces
        if len(pieces) - 1 != num_images:
            raise InvalidRequest(f"{len(pieces) - 1} {MARK} marks for {num_images} pictures.", param="prompt")
        written = pieces[0]
        for index, piece in enumerate(pieces[1:]):
            after_image = index > 0 and not pieces[index]
            written += self._family.image_text(after_image) + piece
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


def special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` … of tokenizer_config.json, as chat templates expect them."""
    tokens = {}
    for name, value in read_json(folder / "tokenizer_config.json").items():
        if name.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
    return tokens
