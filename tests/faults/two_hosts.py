"""Cuts the link of one of two hosts in the middle of a run: `two_hosts.py`, as root, on Linux.

Two network namespaces with an sshd each are the hosts; `deepspeed --hostfile` starts the run over
pdsh and ssh. The job must end within its deadline and name the host that is gone, and the same
command with a hostfile of the other one must go on from the newest checkpoint. Needs the Debian
packages openssh-server, pdsh and iproute2. Exit status 0 only if all of it holds.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from images import make_dataset
from small_recipe import write_small_recipe

ROOT = Path(__file__).parent.parent.parent
HOSTS = {"host-a": "10.77.31.1", "host-b": "10.77.31.2"}
BRIDGE = "smog-bridge"
NUM_STEPS = 60
PATIENCE_S = 300.0


def sh(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def network() -> Iterator[None]:
    """A namespace a host, all on one bridge."""
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "link", "set", BRIDGE, "up")
        for number, (host, address) in enumerate(HOSTS.items()):
            outside = f"smog-veth{number}"
            sh("ip", "netns", "add", host)
            sh("ip", "link", "add", outside, "type", "veth", "peer", "eth0", "netns", host)
            sh("ip", "link", "set", outside, "master", BRIDGE, "up")
            sh("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                sh("ip", "-n", host, "link", "set", device, "up")
        yield
    finally:
        for host in HOSTS:
            listed = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
            for pid in listed.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", host], capture_output=True)
        for device in ("smog-veth0", "smog-veth1", BRIDGE):
            subprocess.run(["ip", "link", "delete", device], capture_output=True)


@contextmanager
def ssh_server(folder: Path, host: str) -> Iterator[None]:
    """An sshd in a host's namespaces, which its children inherit with the host's name."""
    os.makedirs("/run/sshd", exist_ok=True)
    options = [
        f"ListenAddress={HOSTS[host]}",
        f"HostKey={folder / 'key'}",
        f"AuthorizedKeysFile={folder / 'key.pub'}",
        "StrictModes=no",
        "PidFile=none",
        "UsePAM=no",
        "PermitRootLogin=prohibit-password",
    ]
    arguments = " ".join(f"-o {option}" for option in options)
    start = f"hostname {host}; exec /usr/sbin/sshd -D -e -f /dev/null {arguments}"
    command = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", start]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def write_tools(folder: Path) -> Path:
    """Keys, an ssh that uses them, and an interpreter path of this run's own.

    DeepSpeed ends a job on a host by the path of its interpreter: that of other runs must differ.
    """
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    options = {
        "IdentityFile": str(folder / "key"),
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
        "ServerAliveInterval": "2",  # else pdsh waits for hours for a host that is gone
        "ServerAliveCountMax": "3",
    }
    flags = " ".join(f"-o {name}={value}" for name, value in options.items())
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    (bin_folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh {flags} "$@"\n')
    (bin_folder / "ssh").chmod(0o755)
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "lib").symlink_to(Path(sys.prefix) / "lib")
    (venv / "pyvenv.cfg").write_bytes((Path(sys.prefix) / "pyvenv.cfg").read_bytes())
    (venv / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    return venv / "bin" / "python"


class Cluster:
    """Starts runs from the first host.

    Args:
        folder: for everything.
        overrides: of the small recipe.
    """

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder, self.overrides = folder, overrides
        self.python = write_tools(folder)
        self.recipe = write_small_recipe(folder / "job", make_dataset(folder / "data"))
        self.run_dir = folder / "job" / "run"
        environment = ["DS_ACCELERATOR=cpu", "GLOO_SOCKET_IFNAME=eth0", "OMP_NUM_THREADS=1"]
        environment += [f"PYTHONPATH={ROOT}", f"PATH={Path(sys.executable).parent}:/usr/bin:/bin"]
        (folder / ".deepspeed_env").write_text("\n".join(environment) + "\n")

    def start(self, hosts: list[str], port: int) -> subprocess.Popen[bytes]:
        """The deepspeed command with a hostfile of these hosts."""
        hostfile = self.folder / f"hostfile-{len(hosts)}"
        hostfile.write_text("".join(f"{HOSTS[host]} slots=1\n" for host in hosts))
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        command = ["ip", "netns", "exec", "host-a", "unshare", "--uts", "sh", "-c"]
        command += ['hostname host-a; exec "$@"', "sh", str(self.python), deepspeed]
        command += ["--hostfile", str(hostfile), "--master_addr", HOSTS["host-a"]]
        command += ["--master_port", str(port), str(ROOT / "launcher" / "pretrain.py")]
        command += [str(self.recipe), *self.overrides]
        environment = os.environ | {
            "HOME": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with open(self.folder / f"console-{len(hosts)}.log", "wb") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def console(self, num_hosts: int) -> str:
        return (self.folder / f"console-{num_hosts}.log").read_text(errors="replace")

    def step(self) -> int:
        """The last one in metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return json.loads(whole[-1])["step"] if whole else 0


def wait_for_step(cluster: Cluster, job: subprocess.Popen[bytes], step: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while cluster.step() < step:
        if job.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the run did not reach step {step}:\n{cluster.console(2)[-4000:]}")
        time.sleep(0.1)


def cut(cluster: Cluster, deadline_s: int) -> tuple[int, bool]:
    """The step at which the link was cut, and whether the job ended in time and named the host."""
    job = cluster.start(list(HOSTS), 29611)
    wait_for_step(cluster, job, 8)
    sh("ip", "-n", "host-b", "link", "set", "eth0", "down")
    cut_at, step, said_s = time.monotonic(), cluster.step(), None
    while (status := job.poll()) is None and time.monotonic() < cut_at + PATIENCE_S:
        if said_s is None and "error: deadlines" in cluster.console(2):
            said_s = time.monotonic() - cut_at
        time.sleep(0.1)
    seconds = time.monotonic() - cut_at
    said = re.search(r"error: deadlines.*?(?=;|\n)", cluster.console(2))
    text = said.group() if said else cluster.console(2)[-3000:]
    print(f"link of host-b cut after step {step}; {said_s or 0:.1f} s later: {text}")
    print(f"the job ended {seconds:.1f} s after the cut, {status=}", flush=True)
    return step, status != 0 and seconds <= deadline_s and "rank 1 on host-b" in text


def go_on(cluster: Cluster, step: int) -> bool:
    """The same command with a hostfile of the first host."""
    status = cluster.start(["host-a"], 29612).wait(PATIENCE_S)
    resumed = re.search(r"resuming .* after step (\d+)", cluster.console(1))
    if status or resumed is None:
        print(f"host-a alone: {status=}\n{cluster.console(1)[-3000:]}")
        return False
    lost = step - int(resumed.group(1))
    print(f"host-a alone: {lost} steps lost; went on to step {cluster.step()}")
    return cluster.step() == NUM_STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deadline", type=int, default=30, help="of a step, in seconds")
    parser.add_argument("--engine", default="ddp")
    arguments = parser.parse_args()
    overrides = [
        f"run.steps={NUM_STEPS}",
        "run.checkpoint_every=5",
        f"engine.kind={arguments.engine}",
    ]
    phases = ("data", "step", "kmeans", "saving")
    overrides += [f"deadlines.{phase}_s={arguments.deadline}" for phase in phases]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = Cluster(folder, overrides)
        stack.enter_context(network())
        for host in HOSTS:
            stack.enter_context(ssh_server(folder, host))
        time.sleep(1)  # until they listen
        step, is_good = cut(cluster, arguments.deadline)
        raise SystemExit(not (go_on(cluster, step) and is_good))


if __name__ == "__main__":
    main()
