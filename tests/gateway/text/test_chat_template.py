"""What a chat template is shown of a message: a string where it takes one, parts where it writes pictures itself."""

from __future__ import annotations

from typing import Any

import pytest

from service.gateway.text.chat import ChatTemplate

STRINGS = "{% for m in messages %}[{{ m['content'] + '' }}]{% endfor %}"
PARTS = (
    "{% for m in messages %}[{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}]{% endfor %}"
)
EITHER = (
    "{% for m in messages %}[{% if m['content'] is string %}string:{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}]{% endfor %}"
)
PICTURE = {"type": "image"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": [PICTURE, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A fox."}]},
]


@pytest.mark.parametrize(
    ("source", "picture", "written"),
    [
        (STRINGS, "<image>", "[<image>What?][A fox.]"),
        (PARTS, "<image>", "[<image>What?][A fox.]"),
        (PARTS, "(<image>)", "[<image>What?][A fox.]"),  # it takes nothing else
        (EITHER, "<image>", "[<image>What?][string:A fox.]"),
        (EITHER, "(<image>)", "[string:(<image>)What?][string:A fox.]"),  # pictures as the family has them
    ],
)
def test_a_template_sees_parts_where_it_writes_pictures_as_the_family_does(
    source: str, picture: str, written: str
) -> None:
    template = ChatTemplate(source, lambda after_image: picture, {})
    assert template.render(MESSAGES) == written
