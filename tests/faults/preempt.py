"""Sends SIGTERM or SIGUSR1 to one rank of runs, in every phase: `preempt.py --times 5`.

Every run must save the step that it has finished and end well, within 20 seconds, and the same
command must end with the weights of a run that nobody stopped. Exit status 0 only if all do.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from jobs import Job, Strike, Undisturbed, differing

from scale_smog.runtime import phases

MOST_S = 20.0
# At which occurrence of a phase, and how many seconds into it at most.
WHERE = {
    phases.START: (1, 1.0),
    phases.STEP: (12, 0.0),
    phases.KMEANS: (3, 0.0),
    phases.EVALUATION: (2, 0.1),
    phases.SAVING: (5, 0.02),
}


@dataclass
class Outcome:
    """What a stopped run came to."""

    strike: Strike
    codes: list[int | None]
    saved_step: int | None
    num_lost_steps: int
    seconds: float  # from the signal to the end of the last rank
    different: list[str]  # tensors that do not have the other run's bits after going on

    @property
    def is_good(self) -> bool:
        return (
            not any(self.codes)
            and self.saved_step is not None
            and self.num_lost_steps == 0
            and not self.different
        )


def draw(rng: random.Random, phase: str) -> Strike:
    """A random rank and signal; a random occurrence of the phase."""
    num, longest_s = WHERE[phase]
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
    delay_s = rng.uniform(0.0, longest_s)
    return Strike(number, rng.randrange(2), phase, rng.randint(1, num), delay_s)


def stop_and_go_on(job: Job, strike: Strike, whole: dict[str, torch.Tensor]) -> Outcome | None:
    """A stopped run, and the same command again; None if the signal came too late."""
    job.clear()
    codes = job.run(strike)
    seconds = time.time() - (job.struck_at() or 0.0)
    if job.struck_at() is None or job.logged_step() == job.saved_step() == 12:
        return None
    saved, lost = job.saved_step(), job.logged_step() - (job.saved_step() or 0)
    again = job.run()
    different = differing(job.final_state(), whole) if not any(again) else [f"exits {again}"]
    return Outcome(strike, codes, saved, lost, seconds, different)


def outcomes(
    folder: Path, whole: Undisturbed, seed: int, phase_names: list[str], num_times: int
) -> Iterator[Outcome]:
    """Stopped runs, `num_times` in each phase."""
    rng = random.Random(seed)
    for phase in phase_names:
        num_left = num_times
        while num_left:
            job = Job(folder / "stopped", whole.data)
            outcome = stop_and_go_on(job, draw(rng, phase), whole.state)
            num_left -= outcome is not None
            if outcome is not None:
                yield outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", type=int, default=5, help="in each phase")
    arguments = parser.parse_args()
    every = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Undisturbed.trained(Path(folder))
        where = (arguments.seed, list(WHERE), arguments.times)
        for outcome in outcomes(Path(folder), whole, *where):
            strike = outcome.strike
            print(
                f"{signal.Signals(strike.number).name} to rank {strike.rank} in {strike.phase} "
                f"{strike.occurrence}: saved step {outcome.saved_step}, "
                f"{outcome.num_lost_steps} steps lost, {outcome.seconds:.1f} s to exit"
                f"{'' if outcome.is_good else f'  NOT GOOD: {outcome}'}",
                flush=True,
            )
            every.append(outcome)
    num_saved = sum(outcome.saved_step is not None for outcome in every)
    print(f"saved: {num_saved} of {len(every)}")
    print(f"steps lost: {sum(outcome.num_lost_steps for outcome in every)}")
    slowest_s = max(outcome.seconds for outcome in every)
    print(f"seconds to exit, worst: {slowest_s:.1f}")
    raise SystemExit(slowest_s > MOST_S or not all(outcome.is_good for outcome in every))


if __name__ == "__main__":
    main()
