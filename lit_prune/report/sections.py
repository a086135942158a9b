"""The sections of the report page, each registered where it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lit_prune.registry import Registry

if TYPE_CHECKING:  # those modules register their sections here
    from lit_prune.report.drawing import Picture
    from lit_prune.report.run_folder import RunFolder
    from lit_prune.report.tables import Table, Text

Build = TypeVar("Build", bound="Callable[[RunFolder], Picture | Table | Text]")


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        key: anchor, and file name of its figure.
        title: heading.
        place: sections stand on the page in ascending order of it.
        build: fills the section from a run folder; raises `AbsentInput` where the run does not have what it needs.
    """

    key: str
    title: str
    place: int
    build: Callable[[RunFolder], Picture | Table | Text]


GROUPS = (
    (0, "Is it good?"),
    (45, "How it was trained, and what its channels are for"),
    (95, "What the lab found"),
    (320, "Can it be trusted?"),
)
"""Questions that sections answer, each from a place on."""


def question_of(place: int) -> str:
    """The question that a section at this place answers.

    >>> question_of(330)
    'Can it be trusted?'
    """
    return next(title for begin, title in reversed(GROUPS) if place >= begin)


SECTIONS: Registry[Section] = Registry("section")


def register_section(key: str, title: str, place: int) -> Callable[[Build], Build]:
    """Puts the decorated function on the page; see `Section`."""

    def register(build: Build) -> Build:
        SECTIONS.add(key, Section(key, title, place, build), build)
        return build

    return register


def sections() -> list[Section]:
    """The sections registered so far, from top to bottom."""
    return sorted(SECTIONS.values(), key=lambda section: section.place)
