"""The states of a machine, and the one table that says how they follow each other.

Rule 1: states only move forward. Rule 2: ``STOPPED`` is final and may be reached from every other state. Rule 3: an
illegal move raises ``IllegalTransition`` with the machine's history, and changes nothing.
"""

from __future__ import annotations

import enum

from .errors import IllegalTransition


class State(enum.IntEnum):
    """Ordered: ``machine.wait(State.RUNNING)`` waits until the state is RUNNING *or later*."""

    UNSTARTED = 0
    STARTING = 1
    RUNNING = 2
    STOPPED = 3

    def __str__(self) -> str:
        return self.name


TRANSITIONS: dict[State, frozenset[State]] = {
    State.UNSTARTED: frozenset({State.STARTING, State.STOPPED}),
    State.STARTING: frozenset({State.RUNNING, State.STOPPED}),
    State.RUNNING: frozenset({State.STOPPED}),
    State.STOPPED: frozenset(),
}


class History:
    """The states that one machine went through, oldest first. Not synchronised: its owner holds a lock."""

    def __init__(self, machine: str, first: State = State.UNSTARTED) -> None:
        self._machine = machine
        self._states = [first]

    @property
    def state(self) -> State:
        return self._states[-1]

    def move(self, to: State) -> None:
        """Go to `to`. Raises `IllegalTransition` where the table has no such move."""
        if to not in TRANSITIONS[self.state]:
            raise IllegalTransition(self._machine, [str(state) for state in self._states], str(to))
        self._states.append(to)
