"""Every claim on one GPU in one command of at most nine minutes.

    python benchmarks/gpu_suite.py [--parts 1 2 kmeans ...] [--quick] [--minutes 9] [--out FILE]

Parts come in stages: 1 is the GPU's path right, 2 how fast a step is, 3 loading and k-means, 4 what
compilation and graphs give. A claim is written to FILE, a line of JSON, as soon as it is known;
each part has a time limit, and what this machine lacks (DALI, deepspeed, lightly, faiss, time) is
written as not measured. Each claim stands beside its peer, measured in turns in the same run.
`--quick` runs every part of it on small nets, on a CPU too, to see that it runs.
"""

import argparse
import gc
import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from compare import interleaved, interleaved_streams
from PIL import Image
from step import STEPS_A_TURN, Bare, Ours, one_rank, step_recipe, turn

from scale_smog import distributed
from scale_smog.config import Recipe
from scale_smog.grouping import spherical_kmeans
from scale_smog.loop import train_step
from scale_smog.models import build_backbone
from scale_smog.profiling.flops import count_step, roofline_s
from scale_smog.profiling.hardware import hardware_name, load_hardware
from scale_smog.profiling.peaks import measure_peaks
from scale_smog.profiling.step_profile import StepProfile, Timeline, timed
from scale_smog.profiling.timing import synchronize
from scale_smog.throughput import FIXED_VALUES, build_batches, timed_methods

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CLUSTERED, GROUPS, ITERATIONS, RESET_EVERY, CLUSTER_GPUS = 1_228_800, 3000, 10, 300, 64
PHOTO_SIZE, NUM_PHOTOS = (500, 375), 2048
NUM_EXACT_STEPS = 4
DALI_THREADS = (12, 4)


class Claim(NamedTuple):
    """A measured figure beside its peer's, and the ratio that is hoped for."""

    claim: str
    ours: float
    peer: float
    ratio: float
    target: float  # of the ratio, at least


