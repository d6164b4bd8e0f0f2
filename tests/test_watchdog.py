"""The lease: pure, so every test says what time it is."""

from __future__ import annotations

from bigmachine.supervisor.watchdog import Watchdog


def test_lives_until_the_first_lease_is_over() -> None:
    watchdog = Watchdog(now=100.0, lease=10.0, first=60.0)
    assert watchdog.expired(159.9) is None
    assert watchdog.remaining(130.0) == 30.0


def test_says_that_nobody_ever_came() -> None:
    watchdog = Watchdog(now=100.0, lease=10.0, first=60.0)
    assert watchdog.expired(160.0) == "never contacted by a driver within 60 s of its start"


def test_renewal_replaces_the_first_lease() -> None:
    watchdog = Watchdog(now=0.0, lease=10.0, first=60.0)
    watchdog.renew(now=5.0)
    assert watchdog.remaining(5.0) == 10.0
    assert watchdog.expired(14.9) is None
    assert watchdog.expired(15.5) == "no keepalive from the driver for 10.5 s (the lease was 10 s)"


def test_renewal_may_name_its_own_lease() -> None:
    watchdog = Watchdog(now=0.0, lease=10.0, first=60.0)
    watchdog.renew(now=1.0, lease=100.0)
    watchdog.renew(now=2.0, lease=3.0)
    assert watchdog.remaining(2.0) == 3.0
    assert watchdog.expired(5.0) is not None


def test_late_renewal_counts_while_nobody_has_looked() -> None:
    watchdog = Watchdog(now=0.0, lease=10.0, first=1.0)
    watchdog.renew(now=50.0)
    assert watchdog.expired(51.0) is None


def test_nothing_remains_after_the_end() -> None:
    assert Watchdog(now=0.0, lease=1.0, first=1.0).remaining(5.0) == 0.0
