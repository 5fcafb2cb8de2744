"""Runs that lose a rank, are told to stop, or hang: short versions of the programs beside this."""

import re
import signal
import time

import fault_campaign
import preempt
import pytest
from jobs import OVERRIDES, PATIENCE_S, Job, Strike, Undisturbed

from scale_smog.runtime import phases, watchdog
from scale_smog.runtime.watchdog import Heartbeat, diagnose


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What every disturbed run must end with."""
    return Undisturbed.trained(tmp_path_factory.mktemp("whole"))


def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(tmp_path, whole):
    outcomes = fault_campaign.campaign(tmp_path, whole, seed=7, num_kills=2)
    assert [outcome for outcome in outcomes if not outcome.is_good] == []


def test_a_signal_to_one_rank_saves_the_step_and_ends_well(tmp_path, whole):
    where = [phases.START, phases.KMEANS, phases.SAVING]
    outcomes = list(preempt.outcomes(tmp_path, whole, 3, where, num_times=1))
    assert len(outcomes) == 3 and [o for o in outcomes if not o.is_good] == []


DEADLINE_S = 48  # the rank that is late looks after an eighth of it, its mates beat every 2.5 s
WARNED_DEADLINE_S = 20  # leaves time for two looks at the heartbeats before it


def cluster_slowly(rank: int) -> None:
    """k-means takes seconds, as it does on many features; monitors look often."""
    del rank
    watchdog.WARN_AFTER_S = 1.5
    phases.on_check.append(lambda: time.sleep(1.5 * (phases.current() == phases.KMEANS)))


@pytest.mark.parametrize("phase", [phases.STEP, phases.KMEANS])
def test_a_stopped_rank_is_named_within_the_deadline(tmp_path, tars, phase):
    keys = ("start_s", "data_s", "step_s", "kmeans_s", "saving_s")
    limits = [f"deadlines.{key}={WARNED_DEADLINE_S if key != 'start_s' else 60}" for key in keys]
    job = Job(tmp_path, tars, (*OVERRIDES, *limits), hook=cluster_slowly)
    is_kmeans = phase == phases.KMEANS
    job.start(Strike(signal.SIGSTOP, 1, phase, 1 if is_kmeans else 3, 1.2 * is_kmeans))
    codes = job.wait(grace_s=1)
    assert codes == [3, None]  # rank 1 had to be ended from outside
    said = re.search(
        rf"error: deadlines\.\w+_s={WARNED_DEADLINE_S} has passed: no heartbeat from rank 1 on "
        r"\S+, last seen in phase '(\S+)'",
        job.console(),
    )
    assert said and (said.group(1) == phase or not is_kmeans)
    warned = job.console().find("warning: no heartbeat from rank 1 on ")
    assert -1 < warned < said.start()
    ended = (tmp_path / "rank-0.log").stat().st_mtime
    assert ended - (job.struck_at() or 0.0) <= WARNED_DEADLINE_S


def hang_in_the_loader(rank: int) -> None:
    """Rank 0's third batch never comes, though the rank is alive; rank 1 has the least patience."""
    from scale_smog.reporting.progress import StepClock

    watchdog.MIN_SHARE = 4.0  # no rank has much of a core: heartbeats come every 2.5 s
    real_next, num_calls = StepClock.next, 0
    timeout = watchdog.Watchdog._timeout

    def next_or_hang(clock: StepClock, batches: object) -> object:
        nonlocal num_calls
        num_calls += 1
        while rank == 0 and num_calls == 3:
            time.sleep(1)
        return real_next(clock, batches)

    def timeout_of_rank(dog: watchdog.Watchdog) -> tuple[str, int]:
        key, seconds = timeout(dog)
        return key, DEADLINE_S if rank == 1 and num_calls == 3 else seconds

    StepClock.next = next_or_hang  # pyright: ignore
    watchdog.Watchdog._timeout = timeout_of_rank


def test_the_first_rank_to_time_out_names_one_that_hangs_alive(tmp_path, tars):
    limits = [f"deadlines.{key}={10 * DEADLINE_S}" for key in ("data_s", "step_s")]
    job = Job(tmp_path, tars, (*OVERRIDES, *limits), hook=hang_in_the_loader)
    assert 3 in job.run()
    assert re.search(r"the others wait for rank 0 on \S+ in phase 'data'", job.console(1))
    assert "deadlines" not in job.console(0)


def test_a_killed_rank_is_named_by_the_others(tmp_path, tars):
    job = Job(tmp_path, tars)
    job.start(Strike(signal.SIGKILL, 1, phases.STEP, 3))
    assert job.wait(grace_s=PATIENCE_S) == [1, -signal.SIGKILL]
    assert re.search(r"error: no heartbeat from rank 1 on \S+, last seen", job.console())


def test_the_diagnosis_names_who_is_behind():
    a, b = Heartbeat("a", phases.STEP, 9, 1), Heartbeat("b", phases.DATA, 8, 1)
    assert diagnose([a, b, a], []) == "the others wait for rank 1 on b in phase 'data'"
    lost = diagnose([a, b, a], [2])
    assert lost.startswith("no heartbeat from rank 2 on a, last seen in phase 'step'")
    assert diagnose([a, a], []).startswith("all ranks are alive in phase 'step'")
