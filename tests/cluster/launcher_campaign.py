"""Runs over two hosts, with faults: `launcher_campaign.py {faults,latency,stop,all}`, as root.

faults: each fault of a cluster is injected alone; `check.py` must name it with its host, and find
nothing on a sound one. latency: a step's seconds with 0, 1 and 5 ms more on the link, for batch
norm over all ranks, of a node and of a rank, beside the scaling model's. stop: SIGINT and SIGTERM
to the launcher, deepspeed's or torchrun, end a run on both hosts, with a checkpoint, and leave a
second run on them alone.
Exit status 0 only if all of it holds. Needs openssh-server, pdsh, iproute2 and faketime.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, TypeAlias

from hosts import BIN, ROOT, Cluster, console, finish, two_hosts, why_not
from inject_fault import FAKETIME, FAULTS, injected
from network_latency import network_latency
from programs import CHECK, OVERRIDES, PRETRAIN, RECIPE

from scale_smog import load_recipe
from scale_smog.data.prepare.demo import make_demo
from scale_smog.profiling.communication_model import exposed_s
from scale_smog.profiling.hardware import Link, load_hardware
from scale_smog.profiling.workload import Workload

ON_HOSTS = (BIN / "python", ROOT / "launcher" / "on_hosts.py")
Job: TypeAlias = "subprocess.Popen[bytes]"
SCOPES = ("global", "node", "local")
PROFILED = [RECIPE, *OVERRIDES, "engine.kind=ddp", "grouping.kmeans=false", "grouping.init=random"]


def faults(cluster: Cluster, data: Path, folder: Path) -> bool:
    """A check for each fault, and one without."""
    num_found = 0
    for number, name in enumerate([None, *FAULTS]):
        if name == "wrong clock" and not FAKETIME:
            print("wrong clock: skipped, apt-get install faketime")
            continue
        work, run = folder / f"fault-{number}", folder / f"fault-{number}" / "run"
        run.mkdir(parents=True)
        program = [CHECK, RECIPE, *OVERRIDES, f"data.path={data}", f"run.dir={run}"]
        with injected(cluster.hosts[1], [name] if name else [], data, run):
            status = finish([cluster.deepspeed(work, *program)], work)
        said = console(work).read_text()
        if name is None:
            is_good = status == 0 and "ready to train" in said
            line = "ready to train" if is_good else said[-2000:]
        else:
            found = re.search(FAULTS[name].pattern, said)
            is_good = bool(found) and status != 0 and said.count("FAULT") <= 1
            line = found.group() if found else said[-2000:]
        num_found += is_good
        print(
            f"{name or 'sound hosts':<26}{'ok' if is_good else 'NOT'}  {status=}  {line}",
            flush=True,
        )
    return num_found == len(FAULTS) + 1


def latency(cluster: Cluster, data: Path, folder: Path) -> bool:
    """A step's seconds, measured, and as the scaling model has it.

    The model adds to the step without more latency what its links, measured in the same run, cost.
    """
    del data
    base: dict[str, float] = {}
    for delay_ms in (0, 1, 5):
        with network_latency(cluster.hosts, delay_ms / 1e3):
            for scope in SCOPES:
                work = folder / f"latency-{delay_ms}-{scope}"
                facts = profiled(cluster, work, scope)
                if facts is None:
                    return False
                exposed = modelled_s(facts, scope)
                own = base.setdefault(scope, facts["step_s"] - exposed)
                latency_us = facts["measured_links"]["network"]["latency_us"][1]
                line = {"delay_ms": delay_ms, "batch_norm": scope, "latency_us": latency_us}
                line |= {"step_s": facts["step_s"], "predicted_s": own + exposed}
                print(json.dumps(line), flush=True)
    return True


def profiled(cluster: Cluster, work: Path, scope: str) -> dict[str, Any] | None:
    """profile.json of the recipe with ddp over both hosts."""
    program = [ROOT / "launcher" / "throughput.py", *PROFILED, f"model.batch_norm={scope}"]
    program += [f"run.dir={work / 'run'}", "--steps", "20", "--no-trace", "--calibrate"]
    if finish(cluster.torchrun(work, *program, "--synthetic"), work):
        print(console(work).read_text()[-2000:])
        return None
    return json.loads((work / "run" / "profile.json").read_text())


def modelled_s(facts: dict[str, Any], scope: str) -> float:
    """What a step of two hosts waits for, by the links that were measured."""
    links = facts["measured_links"]
    machine = load_hardware("h200").model_copy(
        update={
            "gpus_per_node": 1,
            "network": Link.model_validate(links["network"]),
            "collective_shares": links["collective_shares"],
        }
    )
    recipe = load_recipe(PROFILED[0], PROFILED[1:])
    work = Workload.of(recipe, recipe.data.global_batch // 2)
    return sum(exposed_s(work, facts["parts"], 2, "ddp", scope, machine, 1).values())


def stop(cluster: Cluster, data: Path, folder: Path) -> bool:
    """Two runs on the same hosts, under each launcher; the first one's launcher gets a signal.

    Under torchrun only the first host's launcher gets it, as from a person at that host.
    """

    def by_deepspeed(work: Path, *program: str | Path) -> list[Job]:
        return [cluster.deepspeed(work, *program, launcher=ON_HOSTS)]

    results = []
    for launcher, start in (("deepspeed", by_deepspeed), ("torchrun", cluster.torchrun)):
        for name in ("INT", "TERM"):
            first, second = (
                folder / f"{launcher}-{name}-{which}" for which in ("stopped", "spared")
            )
            jobs = []
            for work in (first, second):
                program = [PRETRAIN, RECIPE, *OVERRIDES, f"data.path={data}"]
                program += [f"run.dir={work / 'run'}", "run.steps=100000"]
                jobs.append(start(work, *program))
            results.append(stopped(cluster, launcher, name, jobs[0], first, second))
            cluster.hosts[0].signal(jobs[1][0], "TERM")
            for job in jobs[1]:
                job.wait(60)
    return all(results)


def stopped(
    cluster: Cluster, launcher: str, name: str, jobs: list[Job], first: Path, second: Path
) -> bool:
    """Signals the first run's launcher; whether it is gone, saved, and the second one trains on."""
    for work in (first, second):
        wait_for_step(work / "run", 2)
    before = last_step(second / "run")
    cluster.hosts[0].signal(jobs[0], name)
    start = time.monotonic()
    for job in jobs:
        job.wait(60)
    while any(str(first) in line for h in cluster.hosts for line in h.processes()):
        assert time.monotonic() - start < 60, "still running"
        time.sleep(0.2)
    seconds = time.monotonic() - start
    wait_for_step(second / "run", before + 5)
    alive = [sum(str(second) in line for line in host.processes()) for host in cluster.hosts]
    saved = [path.name for path in sorted((first / "run" / "checkpoints").glob("step-*"))]
    is_good = all(alive) and bool(saved)
    print(
        f"{launcher}, SIG{name}: gone from both hosts after {seconds:.1f} s, saved {saved[-1:]}; "
        f"the other run went from step {before} to {last_step(second / 'run')}, {is_good=}",
        flush=True,
    )
    return is_good


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + 240
    while last_step(run) < step:
        if time.monotonic() > end:
            raise SystemExit(f"no step {step}:\n{console(run.parent).read_text()[-4000:]}")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    campaigns = {"faults": faults, "latency": latency, "stop": stop}
    parser.add_argument("campaign", choices=[*campaigns, "all"])
    campaign = parser.parse_args().campaign
    if reason := why_not():
        raise SystemExit(f"error: {reason}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if campaign != "latency":
            make_demo(folder / "demo_data")
        with two_hosts(folder) as hosts:
            cluster = Cluster(folder, hosts)
            chosen = campaigns.values() if campaign == "all" else [campaigns[campaign]]
            good = [run(cluster, folder / "demo_data", folder) for run in chosen]
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
