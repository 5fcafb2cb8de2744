"""Kills random ranks at random instants and starts them again: `fault_campaign.py --kills 50`.

Every run must end with the weights of a run that nobody disturbed, to the bit. Exit status 0 only
if all do. The same seed strikes at the same instants, as far as a machine repeats itself.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from jobs import Job, Strike, Undisturbed, differing

from scale_smog.runtime import phases

# Where to strike, how often, and how many seconds later at most; the rest at any time at all.
AIMED = {
    phases.KMEANS: (0.15, 3, 0.02),
    phases.SAVING: (0.30, 5, 0.15),
    phases.EVALUATION: (0.10, 2, 0.2),
}


@dataclass
class Outcome:
    """What a killed run came to."""

    strike: Strike
    num_lost_steps: int  # done, and not in the checkpoint that the run went on from
    is_wrong_load: bool  # it went on from another checkpoint than the newest whole one
    different: list[str]  # tensors that do not have the undisturbed run's bits
    seconds: float  # from the second start to the end

    @property
    def is_good(self) -> bool:
        return not self.is_wrong_load and not self.different


def draw(rng: random.Random, world_size: int, duration_s: float) -> Strike:
    """A random rank, and a random instant of a run that takes `duration_s`."""
    rank, dice = rng.randrange(world_size), rng.random()
    for phase, (share, num, longest_s) in AIMED.items():
        if dice < share:
            delay_s = rng.uniform(0, longest_s)
            return Strike(signal.SIGKILL, rank, phase, rng.randint(1, num), delay_s)
        dice -= share
    return Strike(signal.SIGKILL, rank, phases.START, 1, rng.uniform(0, duration_s))


def strike_and_go_on(job: Job, strike: Strike, whole: dict[str, torch.Tensor]) -> Outcome | None:
    """One killed run to its end; None if the strike came too late."""
    job.clear()
    job.run(strike)
    if job.struck_at() is None:
        return None
    saved, logged, before = job.saved_step(), job.logged_step(), len(job.resumed_steps())
    start = time.monotonic()
    codes = job.run()
    seconds = time.monotonic() - start
    if any(codes):
        return Outcome(strike, 0, False, [f"exit codes {codes}: {job.console()[-2000:]}"], seconds)
    resumed = job.resumed_steps()[before:]
    went_on_from = resumed[0] if resumed else (job.saved_step() if saved == logged == 12 else 0)
    return Outcome(
        strike,
        logged - (saved or 0),
        went_on_from != (saved or 0),
        differing(job.final_state(), whole),
        seconds,
    )


def campaign(folder: Path, whole: Undisturbed, seed: int, num_kills: int) -> list[Outcome]:
    """`num_kills` killed runs, one after another."""
    rng, outcomes = random.Random(seed), []
    while len(outcomes) < num_kills:
        job = Job(folder / "killed", whole.data, world_size=whole.world_size)
        strike = draw(rng, whole.world_size, whole.seconds)
        outcome = strike_and_go_on(job, strike, whole.state)
        if outcome is not None:
            outcomes.append(outcome)
            _say(len(outcomes), outcome)
    return outcomes


def _say(number: int, outcome: Outcome) -> None:
    strike = outcome.strike
    when = f"{strike.delay_s:.3f} s into {strike.phase} {strike.occurrence}"
    outcome_text = "same bits" if outcome.is_good else f"NOT GOOD: {outcome}"
    lost = f"{outcome.num_lost_steps} steps lost"
    print(f"{number:3}  rank {strike.rank}, {when:<30} {lost}, {outcome_text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = Undisturbed.trained(Path(folder), arguments.ranks)
        outcomes = campaign(Path(folder), whole, arguments.seed, arguments.kills)
    lost = [outcome.num_lost_steps for outcome in outcomes]
    num_good = sum(outcome.is_good for outcome in outcomes)
    print(f"runs that end with the undisturbed run's bits: {num_good} of {len(outcomes)}")
    print(f"wrong or partial loads: {sum(outcome.is_wrong_load for outcome in outcomes)}")
    print(f"steps lost: median {median(lost):g}, worst {max(lost)} (a checkpoint every 2)")
    seconds = median(outcome.seconds for outcome in outcomes)
    print(f"seconds from the second start to the end: median {seconds:.1f}")
    raise SystemExit(num_good != len(outcomes))


if __name__ == "__main__":
    main()
