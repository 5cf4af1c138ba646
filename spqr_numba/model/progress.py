"""How far long work is: a bar that shows one stage after another, each with steps of its own.

A tqdm is such a bar. A stage that is begun takes its time anew, so that what is left is told by the
pace of that stage alone.
"""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Progress", "Silent", "begin"]


class Progress(Protocol):
    """What is asked of a bar, in tqdm's words."""

    def set_description_str(self, desc: str, refresh: bool = True) -> Any:
        """The stage."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> Any:
        """What is being done now."""

    def reset(self, total: int) -> Any:
        """No step is done, of so many."""

    def update(self, n: int = 1) -> Any:
        """`n` more steps are done; fewer than 0 are to be done again."""


class Silent:
    """No bar."""

    def set_description_str(self, desc: str, refresh: bool = True) -> None:
        """Nothing to show."""

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Nothing to show."""

    def reset(self, total: int) -> None:
        """Nothing to show."""

    def update(self, n: int = 1) -> None:
        """Nothing to show."""


def begin(progress: Progress, stage: str, steps: int) -> None:
    """A stage of so many steps begins."""
    progress.set_description_str(stage, refresh=False)
    progress.set_postfix_str("", refresh=False)
    progress.reset(steps)
