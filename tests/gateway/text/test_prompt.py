from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from service.errors import InvalidRequest
from service.families import Family
from service.gateway.api.schemas import ChatBody, GenerateBody
from service.gateway.question import SamplingDefaults
from service.gateway.text.chat import ChatTemplate
from service.gateway.text.prompt import PromptBuilder, load_tokenizer, special_tokens
from tests.gateway.checkpoints import byte_fallback_tokenizer, make_family

KEYS = tuple(f"{number:064x}" for number in range(4))


def fake_image_text(after_image: bool) -> str:
    """As IDEFICS: pictures that follow each other share the token between them."""
    return ("" if after_image else "#") + "<image>#"


def message(role: str, *parts: dict | str) -> dict:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": content}


IMAGE = {"type": "image"}


@pytest.mark.asyncio
async def test_a_family_writes_its_pictures_where_the_marks_stand(family: Family, tokenizer: Tokenizer) -> None:
    with ThreadPoolExecutor(1) as threads:
        builder = PromptBuilder(replace(family, image_text=fake_image_text), tokenizer, threads, 256)
        for prompt, num_pictures, written in (
            ("<image><image>a<image>", 3, "#<image>#<image>#a#<image>#"),
            ("a", 2, "#<image>#<image>#a"),
            ("a", 0, "a"),
        ):
            request = await builder.build(GenerateBody(prompt=prompt).question(), KEYS[:num_pictures])
            assert tokenizer.decode(list(request.input_ids), skip_special_tokens=False) == written
            assert len(request.image_positions) == num_pictures


def test_a_template_for_strings_gets_the_family_s_image_text() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", fake_image_text, {})
    assert template.render([message("user", IMAGE, IMAGE, "a", "b", IMAGE)]) == "[#<image>#<image>#a\nb#<image>#]"


def test_a_template_for_parts_gets_parts_and_writes_its_own() -> None:
    source = (
        "{% for m in messages %}{% for part in m.content %}"
        "{% if part.type == 'image' %}<I>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(source, fake_image_text, {})
    assert template.render([message("user", IMAGE, "a")]) == "<I>a"


def test_templates_find_what_transformers_gives_them() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\n"
        "  {% if true %}\n{{ m | tojson }}{% endif %}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}>{% endif %}"
    )
    template = ChatTemplate(source, fake_image_text, {"bos_token": "<s>"})
    assert template.render([message("user", "é<b>"), message("user", "no")]) == (
        '<s>{"role": "user", "content": "é<b>"}4>'
    )


def test_a_template_may_refuse_messages_in_its_author_s_words() -> None:
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate.') }}{% endif %}"
    template = ChatTemplate(source, fake_image_text, {})
    with pytest.raises(InvalidRequest, match="Roles must alternate"):
        template.render([message("assistant", "a")])


def test_a_template_is_kept_in_a_sandbox() -> None:
    for attack in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 1 / 0 }}"):
        with pytest.raises(InvalidRequest):
            ChatTemplate(attack, fake_image_text, {}).render([message("user", "a")])


def test_a_broken_template_is_told_to_the_operator() -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate("{% for %}", fake_image_text, {})


@pytest.mark.asyncio
async def test_a_chat_s_template_writes_the_special_tokens_itself(tmp_path: Path) -> None:
    tokenizer = byte_fallback_tokenizer()
    family = make_family(tmp_path, tokenizer, chat_template="<s>{{ messages[0].content }}")
    with ThreadPoolExecutor(1) as threads:
        builder = PromptBuilder(family, tokenizer, threads, 256)
        chat = ChatBody.model_validate({"messages": [{"role": "user", "content": "a"}]})
        text = GenerateBody.model_validate({"prompt": "a"})
        from_chat = await builder.build(chat.question(SamplingDefaults()), ())
        from_text = await builder.build(text.question(), ())
    assert from_chat.input_ids[:1] == from_text.input_ids[:1] == (1,)
    assert from_chat.input_ids.count(1) == from_text.input_ids.count(1) == 1


@pytest.mark.asyncio
async def test_a_model_without_a_template_has_no_chat(family: Family, tokenizer: Tokenizer) -> None:
    with ThreadPoolExecutor(1) as threads:
        builder = PromptBuilder(replace(family, chat_template=None), tokenizer, threads, 256)
        chat = ChatBody.model_validate({"messages": [{"role": "user", "content": "a"}]})
        with pytest.raises(InvalidRequest, match="no chat template"):
            await builder.build(chat.question(SamplingDefaults()), ())


@pytest.mark.asyncio
async def test_image_tokens_among_ids_must_have_their_pictures(family: Family, tokenizer: Tokenizer) -> None:
    builder = PromptBuilder(family, tokenizer, None, 256)  # type: ignore[arg-type]
    image = family.image_token_id
    question = GenerateBody.model_validate({"prompt": [image, 5, image]}).question()
    for num_pictures in (0, 1, 3):
        with pytest.raises(InvalidRequest, match="2 image tokens"):
            await builder.build(question, KEYS[:num_pictures])
    assert (await builder.build(question, KEYS[:2])).image_positions == (0, 2)


@pytest.mark.asyncio
async def test_ids_that_do_not_fit_are_refused_before_they_are_read(family: Family, tokenizer: Tokenizer) -> None:
    builder = PromptBuilder(family, tokenizer, None, 256)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="takes 1000000") as refused:
        await builder.build(replace(GenerateBody(prompt="").question(), prompt=(-1,) * 1_000_000), ())
    assert refused.value.param == "prompt"


def test_a_tokenizer_file_s_own_truncation_is_turned_off(tmp_path: Path) -> None:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("a" * 50).ids) > 50
    assert len(load_tokenizer(tmp_path).encode("a").ids) < 8


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_special_tokens_may_be_text_or_objects(tmp_path: Path) -> None:
    config = '{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null, "add_bos_token": true}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert special_tokens(tmp_path) == {"bos_token": "<s>", "eos_token": "</s>"}
