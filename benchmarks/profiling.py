"""What a profile costs, and what it costs not to take one.

The loop's step as it is against the same step before any profile, and while one is taken. Beside
it: how far the parts are from the step that a clock outside measures.
"""

import time

import torch
from compare import claim, interleaved, parse_arguments
from step import Ours, one_rank, step_recipe, turn

from scale_smog.loop import train_step
from scale_smog.profiling.step_profile import Timeline, timed
from scale_smog.throughput import FIXED_VALUES, timed_methods

LIMIT_OFF, LIMIT_SUM = 0.99, 0.97


def main() -> None:
    """Prints the times and the claims."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    batch, px = (4, 32) if arguments.quick else (16, 64)
    recipe = step_recipe(batch, px, 1, model={"backbone": "resnet18"})
    with one_rank():
        untouched, profiled = Ours(recipe, device), Ours(recipe, device)
        timeline = Timeline(device)

        run = turn(profiled)

        def while_profiled() -> None:
            with timed(timeline, timed_methods(profiled.state)), timeline.step():
                run()

        while_profiled()  # before the measurement: what a profile leaves behind is then in it
        seconds = interleaved(
            {
                "never profiled": turn(untouched),
                "after a profile": turn(profiled),
                "while profiled": while_profiled,
            },
            arguments.repeats * 4,
        )
        sums = _sum_against_clock(profiled)
    never, after, during = seconds.values()
    claim("speed while profiled as a share of never profiled", 1 / during, 1 / never,
          higher_is_better=True)  # fmt: skip
    claim(f"sum of the parts as a share of the step by a clock outside (at least {LIMIT_SUM})",
          sums[0], sums[1], higher_is_better=True)  # fmt: skip
    claim(f"speed after a profile as a share of never profiled (at least {LIMIT_OFF})",
          1 / after, 1 / never, higher_is_better=True)  # fmt: skip


def _sum_against_clock(ours: Ours) -> tuple[float, float]:
    timeline, clock = Timeline(ours.device), 0.0
    with timed(timeline, timed_methods(ours.state)):
        for _ in range(5):
            start = time.perf_counter()
            with timeline.step():
                train_step(ours.state, ours.batch, FIXED_VALUES)
            clock += time.perf_counter() - start
    return sum(sum(step.values()) for step in timeline.durations()), clock


if __name__ == "__main__":
    main()
