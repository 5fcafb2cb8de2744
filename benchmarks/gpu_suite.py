"""Every claim on one GPU in one command of at most nine minutes.

    python benchmarks/gpu_suite.py [--quick] [--minutes 9] [--out FILE]

Each claim stands beside its peer, measured in turns in the same run. What this machine lacks (DALI,
lightly, faiss, time) is reported as not measured. `--quick` runs every part of it on small nets, on
a CPU too, to see that it runs.
"""

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
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
from scale_smog.data.prepare.shard import shard_folder
from scale_smog.grouping import spherical_kmeans
from scale_smog.loop import train_step
from scale_smog.models import build_backbone
from scale_smog.profiling.flops import count_step, roof_s
from scale_smog.profiling.hardware import hardware_name, load_hardware
from scale_smog.profiling.peaks import measure_peaks
from scale_smog.profiling.step_profile import StepProfile, Timeline, timed
from scale_smog.profiling.timing import synchronize
from scale_smog.throughput import FIXED_VALUES, build_batches, timed_methods

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CLUSTERED, GROUPS, ITERATIONS, RESET_EVERY, CLUSTER_GPUS = 1_228_800, 3000, 10, 300, 64
PHOTO_SIZE, NUM_PHOTOS = (500, 375), 2048


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

    def step_against_a_bare_loop(self) -> Iterator[Claim]:
        """The whole step costs little more than the nets."""
        recipe = self.recipe()
        ours, bare = self.rates(
            {"ours": Ours(recipe, DEVICE), "bare": Bare(recipe, DEVICE)}
        ).values()
        yield _share("whole step against a bare loop, x1", ours, bare, 0.90)

    def compiled(self) -> Iterator[Claim]:
        """What torch.compile gives."""
        settings: dict[str, Any] = {"compile": not self.quick}  # a minute of compilation
        sides = {
            "compiled": Ours(self.recipe(engine=settings), DEVICE),
            "eager": Ours(self.recipe(), DEVICE),
        }
        compiled, eager = self.rates(sides).values()
        yield _share("compiled against eager, x1", compiled, eager, 1.10)

    def formats(self) -> Iterator[Claim]:
        """What bf16 and channels_last give, and what weights left as they are cost."""
        fast, slow = self.recipe(), self.recipe(engine={"precision": "fp32"})
        rate = self.rates(
            {
                "bf16, channels_last": Bare(fast, DEVICE, True, True),
                "bf16, channels_last views only": Bare(fast, DEVICE, True, False),
                "fp32, NCHW": Bare(slow, DEVICE, False, False),
            }
        )
        best, views_only, plain = rate.values()
        yield _share("bf16 channels_last against fp32 NCHW, x1", best, plain, 2.3)
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
            roof = roof_s(cost.ops, *peaks, folded=True)
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

    def loading(self) -> Iterator[Claim]:
        """End to end with DALI against random views."""
        with tempfile.TemporaryDirectory() as folder:
            make_photos(Path(folder) / "photos", 64 if self.quick else NUM_PHOTOS)
            tars = Path(folder) / "tars"
            shard_folder(Path(folder) / "photos", tars)
            for width, target in zip(self.widths, (0.80, 0.95, 0.98), strict=False):
                ours = Ours(self.recipe(width), DEVICE)
                streams = {
                    name: lambda ours=ours, path=path: self._train(ours, path)
                    for name, path in ((f"x{width}, DALI", tars), (f"x{width}, random views", None))
                }
                rounds = min(3, self.rounds)
                dali_s, synthetic_s = interleaved_streams(streams, 4, 12, rounds).values()
                rate = self.batch / dali_s
                text = f"end to end with DALI against random views, x{width}"
                yield _share(text, rate, self.batch / synthetic_s, target)

    def lightly(self) -> Iterator[Claim]:
        """The whole framework against lightly's example."""
        from framework import LightlyExample
        from framework import Ours as Framework

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

    def waiting(self) -> Iterator[Claim]:
        """How often the host waits for the GPU at a step."""
        ours = Ours(self.recipe(), DEVICE)
        ours.step()
        if DEVICE.type != "cuda":
            raise RuntimeError("there is no GPU to wait for")
        import warnings

        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                train_step(ours.recipe, ours.state, ours.batch, FIXED_VALUES)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        num = sum("synchroniz" in str(x.message) for x in said)
        yield _limit("waits of the host at a step, against 1", num, 1)

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
                    train_step(ours.recipe, ours.state, ours.batch, FIXED_VALUES)
        return StepProfile.of(timeline.durations())

    def _train(self, ours: Ours, tars: Path | None) -> Iterator[None]:
        changes: dict[str, Any] = {"path": str(tars or ""), "loader": "dali", "workers": 12}
        data = ours.recipe.data.model_copy(update=changes)
        recipe = ours.recipe.model_copy(update={"data": data})
        for batch in build_batches(recipe, self.batch, 16, tars is None, DEVICE):
            train_step(recipe, ours.state, batch, FIXED_VALUES)
            synchronize(DEVICE)
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


def _limit(claim: str, ours: float, limit: float) -> Claim:
    """A figure that should stay below a limit."""
    return Claim(claim, ours, limit, limit / ours if ours else 1.0, 1.0)


def _share(claim: str, ours: float, peer: float, target: float) -> Claim:
    return Claim(claim, ours, peer, ours / peer, target)


def main() -> None:
    """Runs the parts in the order of their worth until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small nets: does it all run?")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins after that")
    parser.add_argument("--out", default="", help="Markdown file for the table")
    arguments = parser.parse_args()
    suite, begin = Suite(arguments.quick), time.perf_counter()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    print(f"{device}, torch {torch.__version__}", flush=True)
    rows: list[str] = []
    claims: list[Claim] = []
    parts = (
        suite.step_against_a_bare_loop, suite.rooflines, suite.formats, suite.kmeans, suite.waiting,
        suite.loading, suite.lightly, suite.forward, suite.compiled,
    )  # fmt: skip
    with one_rank():
        for part in parts:
            title = (part.__doc__ or "").strip()
            print(f"\n{title}", flush=True)
            # A part may take a minute and a half; the last ones give way.
            if time.perf_counter() - begin > 60 * arguments.minutes - 75:
                rows.append(f"| {title} | not measured: the time was up | | | |")
                continue
            try:
                for claim in part():
                    claims.append(claim)
                    print(json.dumps(claim._asdict()), flush=True)
                    rows.append(_row(claim))
            except Exception as error:
                traceback.print_exc(limit=-1)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                rows.append(f"| {title} | not measured: {reason} | | | |")
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    table = ["| claim | ours | peer | ratio | target |", "|---|---|---|---|---|", *rows]
    print("\n" + "\n".join(table))
    if arguments.out:
        Path(arguments.out).write_text(f"# One GPU: {device}\n\n" + "\n".join(table) + "\n")
    reached = sum(claim.ratio >= claim.target for claim in claims)
    closing = {"claim": f"goals reached, {device}", "ours": reached, "peer": len(claims)}
    print(json.dumps(closing | {"ratio": round(reached / max(1, len(claims)), 3)}))


def _row(claim: Claim) -> str:
    verdict = "" if claim.ratio >= claim.target else " (not reached)"
    return (
        f"| {claim.claim} | {claim.ours:.4g} | {claim.peer:.4g} | {claim.ratio:.3f} "
        f"| {claim.target:g}{verdict} |"
    )


if __name__ == "__main__":
    main()
