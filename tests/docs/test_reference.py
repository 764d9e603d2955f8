"""The generated pages are what the source says today."""

from __future__ import annotations

import pytest

from coppice.cli.rooms import ROOMS
from coppice.settings import settings_of
from tools.gen_reference import FOLDER, PAGES, error_classes


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == PAGES[name](), "run: make docs"


def test_every_setting_and_every_error_is_on_its_page() -> None:
    settings = (FOLDER / "settings.md").read_text(encoding="utf-8")
    for room in ROOMS:
        for item in settings_of(room):
            assert f"`{item.variable}`" in settings
            assert item.sentence.endswith("."), item.key
    errors = (FOLDER / "errors.md").read_text(encoding="utf-8")
    for kind in error_classes():
        assert f"`{kind.__name__}`" in errors


def test_error_codes_are_unique() -> None:
    codes = [kind.code for kind in error_classes()]
    assert len(codes) == len(set(codes))