class Suite:
    """The sizes of a run."""

    def __init__(self, quick: bool):
        self.quick = quick
        self.batch, self.px, self.rounds = (4, 32, 2) if quick else (64, 224, 7)
        self.widths = (1,) if quick else (1, 2, 4)

    def recipe(self, width: int = 1, **sections: Any) -> Recipe:
        """ResNet-50 of a width in bf16."""
        if self.quick:
            sections["model"] = {"backbone": "resnet_tiny"} | sections.get("model", {})
        sections["engine"] = {"precision": "bf16"} | sections.get("engine", {})
        return step_recipe(self.batch, self.px, width, **sections)

    def rates(self, sides: Mapping[str, Ours | Bare]) -> dict[str, float]:
        """Images/s of each side, in turns."""
        seconds = interleaved({name: turn(side) for name, side in sides.items()}, self.rounds)
        num = self.batch * STEPS_A_TURN[DEVICE.type]
        return {name: num / s for name, s in seconds.items()}

    def waiting(self) -> Iterator[Claim]:
        """How often the host waits for the GPU at a step."""
        ours = Ours(self.recipe(), DEVICE)
        for _ in range(2):
            ours.step()
        if DEVICE.type != "cuda":
            raise RuntimeError("there is no GPU to wait for")
        import warnings

        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                train_step(ours.state, ours.batch, FIXED_VALUES)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        num = sum("synchroniz" in str(x.message) for x in said)
        yield _limit("waits of the host at a step, against 1", num, 1)

    def batch_norm(self) -> Iterator[Claim]:
        """The synchronised batch norm's own forward pass on a GPU, against torch's batch norm."""
        import torch.distributed as dist

        from scale_smog.models import synchronise_batch_norm

        for is_even in (True, False):
            x = torch.randn(16, 64, 28, 28, device=DEVICE) * 2 + 30
            x = x.contiguous(memory_format=torch.channels_last)
            grad = torch.randn_like(x)
            plain = torch.nn.BatchNorm2d(64).to(DEVICE)
            ours = torch.nn.Sequential(torch.nn.BatchNorm2d(64).to(DEVICE))
            synchronise_batch_norm(ours, dist.group.WORLD, is_even=is_even)  # one rank's group
            found = []
            for norm in (plain, ours):
                leaf = x.clone().requires_grad_()
                y = norm(leaf)
                y.backward(grad)
                buffers = [b.float() for b in norm.buffers()]
                weights = [w.grad for w in norm.parameters()]
                found.append([y.detach(), leaf.grad, *weights, *buffers])
            worst = max(_difference(a, b) for a, b in zip(*found, strict=True))
            kind = "equal batches" if is_even else "any batches"
            yield _limit(f"batch norm on a GPU against torch's, {kind}, against 1e-4", worst, 1e-4)

    def exactness(self) -> Iterator[Claim]:
        """The same steps of ddp on the GPU and on the CPU: in fp64 equal, in fp32 as close to fp64.

        At its first weights ResNet-50 answers a change of its last digits ten times as strongly at
        every step, on any device: so fp64 says whether the steps are the same, and fp32 is compared
        after the first of them with what a CPU makes of it.
        """
        cpu = torch.device("cpu")
        exact = self._moved("fp64", cpu, NUM_EXACT_STEPS)
        found = self._moved("fp64", DEVICE, NUM_EXACT_STEPS)
        text = f"what {NUM_EXACT_STEPS} steps in fp64 moved, GPU against CPU, against 1e-6"
        yield _limit(text, _distance(found[-1], exact[-1]), 1e-6)
        for precision in ("fp32", "bf16"):
            error, usual = (
                _distance(self._moved(precision, device, 1)[0], exact[0])
                for device in (DEVICE, cpu)
            )
            text = f"error of a step in {precision}, on a CPU against on the GPU"
            yield Claim(text, error, usual, usual / error if error else 1.0, 0.5)

    def _moved(self, precision: str, device: torch.device, num_steps: int) -> list[torch.Tensor]:
        """How far the weights [P] are from their start after each step, from equal starts."""
        small = Suite(self.quick)
        small.batch, small.px = min(16, self.batch), min(96, self.px)
        ours = Ours(small.recipe(engine={"precision": precision}), device)
        start, moved = _weights(ours), []
        for _ in range(num_steps):
            ours.step()
            moved.append(_weights(ours) - start)
        return moved

    def step_against_a_bare_loop(self) -> Iterator[Claim]:
        """The whole step costs little more than the nets."""
        recipe = self.recipe()
        ours, bare = self.rates(
            {"ours": Ours(recipe, DEVICE), "bare": Bare(recipe, DEVICE)}
        ).values()
        yield _share("whole step against a bare loop, x1", ours, bare, 0.90)

    def formats(self) -> Iterator[Claim]:
        """What bf16 and channels_last give, and what weights left as they are cost; TF32 is off."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        fast, slow = self.recipe(), self.recipe(engine={"precision": "fp32"})
        rate = self.rates(
            {
                "bf16, channels_last": Bare(fast, DEVICE, True, True),
                "bf16, channels_last views only": Bare(fast, DEVICE, True, False),
                "fp32 without TF32, NCHW": Bare(slow, DEVICE, False, False),
            }
        )
        best, views_only, plain = rate.values()
        yield _share("bf16 channels_last against fp32 (no TF32) NCHW, x1", best, plain, 2.3)
        text = "weights contiguous (ZeRO, FSDP) against channels_last"
        yield _share(text, views_only, best, 0.95)

    def rooflines(self) -> Iterator[Claim]:
        """Share of the roof, optimizer's share of the step, memory."""
        peaks, ours = self._peaks(), None
        for width, target in zip(self.widths, (0.45, 0.50, 0.55), strict=False):
            ours = None
            gc.collect()  # nets and their autocast refer to one another
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            ours = Ours(self.recipe(width), DEVICE)
            profile = self._profile(ours)
            cost = count_step(ours.recipe.model, ours.recipe.data, self.batch, "bf16")
            roof = roofline_s(cost.ops, *peaks, folded=True)
            rate = self.batch / profile.step_s
            mfu = cost.flops / profile.step_s / peaks[0]
            print(f"    x{width}: {rate:.0f} images/s, MFU {mfu:.1%}")
            for name, seconds in profile.parts.items():
                print(f"      {name:<18}{seconds * 1e3:9.3f} ms{seconds / profile.step_s:8.1%}")
            text = f"images/s as a share of the roof, x{width}"
            yield _share(text, rate, self.batch / roof, target)
            if width == 1:
                update = profile.parts["optimizer"] + profile.parts["ema"]
                text = "LARS and momentum update, share of the x1 step, against 4 %"
                yield _limit(text, update / profile.step_s, 0.04)
            if width == 4:
                gib = distributed.peak_memory_mib() / 1024
                yield _limit("peak memory of x4 at batch 64, GiB, against 40", gib, 40)

    def kmeans(self) -> Iterator[Claim]:
        """A full reset: against faiss on this machine's CPU, and as a share of the steps."""
        rows, groups = (4096, 50) if self.quick else (CLUSTERED, GROUPS)
        generator = torch.Generator(DEVICE).manual_seed(0)
        features = torch.randn(rows, 128, device=DEVICE, generator=generator)
        features = F.normalize(features)
        start = features[:groups].clone()
        jobs: dict[str, Callable[[], object]] = {
            "ours": lambda: spherical_kmeans(features, start, iterations=ITERATIONS)
        }
        ours_s = interleaved(jobs, 3)["ours"]
        step_s = self._profile(Ours(self.recipe(), DEVICE)).step_s
        share = ours_s / CLUSTER_GPUS / RESET_EVERY / step_s
        text = "k-means of a reset over 64 GPUs, share of the steps, against 0.5 %"
        yield _limit(text, share, 0.005)
        import faiss  # last: what it lacks leaves the rest measured

        host, seeds = features.cpu().numpy(), start.cpu().numpy()
        peer = faiss.Kmeans(128, groups, niter=ITERATIONS, spherical=True,
                            max_points_per_centroid=10**9, min_points_per_centroid=1)  # fmt: skip
        begin = time.perf_counter()
        peer.train(host, init_centroids=seeds)
        faiss_s = time.perf_counter() - begin
        text = f"s, k-means of {rows:,} x 128, K = {groups}, against faiss on the CPU"
        yield Claim(text, ours_s, faiss_s, faiss_s / ours_s, 1.0)

    def memory(self) -> Iterator[Claim]:
        """The loader of small sets: views a second, and the step with it against random views."""
        from scale_smog.data.prepare.shard import shard_folder

        batch, num = (16, 64) if self.quick else (256, 4096)
        small = Suite(self.quick)
        small.batch, small.px = batch, 32
        with tempfile.TemporaryDirectory() as folder:
            make_photos(Path(folder) / "photos", num, (32, 32))
            tars = Path(folder) / "tars"
            shard_folder(Path(folder) / "photos", tars)
            ours = Ours(small.recipe(model={"backbone": "resnet18", "small_images": True}), DEVICE)
            streams = {
                "memory": lambda: small._train(ours, tars, "memory"),
                "random views": lambda: small._train(ours, None),
            }
            memory_s, synthetic_s = interleaved_streams(
                streams, 4, 12, min(3, self.rounds)
            ).values()
        text = "end to end from memory against random views, ResNet-18, 32 px"
        yield _share(text, batch / memory_s, batch / synthetic_s, 0.90)

    def zero(self) -> Iterator[Claim]:
        """DeepSpeed's engines on one GPU against ddp."""
        import deepspeed  # noqa: F401  # what it lacks is said before anything runs

        sides = {k: Ours(self.recipe(engine={"kind": k}), DEVICE) for k in ("ddp", "zero1")}
        ddp, zero1 = self.rates(sides).values()
        yield _share("zero1 on one GPU against ddp, x1", zero1, ddp, 0.90)

    def loading(self) -> Iterator[Claim]:
        """End to end with DALI, by many threads and by few, against random views."""
        import nvidia.dali  # noqa: F401  # what it lacks is said before pictures are made

        from scale_smog.data.prepare.shard import shard_folder

        with tempfile.TemporaryDirectory() as folder:
            make_photos(Path(folder) / "photos", 64 if self.quick else NUM_PHOTOS)
            tars = Path(folder) / "tars"
            shard_folder(Path(folder) / "photos", tars)
            for width, target in zip(self.widths, (0.80, 0.95, 0.98), strict=False):
                ours = Ours(self.recipe(width), DEVICE)
                streams = {
                    f"x{width}, DALI with {n} threads": partial(self._train, ours, tars, "dali", n)
                    for n in DALI_THREADS
                }
                streams["random views"] = partial(self._train, ours, None)
                seconds = interleaved_streams(streams, 4, 12, min(3, self.rounds))
                *with_dali, synthetic_s = seconds.values()
                for num_threads, dali_s in zip(DALI_THREADS, with_dali, strict=True):
                    text = (
                        f"end to end, DALI ({num_threads} threads) against random views, x{width}"
                    )
                    yield _share(text, self.batch / dali_s, self.batch / synthetic_s, target)

    def contention(self) -> Iterator[Claim]:
        """What of a step's time DALI beside it takes, and whether a process of its own helps."""
        import nvidia.dali  # noqa: F401
        from beside_dali import ALONE, arrangements

        from scale_smog.data.prepare.shard import shard_folder

        with tempfile.TemporaryDirectory() as folder:
            make_photos(Path(folder) / "photos", 64 if self.quick else NUM_PHOTOS // 4)
            tars = Path(folder) / "tars"
            shard_folder(Path(folder) / "photos", tars)
            streams, waits = arrangements(Ours(self.recipe(), DEVICE), tars, min(DALI_THREADS))
            seconds = interleaved_streams(streams, 6, 20, min(3, self.rounds))
        for name, times in waits.items():
            print(f"    waited for views, {name}: {1e3 * np.median(times):.2f} ms")
        alone = seconds.pop(ALONE)
        for name, each in seconds.items():
            yield _share(f"x1 step, {name}, against alone", 1 / each, 1 / alone, 0.80)

    def lightly(self) -> Iterator[Claim]:
        """The whole framework against lightly's example."""
        from framework import LightlyExample
        from framework import Ours as Framework

        from scale_smog.data.prepare.shard import shard_folder

        batch, groups, workers = (16, 8, 1) if self.quick else (256, 300, 8)
        # The peer's workers have two batches each ready at the start: those may not count.
        num_warm_up, num_timed = (1, 2) if self.quick else (2 * workers, 5 * workers)
        num = num_warm_up + num_timed
        with tempfile.TemporaryDirectory() as folder:
            make_photos(Path(folder) / "photos", num * batch, (32, 32))
            tars = Path(folder) / "tars"
            shard_folder(Path(folder) / "photos", tars)
            ours = Framework(tars, batch, groups, workers, DEVICE, "memory")
            theirs = LightlyExample(Path(folder) / "photos", batch, groups, workers, DEVICE, True)
            streams = {"ours": lambda: ours.steps(num), "lightly's": lambda: theirs.steps(num)}
            seconds = interleaved_streams(streams, num_warm_up, num_timed, min(3, self.rounds))
        rates = [batch / s for s in seconds.values()]
        text = "images/s against lightly's SMoG example, ResNet-18, 32 px"
        yield _share(text, rates[0], rates[1], 3.0)

    def forward(self) -> Iterator[Claim]:
        """Forward images/s of every backbone, beside its parameters."""
        names = [("resnet50", w) for w in (1, 2, 4)] + [("swin_tiny", 1)]
        num_passes = 1 if self.quick else 10  # one is over before the next is started
        for name, width in [("resnet_tiny", 1)] if self.quick else names:
            net = build_backbone(name, width).to(DEVICE).eval()
            net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            images = torch.randn(self.batch, 3, self.px, self.px, device=DEVICE)
            images = images.contiguous(memory_format=torch.channels_last)

            def run(net: torch.nn.Module = net, images: torch.Tensor = images) -> None:
                with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
                    for _ in range(num_passes):
                        net(images)
                synchronize(DEVICE)

            seconds = interleaved({f"forward, {name} x{width}": run}, self.rounds)
            rate = num_passes * self.batch / next(iter(seconds.values()))
            millions = sum(p.numel() for p in net.parameters()) / 1e6
            print(f"    {name} x{width}: {millions:.2f} M parameters, {rate:.0f} images/s forward")
        yield from ()

    def compiled(self) -> Iterator[Claim]:
        """What torch.compile gives."""
        settings: dict[str, Any] = {"compile": not self.quick}  # a minute of compilation
        sides = {
            "compiled": Ours(self.recipe(engine=settings), DEVICE),
            "eager": Ours(self.recipe(), DEVICE),
        }
        compiled, eager = self.rates(sides).values()
        yield _share("compiled against eager, x1", compiled, eager, 1.10)

    def graphs(self) -> Iterator[Claim]:
        """What the momentum net's forward pass as one CUDA graph gives, where the host limits."""
        if DEVICE.type != "cuda":
            raise RuntimeError("there is no GPU to launch graphs on")
        for batch in (min(8, self.batch), self.batch):
            few = Suite(self.quick)
            few.batch = batch
            sides = {
                "one launch": Ours(few.recipe(engine={"cuda_graphs": True}), DEVICE),
                "eager": Ours(few.recipe(), DEVICE),
            }
            for side in sides.values():
                for _ in range(5):  # captured after three
                    side.step()
            graphed, eager = few.rates(sides).values()
            yield _share(f"CUDA graph against eager, x1, {batch} images", graphed, eager, 1.0)

    def _peaks(self) -> tuple[float, float]:
        if name := hardware_name(DEVICE):
            machine = load_hardware(name)
            return machine.flops_per_s("bf16"), machine.bytes_per_s
        return measure_peaks(DEVICE, "bf16")

    def _profile(self, ours: Ours) -> StepProfile:
        for _ in range(3):
            ours.step()
        timeline = Timeline(DEVICE)
        with timed(timeline, timed_methods(ours.state)):
            for _ in range(20):
                with timeline.step():
                    train_step(ours.state, ours.batch, FIXED_VALUES)
        return StepProfile.of(timeline.durations())

    def _train(
        self, ours: Ours, tars: Path | None, loader: str = "dali", workers: int = 12
    ) -> Iterator[None]:
        changes: dict[str, Any] = {"path": str(tars or ""), "loader": loader, "workers": workers}
        data = ours.recipe.data.model_copy(update=changes)
        recipe = ours.recipe.model_copy(update={"data": data})
        for batch in build_batches(recipe, self.batch, 16, tars is None, DEVICE):
            train_step(ours.state, batch, FIXED_VALUES)
            if DEVICE.type == "cuda":  # not all of it: the loader's own streams go on
                torch.cuda.current_stream(DEVICE).synchronize()
            yield


def make_photos(folder: Path, num: int, size: tuple[int, int] = PHOTO_SIZE) -> None:
    """JPEGs with the detail, and so the bytes, of photographs: about 100 KB of 500 x 375 px."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 14, (size[1], size[0], 3))
    for i in range(num):
        place = folder / f"class{i % 4}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
        pixels = (smooth + np.roll(noise, i, axis=1)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i:05d}.jpg", quality=90)


class Part(NamedTuple):
    """What is measured together."""

    stage: int
    limit_s: float
    run: Callable[[Suite], Iterator[Claim]]

    @property
    def name(self) -> str:
        """By which `--parts` asks for it."""
        return self.run.__name__


PARTS = [
    Part(1, 40, Suite.waiting),
    Part(1, 30, Suite.batch_norm),
    Part(1, 90, Suite.exactness),
    Part(2, 60, Suite.step_against_a_bare_loop),
    Part(2, 120, Suite.rooflines),
    Part(2, 90, Suite.formats),
    Part(3, 90, Suite.kmeans),
    Part(3, 60, Suite.memory),
    Part(3, 120, Suite.loading),
    Part(3, 120, Suite.contention),
    Part(3, 60, Suite.zero),
    Part(3, 120, Suite.lightly),
    Part(4, 60, Suite.graphs),
    Part(4, 60, Suite.forward),
    Part(4, 150, Suite.compiled),
]


class Record:
    """A file to which every claim is appended at once: what is known survives any end.

    Args:
        path: of the file, which is begun anew.
    """

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")

    def add(self, **figures: Any) -> None:
        """A line, on the disk when this returns."""
        line = json.dumps(figures)
        print(f"    {line}", flush=True)
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a TimeoutError in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(part: Part, suite: Suite, limit_s: float, record: Record) -> None:
    """Runs a part; what ends it early is on record too."""
    print(f"\n{part.stage} {part.name}: {(part.run.__doc__ or '').strip()}", flush=True)
    try:
        with time_limit(limit_s):
            for claim in part.run(suite):
                record.add(part=part.name, **claim._asdict())
    except Exception as error:
        traceback.print_exc()
        record.add(part=part.name, not_measured=f"{type(error).__name__}: {error}")
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def chosen(names: list[str]) -> list[Part]:
    """Parts by their names or stages; all without any."""
    known = {part.name for part in PARTS} | {str(part.stage) for part in PARTS}
    if unknown := set(names) - known:
        raise SystemExit(f"no part {', '.join(sorted(unknown))}: there are {sorted(known)}")
    return [p for p in PARTS if not names or p.name in names or str(p.stage) in names]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest, as a share of the largest value."""
    largest = b.abs().max().item()
    return (a - b).abs().max().item() / largest if largest else float(a.abs().max().item())


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of the difference, as a share of b's."""
    length = b.norm().item()
    return float((a - b).norm().item() / length) if length else float(a.norm().item())


def _weights(ours: Ours) -> torch.Tensor:
    """All of the online net's [P], in fp64 on the CPU."""
    parameters = ours.state.engine.online.parameters()
    return torch.cat([p.detach().double().flatten().cpu() for p in parameters])


def _limit(claim: str, ours: float, limit: float) -> Claim:
    """A figure that should stay below a limit."""
    return Claim(claim, ours, limit, limit / ours if ours else 1.0, 1.0)


def _share(claim: str, ours: float, peer: float, target: float) -> Claim:
    return Claim(claim, ours, peer, ours / peer, target)


def main() -> None:
    """Runs the parts in the order of their stages until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=[], help="names or stages (default: all)")
    parser.add_argument("--quick", action="store_true", help="small nets: does it all run?")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts together")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite.jsonl"), help="of the claims")
    arguments = parser.parse_args()
    parts, suite, begin = chosen(arguments.parts), Suite(arguments.quick), time.perf_counter()
    record = Record(arguments.out)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    record.add(device=device, torch=torch.__version__, quick=arguments.quick)
    with one_rank():
        for part in parts:
            left_s = 60 * arguments.minutes - (time.perf_counter() - begin)
            if left_s < 5:
                record.add(part=part.name, not_measured="no time left")
                continue
            measure(part, suite, min(part.limit_s, left_s), record)
    record.add(seconds=round(time.perf_counter() - begin, 1))


if __name__ == "__main__":
    main()
