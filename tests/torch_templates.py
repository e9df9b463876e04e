"""Rendered prompts are transformers' own; needs the extra hf."""

import datetime
from types import SimpleNamespace

import pytest
from transformers.utils import chat_template_utils

from test_templates import LONG, REAL, TOKENS, USER, render
from weighbridge.lab.variants import OFFICIAL_TEMPLATE


def test_transformers_renders_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = SimpleNamespace(now=lambda: datetime.datetime(2026, 10, 7))
    monkeypatch.setattr(chat_template_utils, "datetime", fixed)
    for name, template in {**REAL, "official": OFFICIAL_TEMPLATE}.items():
        conversations = [USER, LONG[1:], *([] if name == "gemma" else [LONG])]
        expected, _ = chat_template_utils.render_jinja_template(
            conversations=[[turn.model_dump() for turn in turns] for turns in conversations],
            chat_template=template,
            add_generation_prompt=True,
            **TOKENS,
        )
        assert render(template, *conversations, date="2026-10-07") == expected, name
