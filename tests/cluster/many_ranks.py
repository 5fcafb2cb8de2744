"""The real pre-training on many gloo ranks of a machine: `many_ranks.py --ranks 64 --per-node 8`.

Ranks are forked from one process (forked_ranks.py), on pretended nodes; views are synthetic. The
last line says the outcome, and the exit status is 0 only if it is good. Scenarios:

start: what a start costs in seconds, messages to the store, files and sockets.
train: over two resets and three checkpoints to the last evaluation; all but pictures is written.
equal: the same images as one rank, under ZeRO as DDP; then groups, bank and k-means to the bit
(equal_ranks.py).
kill, stop, term: a rank gets SIGKILL, SIGSTOP or SIGTERM in training; it is named, or all save; the
same command goes on to the end.
elastic: the same run goes on with three quarters and half of the ranks, one, and all again.
evaluate: train, then kNN, linear classifier and groups as programs on all ranks.
straggler: no rank is named on loaded cores, until one sleeps in every step.
skip: a rank leaves out an all-reduce; it is named, with the collective and its number.
late: a rank comes 20 s after the others.
version, dataset: a rank has another version of a package, or another dataset; it is named.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
import equal_ranks
from forked_ranks import ForkedRanks, OutOfMemory, preload
from images import make_dataset
from pictures import draw_none
from small_recipe import write_small_recipe

if TYPE_CHECKING:
    import torch

STEPS, RESET_EVERY, CHECKPOINT_EVERY = 14, 6, 5
DEADLINE_S = 60
# Where neither the batch norm nor the evaluation is what is looked at.
SHORT = (
    "model.batch_norm=local",
    "evaluation.num_train_images=16",
    "evaluation.num_test_images=16",
)
TIMEOUT_S = 1800.0
LATE_S = 20.0


class Campaign:
    """What all scenarios share.

    Args:
        folder: for everything.
        ranks: number of ranks.
        per_node: ranks of a node.
        engine: a kind of engine.
        batch: images of a step over all ranks.
    """

    def __init__(self, folder: Path, ranks: int, per_node: int, engine: str, batch: int):
        self.folder, self.ranks, self.per_node = folder, ranks, per_node
        self.engine, self.batch = engine, batch
        self.data = make_dataset(folder / "data", num_images=80)
        self.run_dir = folder / "run"
        self.facts: list[str] = []  # of the last line
        self.seconds, self.peak_gib = 0.0, 0.0

    def overrides(self, *more: str) -> list[str]:
        """Of the small recipe."""
        return [
            *(f"run.dir={self.run_dir}", f"run.steps={STEPS}", "run.log_every=2"),
            *(f"run.checkpoint_every={CHECKPOINT_EVERY}", "data.loader=synthetic"),
            *(f"data.global_batch={self.batch}", f"grouping.reset_every={RESET_EVERY}"),
            *("data.workers=8", f"engine.kind={self.engine}"),
            *more,
        ]

    def pretrain(self, *overrides: str, before: Callable[[int], object] | None = None):
        """What a rank does that trains.

        Args:
            overrides: more of them.
            before: called with the rank's number, before anything else.
        """
        path = write_small_recipe(self.folder, self.data)

        def work(rank: int) -> None:
            from scale_smog import distributed, load_recipe
            from scale_smog.errors import exits_on_user_error
            from scale_smog.pretrain import pretrain

            draw_none()
            if before is not None:
                before(rank)
            with exits_on_user_error():
                pretrain(load_recipe(path, self.overrides(*overrides)))
            distributed.end_process()

        return work

    def job(
        self, work: Callable[[int], object], ranks: int | None = None, counted: bool = False
    ) -> ForkedRanks:
        """A job that has been started, its consoles empty."""
        shutil.rmtree(self.folder / "consoles", ignore_errors=True)
        ranks = ranks or self.ranks
        job = ForkedRanks(self.folder / "consoles", ranks, min(self.per_node, ranks), work)
        job.start(counted)
        return job

    def finish(self, job: ForkedRanks) -> list[int]:
        """Exit codes in rank order."""
        codes = job.wait(TIMEOUT_S)
        self.seconds += job.seconds
        self.peak_gib = max(self.peak_gib, job.peak_gib)
        return [codes[rank] for rank in sorted(codes)]

    def train(self, *overrides: str, ranks: int | None = None) -> bool:
        """The run to its end, or on to it."""
        job = self.job(self.pretrain(*overrides), ranks)
        codes = self.finish(job)
        if any(codes):
            print(f"exit codes {codes}\n{job.said()[-6000:]}", flush=True)
        return not any(codes)

    def logged(self) -> list[dict[str, float]]:
        """The whole lines of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def checkpoints(self) -> list[str]:
        """Names of the whole ones."""
        from scale_smog.checkpoint.manifest import find_damage, list_checkpoints

        folders = list_checkpoints(self.run_dir)
        return [folder.name for folder in folders if find_damage(folder) is None]

    def is_complete(self) -> bool:
        """Whether the run has reached its end with its evaluation."""
        results = self.run_dir / "results.json"
        has_results = results.exists() and "knn" in json.loads(results.read_text())
        last = self.logged()[-1]["step"] if self.logged() else 0
        return has_results and last == STEPS and self.checkpoints()[-1:] == [f"step-{STEPS:08d}"]


