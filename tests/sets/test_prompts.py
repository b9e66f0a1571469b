from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from distilclip.errors import InputError
from distilclip.sets import prompts
from distilclip.sets.prompts import parse_prompts, prompts_of, read_prompts

TEXT = """# Prompts

Introduction with `classes` in it.

## Pets

```bash
classes = [
    'Abyssinian',
    "colt's foot",
]

templates = [
    'a photo of a "{}".',
]
```

## Faces

```bash
classes = [['happy', 'smiling'], ['sad']]
templates = ['they look {}.', 'a {} face.']
```
"""


def test_lists_are_read_as_python_literals() -> None:
    found = parse_prompts(TEXT, source="test")
    assert list(found) == ["Pets", "Faces"]
    assert found["Pets"].classes == ("Abyssinian", "colt's foot")
    assert found["Pets"].templates == ('a photo of a "{}".',)
    assert found["Faces"].classes == (("happy", "smiling"), ("sad",))


def test_anything_but_a_literal_is_not_run() -> None:
    with pytest.raises(ValueError, match="malformed node"):
        parse_prompts("## X\n```\nclasses = [open('/etc/passwd')]\ntemplates = []\n```\n", source="test")


def test_missing_list_is_named() -> None:
    with pytest.raises(InputError, match="'X' lacks"):
        parse_prompts("## X\n```\nclasses = []\n```\n", source="test")


def test_edited_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.md").write_text(TEXT)
    with pytest.raises(InputError, match="edited, or cut"):
        read_prompts(str(tmp_path / "prompts.md"))
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(str(tmp_path / "absent.md"))


def test_set_is_found_by_name_with_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.md").write_text(TEXT)
    monkeypatch.setattr(prompts, "SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    assert prompts_of(str(tmp_path / "prompts.md"), "Faces").templates[0] == "they look {}."
    with pytest.raises(InputError, match="Did you mean 'Pets'"):
        prompts_of(str(tmp_path / "prompts.md"), "Pet")
