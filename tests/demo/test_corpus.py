"""The corpus: laid out like the manual, the same every time, and silent about what is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from spqr_numba.demo import corpus

PAGE = '''
"""A module."""

class Jar(dict):
    """Holds things."""

    def put(self, thing, *, gently=True):
        """Put a thing into the jar."""

    def undocumented(self): ...

def undocumented():
    def inner(a): "Has a docstring."
'''

RAISE = """\
The "raise" statement
*********************

If no expressions are present, "raise" re-raises the exception being handled."""

EXPECTED = """\
jars
****

A module.

class jars.Jar(dict)

   Holds things.

jars.Jar.put(self, thing, *, gently=True)

   Put a thing into the jar.

jars.undocumented.inner(a)

   Has a docstring."""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the standard library, beside a manual of two topics."""
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpus, "topics", {"raise": RAISE, "while": "While\n*****"})
    return tmp_path


def pages() -> list[str]:
    """What the library adds to the manual."""
    manual, *added = corpus.training_documents()
    assert manual == "While\n*****"
    return added


def test_a_page_is_laid_out_like_an_entry_of_the_manual(library: Path) -> None:
    (library / "jars.py").write_text(PAGE)
    assert pages() == [EXPECTED]


def test_pages_come_in_order_of_name(library: Path) -> None:
    for name in ("b", "a", "c"):
        (library / f"{name}.py").write_text(f'"""Module {name}."""')
    assert [page[0] for page in pages()] == ["a", "b", "c"]


def test_a_package_is_named_for_its_folder(library: Path) -> None:
    (library / "jars").mkdir()
    (library / "jars" / "__init__.py").write_text('"""A package."""')
    assert pages() == ["jars\n****\n\nA package."]


@pytest.mark.parametrize(
    "name", ["test/a.py", "site-packages/a.py", "email/tests/a.py", "a.txt"], ids=str
)
def test_tests_and_installed_packages_are_no_part_of_it(library: Path, name: str) -> None:
    (library / name).parent.mkdir(parents=True, exist_ok=True)
    (library / name).write_text('"""A module."""')
    assert pages() == []


@pytest.mark.parametrize("source", [b"", b"x = 1", b"print 'old'", b'"""\xff"""', b"\0"], ids=repr)
def test_a_source_without_docstrings_or_sense_is_passed_over(library: Path, source: bytes) -> None:
    (library / "a.py").write_bytes(source)
    assert pages() == []


def test_a_telling_paragraph_is_kept_once_and_a_short_one_always(library: Path) -> None:
    telling = "A paragraph long enough to recognise the text it stands in."
    for name in ("a", "b"):
        (library / f"{name}.py").write_text(f'"""{telling}\n\nFor example:"""')
    assert [telling in page for page in pages()] == [True, False]
    assert all("For example:" in page for page in pages())


def test_a_docstring_that_repeats_a_held_out_topic_loses_it(library: Path) -> None:
    about, paragraph = "About errors.", RAISE.splitlines()[-1]
    (library / "a.py").write_text(f'"""{about}\n\n{paragraph}"""')
    assert pages() == [f"a\n*\n\n{about}"]


def test_held_out_topics_exist_and_are_about_a_tenth_of_the_manual() -> None:
    assert set(corpus.HELD_OUT_TOPICS) <= set(corpus.topics)
    share = len(corpus.held_out_text()) / sum(map(len, corpus.topics.values()))
    assert 0.08 < share < 0.13


@pytest.mark.slow
def test_training_text_repeats_no_held_out_paragraph() -> None:
    training = {corpus._normal(p) for p in corpus.training_text().split("\n\n")}
    held_out = {corpus._normal(p) for p in corpus.held_out_text().split("\n\n")}
    assert len(training) > 10_000
    assert max(map(len, training & held_out), default=0) < corpus.SHORTEST_TELLING_PARAGRAPH