def train(campaign: Campaign) -> bool:
    """To the end, with everything written."""
    # `equal` looks at statistics of all ranks: their many small sums, each of 126 messages in a
    # row among 64 ranks, would be more than half of the run.
    is_good = campaign.train("model.batch_norm=node") and campaign.is_complete()
    num_resets = (STEPS - 1) // RESET_EVERY
    campaign.facts.append(f"{STEPS} steps, {num_resets} resets")
    campaign.facts.append(f"{len(campaign.checkpoints())} checkpoints")
    return is_good and len(campaign.checkpoints()) == 3


def equal(campaign: Campaign) -> bool:
    """Groups and bank of given features are one rank's to the bit; nets within rounding."""
    precision = equal_ranks.precision_of(campaign.engine)
    images = [f"engine.precision={precision}", "data.loader=torch", "data.workers=0"]
    images += ["run.steps=4", "grouping.reset_every=2", "run.checkpoint_every=0", *SHORT]
    # AdamW would make steps of any size of what rounding leaves of a gradient.
    images += ["model.batch_norm=global", "optimizer.name=sgd", "optimizer.base_lr=0.05"]
    other = campaign.folder / "other"
    # In fp32 four steps make a thousandth of what rounding leaves of three images a rank, under
    # DDP too: ZeRO is held to DDP on as many ranks, and that in fp64 to one rank.
    ranks = campaign.ranks if precision == "fp32" else 1
    is_good = campaign.train(*images)
    is_good &= campaign.train(*images, f"run.dir={other}", "engine.kind=ddp", ranks=ranks)
    if not is_good:
        return False
    found = equal_ranks.differences(campaign.run_dir, other)
    campaign.facts.append(f"beside {ranks} rank(s) of ddp")
    campaign.facts.append(precision + " " + ", ".join(f"{k} {v:.0e}" for k, v in found.items()))
    outcomes = []
    for ranks in (campaign.ranks, 1):
        outcomes.append(campaign.folder / f"outcome-{len(outcomes)}.pt")
        job = campaign.job(equal_ranks.group_features(campaign.run_dir, outcomes[-1]), ranks)
        if any(codes := campaign.finish(job)):
            print(f"exit codes {codes}\n{job.said()[-4000:]}", flush=True)
            return False
    num_tensors, different = equal_ranks.unequal(*outcomes)
    num_equal = num_tensors - len(different)
    campaign.facts += [f"{num_equal} of {num_tensors} tensors equal to the bit", *different]
    most = max(found["groups"], found["bank"])
    return not different and most <= equal_ranks.TOLERANCE[precision]


