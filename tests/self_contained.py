"""What makes an HTML page one file: it asks for nothing else, and its own links hold."""

from __future__ import annotations

import re
from typing import Any


def assert_self_contained(page: Any, text: str) -> None:
    """``page.elements``: (tag, attributes) of ``text``."""
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "image", "base"})
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in page.elements:
        assert not any(key.startswith("on") for key in attrs)
        for key, value in attrs.items():
            links = re.findall(r"url\(\s*['\"]?([^)]*)\)", value) + ([value] if key in ("href", "src") else [])
            assert all(link.startswith("#") and link[1:] in ids for link in links)
    assert "://" not in text
    assert "@import" not in text
    assert "\x00" not in text
    text.encode("utf-8")
