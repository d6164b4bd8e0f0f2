"""The machine's lease on life: who is not kept alive in time shuts down, whatever happened to its driver.

Pure: every function takes ``now``, in seconds of any clock that never goes back. Which clock it is decides about
suspended computers. ``time.monotonic()``, which the supervisor passes, stands still while the computer sleeps
(CLOCK_MONOTONIC on Linux, mach_absolute_time on macOS), and that is what we want: a laptop's local machines sleep
together with their driver, and must not find their lease gone at the moment they wake up, before the driver had a
chance to renew it. Machines elsewhere do not sleep; theirs lapses while the driver's laptop is shut, as we want, too.
"""

from __future__ import annotations


class Watchdog:
    """A lease. Until the first `renew` it lasts `first` seconds (the driver may be slow to come), then as each says."""

    def __init__(self, now: float, lease: float, first: float) -> None:
        """`lease`: seconds that a renewal lasts, unless it says otherwise."""
        self._lease = lease
        self._granted = first
        self._since = now
        self._contacted = False

    def renew(self, now: float, lease: float | None = None) -> None:
        """The driver was here; it will be here again within `lease` seconds. A shorter lease replaces a longer one."""
        self._contacted = True
        self._since = now
        self._granted = self._lease if lease is None else lease

    def remaining(self, now: float) -> float:
        """Seconds until the lease lapses; 0 where it has."""
        return max(0.0, self._since + self._granted - now)

    def expired(self, now: float) -> str | None:
        """Why the machine must stop; None where it need not. A renewal that comes before anybody looks still counts."""
        if self.remaining(now) > 0:
            return None
        if self._contacted:
            return f"no keepalive from the driver for {now - self._since:.1f} s (the lease was {self._granted:g} s)"
        return f"never contacted by a driver within {self._granted:g} s of its start"