def strike(campaign: Campaign, number: int, *overrides: str) -> tuple[list[int], str, float]:
    """Signals a rank in training; exit codes, consoles and seconds until the end."""
    deadlines = [f"deadlines.{key}={DEADLINE_S}" for key in ("data_s", "step_s", "kmeans_s")]
    job = campaign.job(campaign.pretrain(*SHORT, *deadlines, *overrides))
    while job.poll() and len(campaign.logged()) < 2:
        time.sleep(0.05)
    victim = campaign.ranks // 2 + 1
    start = time.time()
    os.kill(job.pids[victim], number)
    codes = campaign.finish(job)
    ended = max(log.stat().st_mtime for log in job.folder.glob("console-*.log"))
    said = job.said()
    name = f"rank {victim} on node-{victim // campaign.per_node}"
    campaign.facts.append(f"{name} {signal.Signals(number).name} after step {last_step(campaign)}")
    return codes, said.replace(name, "THE VICTIM"), ended - start


def last_step(campaign: Campaign) -> int:
    logged = campaign.logged()
    return int(logged[-1]["step"]) if logged else 0


def kill(campaign: Campaign) -> bool:
    """A killed rank is named, and the same command goes on to the end."""
    codes, said, seconds = strike(campaign, signal.SIGKILL)
    is_named = "no heartbeat from THE VICTIM" in said
    if not is_named:
        print(said[-6000:])
    campaign.facts.append(f"named {is_named} {seconds:.0f} s later")
    return is_named and all(codes) and campaign.train(*SHORT) and campaign.is_complete()


def stop(campaign: Campaign) -> bool:
    """A stopped rank is named within the deadline, and the same command goes on to the end."""
    codes, said, seconds = strike(campaign, signal.SIGSTOP)
    found = re.search(r"deadlines\.(\w+)=\d+ has passed: no heartbeat from THE VICTIM", said)
    campaign.facts.append(f"named by {found and found.group(1)}, all ended {seconds:.0f} s later")
    # Ranks time out seconds apart: where the end of the first breaks a collective, the status is 1.
    is_named = found is not None and seconds < DEADLINE_S + 10
    is_good = is_named and 3 in codes and sum(code in (1, 3) for code in codes) == len(codes) - 1
    if not is_good:
        errors = [line for line in said.splitlines() if line.startswith(("error", "warning"))]
        print(f"exit codes {codes}", *errors, sep="\n", flush=True)
    return is_good and campaign.train(*SHORT) and campaign.is_complete()


def term(campaign: Campaign) -> bool:
    """A signal to one rank stops all of them, saved, and the same command goes on to the end."""
    codes, _, seconds = strike(campaign, signal.SIGTERM)
    saved, logged = campaign.checkpoints()[-1:], last_step(campaign)
    campaign.facts.append(f"all saved {saved} and ended {seconds:.0f} s later")
    is_saved = bool(saved) and int(saved[0].removeprefix("step-")) >= logged
    return not any(codes) and is_saved and campaign.train(*SHORT) and campaign.is_complete()


