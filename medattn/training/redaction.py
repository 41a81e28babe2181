"""Secrets in addresses, hidden from all that people and files get to see."""

from __future__ import annotations

import re
from urllib.parse import unquote

HIDDEN = "***"
# Greedy up to the last @ of the word: a password may hold any character, though it should be escaped.
# Rather hide a port before an @ that belongs to a path than show the end of a password.
_USERINFO = re.compile(r"(://[^\s:/?#]*):(\S*)@")
_QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:password|passwd|token|secret)|pwd|api_?key)=)([^&;\s'\"#]+)", re.IGNORECASE
)


def redacted(text: str, address: str = "") -> str:
    """The text with the secrets of addresses in it replaced.

    address: one whose secrets are replaced also where they stand alone, as it has them or decoded.

    >>> redacted("postgresql://medattn:pa/ss@db:5432/study?sslpassword=x is down")
    'postgresql://medattn:***@db:5432/study?sslpassword=*** is down'
    >>> redacted("http://localhost:5000"), redacted("sqlite:////runs/mlflow.db")
    ('http://localhost:5000', 'sqlite:////runs/mlflow.db')
    >>> redacted("no login with pa/ss", "postgresql://medattn:pa%2Fss@db/study")
    'no login with ***'
    """
    for match in (*_USERINFO.finditer(address), *_QUERY.finditer(address)):
        for secret in {match[2], unquote(match[2])} - {""}:
            text = text.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(rf"\1:{HIDDEN}@", text))
