"""Secrets of addresses do not show, whatever characters they have and wherever the address stands."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medattn.training.redaction import redacted

TEXT = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20)


@given(password=TEXT, escaped=st.booleans(), before=TEXT, after=TEXT)
def test_no_password_shows(password: str, escaped: bool, before: str, after: str) -> None:
    given_password = quote(password, safe="") if escaped else password
    text = f"{before} postgresql://medattn:{given_password}@db.example/study {after}"
    shown = redacted(text)
    assert "postgresql://medattn:***@" in shown
    assert f":{given_password}@" not in shown.replace(":***@", "")
    assert shown == redacted(shown)


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("http://user:password@host:5000/api", "http://user:***@host:5000/api"),
        ("http://me@corp.example:pw@host", "http://me@corp.example:***@host"),
        ("postgresql+psycopg://u:a@b@host/db", "postgresql+psycopg://u:***@host/db"),
        ("redis://:secret@host", "redis://:***@host"),
        ("postgresql://host/db?user=u&password=pw&x=1", "postgresql://host/db?user=u&password=***&x=1"),
        ("https://host/a?access_token=abc", "https://host/a?access_token=***"),
        ("API request to http://u:pw@h/api failed", "API request to http://u:***@h/api failed"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////home/me/runs/mlflow.db", "sqlite:////home/me/runs/mlflow.db"),
        ("journal:runs/tune.log", "journal:runs/tune.log"),
        ("C:/a@b and 1:2@3", "C:/a@b and 1:2@3"),
    ],
)
def test_the_rest_of_an_address_stays(given_text: str, shown: str) -> None:
    assert redacted(given_text) == shown