def elastic(campaign: Campaign) -> bool:
    """The run goes on with other numbers of ranks; every rank count of it must divide the batch."""
    ranks = campaign.ranks
    counts = [ranks, 3 * ranks // 4, ranks // 2, 1, ranks]
    for number, count in enumerate(counts, start=1):
        steps = STEPS * number // len(counts)
        per_node = campaign.per_node
        campaign.per_node = math.gcd(per_node, count)
        is_good = campaign.train(*SHORT, f"run.steps={steps}", ranks=count)
        campaign.per_node = per_node
        if not is_good or last_step(campaign) != steps:
            return False
    campaign.facts.append(" -> ".join(map(str, counts)))
    return True


def evaluate(campaign: Campaign) -> bool:
    """kNN, the linear classifier and the groups as programs on all ranks."""
    overrides = {"linear": ["linear.epochs=1", f"linear.batch={campaign.ranks}"]}

    def program(name: str) -> Callable[[int], object]:
        def work(rank: int) -> None:
            del rank
            from scale_smog import distributed
            from scale_smog.errors import exits_on_user_error
            from scale_smog.evaluation.groups.program import evaluate_groups
            from scale_smog.evaluation.program import evaluate

            run_dir = [str(campaign.run_dir)]
            with exits_on_user_error():
                if name == "groups":
                    evaluate_groups(run_dir, [])
                else:
                    evaluate(name, run_dir, overrides.get(name, []))
            distributed.end_process()

        return work

    is_good = campaign.train(*SHORT)
    for name in ("knn", "linear", "groups"):
        job = campaign.job(program(name))
        codes = campaign.finish(job)
        if any(codes):
            print(f"{name}: exit codes {codes}\n{job.said()[-6000:]}", flush=True)
            is_good = False
    results = json.loads((campaign.run_dir / "results.json").read_text())
    campaign.facts.append(f"results of {', '.join(sorted(results))}")
    return is_good and {"knn", "linear", "groups"} <= results.keys()


def straggler(campaign: Campaign) -> bool:
    """On loaded cores no rank is named, until one sleeps half a second a step; then it is, once."""
    victim, step_s, num_steps = campaign.ranks // 2 + 1, 0.5, 40

    def before(rank: int) -> None:
        from scale_smog.runtime import phases

        num_left = num_steps

        def sleep_in_a_step(phase: str) -> None:
            nonlocal num_left
            num_left -= phase == phases.DATA  # once a step; after k-means a step is entered again
            if rank == victim and phase == phases.STEP and num_left < 0:
                time.sleep(step_s)

        phases.on_enter.append(sleep_in_a_step)

    overrides = [f"run.steps={num_steps + 16}", "run.log_every=4", "grouping.reset_every=30"]
    overrides += ["run.checkpoint_every=0"]
    job = campaign.job(campaign.pretrain(*SHORT, *overrides, before=before))
    codes, name = campaign.finish(job), f"rank {victim} on node-{victim // campaign.per_node}"
    lines = job.said().splitlines()
    named = [n for n, line in enumerate(lines) if "slower than the other ranks" in line]
    first = next((n for n, line in enumerate(lines) if f"step {num_steps}/" in line), len(lines))
    campaign.facts += [lines[n] for n in named]
    if len(named) == 1:
        windows = sum(line.startswith("step ") for line in lines[first + 1 : named[0]])
        campaign.facts.append(f"after {windows} windows")
    if any(codes):
        print(f"exit codes {codes}\n{job.said()[-4000:]}", flush=True)
    is_good = len(named) == 1 and named[0] > first and name in lines[named[0]]
    return is_good and lines[named[0]].count(" on node-") == 1 and not any(codes)


def skip(campaign: Campaign) -> bool:
    """A rank leaves out an all-reduce: it is named, with the collective and its number."""
    victim = campaign.ranks // 2 + 1

    def before(rank: int) -> None:
        import torch.distributed as dist

        from scale_smog.runtime import phases

        if rank != victim:
            return
        all_reduce, is_next, num_steps = dist.all_reduce, False, 0

        def count(phase: str) -> None:
            nonlocal is_next, num_steps
            num_steps += phase == phases.STEP
            is_next = is_next or (phase == phases.STEP and num_steps == 5)

        def reduce_or_skip(x: "torch.Tensor", *arguments: object, **options: object) -> object:
            nonlocal is_next
            if is_next and x.numel() > 1:
                is_next = False
                print(f"SKIPPED at {time.time()}", flush=True)
                return None
            return all_reduce(x, *arguments, **options)

        phases.on_enter.append(count)
        dist.all_reduce = reduce_or_skip

    deadlines = [f"deadlines.{key}={DEADLINE_S}" for key in ("data_s", "step_s", "kmeans_s")]
    job = campaign.job(campaign.pretrain(*SHORT, *deadlines, before=before))
    codes = campaign.finish(job)
    said, name = job.said(), f"rank {victim} on node-{victim // campaign.per_node}"
    pattern = rf"{name} (began|did not begin) .* as collective \d+ of process group \S+"
    found = re.search(pattern, said)
    ended = max(log.stat().st_mtime for log in job.folder.glob("console-*.log"))
    skipped = re.search(
        r"SKIPPED at ([\d.]+)",
        "".join(log.read_text() for log in campaign.run_dir.glob("logs/*.log")),
    )
    seconds = ended - float(skipped.group(1)) if skipped else 0.0
    campaign.facts.append(f"{found and found.group()}; ended {seconds:.0f} s after it")
    dumps = len(list(campaign.run_dir.glob("logs/flight-recorder-gloo-*")))
    campaign.facts.append(f"{dumps} dumps")
    if not found:
        print(f"exit codes {codes}\n{said[-8000:]}", flush=True)
    return found is not None and all(codes) and seconds < DEADLINE_S + 10


def start(campaign: Campaign) -> bool:
    """What a start and a resume cost: seconds, what goes through the store, files, sockets."""
    for name, steps in (("start", 2), ("resume", 4)):
        counts = campaign.folder / name
        counts.mkdir()
        before = count_until_first_step(campaign, counts)
        work = campaign.pretrain(*SHORT, f"run.steps={steps}", before=before)
        job = campaign.job(work, counted=True)
        if any(codes := campaign.finish(job)):
            print(f"exit codes {codes}\n{job.said()[-4000:]}", flush=True)
            return False
        ranks = [json.loads((counts / f"{r}.json").read_text()) for r in range(campaign.ranks)]
        first, others = ranks[0], ranks[1:] or ranks
        campaign.facts += [
            f"{name}: first step after {max(rank['seconds'] for rank in ranks):.1f} s",
            f"{job.store.num_messages} messages, {job.store.num_bytes} bytes to the store",
            f"files opened: rank 0 {first['opened']}, another {others[0]['opened']}, "
            f"all {sum(rank['opened'] for rank in ranks)}",
            f"sockets: rank 0 {first['sockets']}, another {others[0]['sockets']}",
        ]
    return True


def count_until_first_step(campaign: Campaign, counts: Path) -> Callable[[int], None]:
    """What makes a rank write what its start has cost into `counts`."""
    begun = time.monotonic()

    def before(rank: int) -> None:
        import safetensors

        from scale_smog.runtime import phases

        opened: list[str] = []
        safe_open = safetensors.safe_open  # opens files without Python's notice

        def note(event: str, arguments: tuple) -> None:
            if event == "open" and isinstance(arguments[0], str):
                if arguments[0].startswith(str(campaign.folder)):
                    opened.append(arguments[0])

        def note_and_open(*arguments: object, **options: object) -> object:
            opened.append("a checkpoint's")
            return safe_open(*arguments, **options)

        def write(phase: str) -> None:
            if phase == phases.STEP and not (counts / f"{rank}.json").exists():
                paths = map(str, Path("/proc/self/fd").iterdir())
                links = [os.readlink(path) for path in paths if os.path.lexists(path)]
                facts = {"seconds": time.monotonic() - begun, "opened": len(opened)}
                facts["sockets"] = sum(link.startswith("socket") for link in links)
                (counts / f"{rank}.json").write_text(json.dumps(facts))

        safetensors.safe_open = note_and_open
        sys.addaudithook(note)
        phases.on_enter.append(write)

    return before


def late(campaign: Campaign) -> bool:
    """The others wait for a rank that comes late."""

    def before(rank: int) -> None:
        time.sleep(LATE_S * (rank == campaign.ranks - 1))

    job = campaign.job(campaign.pretrain(*SHORT, "run.steps=4", before=before))
    codes = campaign.finish(job)
    if any(codes):
        print(f"exit codes {codes}\n{job.said()[-4000:]}", flush=True)
    campaign.facts.append(f"{LATE_S:.0f} s late")
    return not any(codes) and last_step(campaign) == 4


def version(campaign: Campaign) -> bool:
    """A node with another version of a package is named before the training."""

    def before(rank: int) -> None:
        from scale_smog.preflight import versions

        if rank // campaign.per_node == 1:
            found = versions.installed_versions() | {"timm": "9.9.9"}
            versions.installed_versions = lambda: found

    return refused(campaign, before, "node-1 has timm 9.9.9, node-0 has ")


def dataset(campaign: Campaign) -> bool:
    """A node with another dataset is named before the training."""
    other = make_dataset(campaign.folder / "other", num_images=40)

    def before(rank: int) -> None:
        if rank // campaign.per_node == 1:
            campaign.data = other
        write_small_recipe(campaign.folder / str(rank), campaign.data)

    def work(rank: int) -> None:
        from scale_smog import load_recipe
        from scale_smog.errors import exits_on_user_error
        from scale_smog.pretrain import pretrain

        before(rank)
        path = write_small_recipe(campaign.folder / str(rank), campaign.data)
        with exits_on_user_error():
            pretrain(load_recipe(path, campaign.overrides()))

    return refused_by(campaign, campaign.job(work), "node-1 has another dataset in ")


def refused(campaign: Campaign, before: Callable[[int], object], words: str) -> bool:
    return refused_by(campaign, campaign.job(campaign.pretrain(before=before)), words)


def refused_by(campaign: Campaign, job: ForkedRanks, words: str) -> bool:
    codes = campaign.finish(job)
    errors = [line for line in job.said().splitlines() if line.startswith("error: ")]
    campaign.facts.append("; ".join(errors)[:200])
    is_named = len(errors) == 1 and words in errors[0]
    return is_named and set(codes) == {2} and not campaign.run_dir.exists()


SCENARIOS: dict[str, Callable[[Campaign], bool]] = {
    function.__name__: function
    for function in (
        *(
            start,
            train,
            equal,
            kill,
            stop,
            term,
            elastic,
            evaluate,
            straggler,
            skip,
            late,
            version,
            dataset,
        ),
    )
}


def run(name: str, ranks: int, per_node: int, engine: str, batch: int, folder: Path) -> bool:
    """A scenario, and its line."""
    campaign = Campaign(folder, ranks, per_node, engine, batch)
    try:
        is_good = SCENARIOS[name](campaign)
    except OutOfMemory as error:
        campaign.facts.append(f"ended itself for lack of memory: {error}")
        is_good = False
    nodes = -(-ranks // per_node)
    print(
        f"{'ok ' if is_good else 'NOT GOOD'} {name}: {ranks} ranks on {nodes} nodes, {engine}, "
        f"{campaign.seconds:.0f} s, {campaign.peak_gib:.1f} GiB: {'; '.join(campaign.facts)}",
        flush=True,
    )
    return is_good


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--engine", default="hsdp", help="or several, with commas; all")
    parser.add_argument("--batch", type=int, default=0, help="of all ranks; default: 3 a rank")
    parser.add_argument("--scenario", default="train", help="or several, with commas; all")
    given = parser.parse_args(arguments)
    preload()
    scenarios = list(SCENARIOS) if given.scenario == "all" else given.scenario.split(",")
    engines = given.engine.split(",")
    if given.engine == "all":
        engines = ["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"]
    batch = given.batch or 3 * given.ranks  # three quarters of the ranks divide it too
    good = []
    for engine in engines:
        for name in scenarios:
            with tempfile.TemporaryDirectory() as folder:
                shape = given.ranks, given.per_node, engine, batch
                good.append(run(name, *shape, Path(folder)))
    words = "all reached their end" if all(good) else f"{good.count(False)} NOT GOOD"
    print(f"{given.ranks} ranks, {', '.join(engines)}: {', '.join(scenarios)}: {words}")
    return int(not all(good))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
