"""Two hosts on one machine: each has its own network, processes, host name, /etc and sshd.

A host is a tree of processes in Linux namespaces of its own; its first process is the sshd, with
which the kernel ends all others. Needs root and Debian's openssh-server, pdsh and iproute2.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))
from ports import free_port

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
HOSTS = {"host-a": "10.77.41.1", "host-b": "10.77.41.2"}
PROGRAMS = (
    "sshd",
    "ssh",
    "ssh-keygen",
    "pdsh",
    "ip",
    "tc",
    "unshare",
    "nsenter",
    "setpriv",
    "taskset",
)
PATIENCE_S = 1200.0  # it guards against a hang, not against a busy machine
DEEPSPEED = (BIN / "deepspeed",)
FORWARDED = {  # to the programs on the hosts
    "PATH": f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}

# /etc is a layer of the host's own over the machine's: names, ssh's settings and injected faults.
FIRST_PROCESS = """
set -e
hostname {name}
mount -t tmpfs tmpfs {folder}
mkdir -p {folder}/upper {folder}/work {folder}/scratch /run/sshd
mount -t overlay overlay -o lowerdir=/etc,upperdir={folder}/upper,workdir={folder}/work /etc
cp {common}/hosts /etc/hosts
cp {common}/ssh_config /etc/ssh/ssh_config
cp {common}/sshd_config {common}/key {folder}/
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""
SSHD_CONFIG = """
ListenAddress 0.0.0.0
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
UsePAM no
MaxStartups 100
PermitRootLogin prohibit-password
"""
# The last two lines: without them pdsh waits for hours for a host that is gone.
SSH_CONFIG = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 30
  ServerAliveInterval 2
  ServerAliveCountMax 3
"""


def why_not() -> str | None:
    """What this machine lacks for two hosts; None if it lacks nothing."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "two hosts need root on Linux"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        advice = "apt-get install openssh-server pdsh iproute2 util-linux"
        return f"two hosts need {', '.join(missing)}: {advice}"
    trial = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(trial, capture_output=True).returncode:
        return "two hosts need Linux namespaces, which this machine refuses"
    return None


class Host:
    """One of them.

    Args:
        name: its host name, a key of HOSTS.
        folder: for its files.
        pid: of its first process, as this machine numbers it.
    """

    def __init__(self, name: str, folder: Path, pid: int):
        self.name, self.folder, self.pid = name, folder, pid
        self.cpu = cpu_of(name)
        self.address = HOSTS[name]

    def command(self, *command: str | Path) -> list[str]:
        """What starts a command on this host, in the working folder of the caller."""
        enter = [
            "taskset",
            "-c",
            self.cpu,
            "nsenter",
            "-t",
            str(self.pid),
            "-n",
            "-u",
            "-m",
            "-p",
            "sh",
            "-c",
        ]
        return [*enter, 'cd "$0" && exec "$@"', os.getcwd(), *map(str, command)]

    def sh(self, script: str) -> str:
        """Runs a line of shell on this host; returns its output."""
        ended = subprocess.run(self.command("sh", "-c", script), capture_output=True, text=True)
        assert ended.returncode == 0, f"{self.name}: {script}: {ended.stderr}"
        return ended.stdout

    def start(
        self, command: Sequence[str | Path], folder: Path, log: Path, **environment: str
    ) -> "subprocess.Popen[bytes]":
        """Starts a command on this host, its output in a file."""
        run = 'cd "$0" && exec "$@"'
        with open(log, "wb") as file:
            return subprocess.Popen(
                self.command("sh", "-c", run, folder, *command),
                env=_environment() | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def signal(self, job: "subprocess.Popen[bytes]", name: str) -> None:
        """Sends a signal to what `start` started, as a terminal or a scheduler would."""
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        subprocess.run(["kill", f"-{name}", *children], check=True)

    def processes(self) -> list[str]:
        """Command lines of all Python processes of this host."""
        lines = self.sh("for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done 2>&1")
        return [line for line in lines.splitlines() if "python" in line and "/proc/" not in line]


def cpu_of(name: str) -> str:
    """The processor of a host: its own, where there are two."""
    cpus = sorted(os.sched_getaffinity(0))
    return str(cpus[list(HOSTS).index(name) % len(cpus)])


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Starts both and ends them, with everything that runs on them.

    Args:
        folder: where hosts keep their files; both see it.
    """
    _write_common(folder)
    with ExitStack() as stack:
        hosts = [stack.enter_context(_host(name, folder)) for name in HOSTS]
        a, b = hosts
        link = ["ip", "link", "add", "eth0", "netns", str(a.pid), "type", "veth"]
        link += ["peer", "name", "eth0", "netns", str(b.pid)]
        subprocess.run(link, check=True)
        for host in hosts:
            host.sh(f"ip address add {host.address}/24 dev eth0")
            host.sh("ip link set lo up; ip link set eth0 up")
        for other in (a.name, b.name):
            _wait_for(lambda other=other: _answers(a, other), f"no ssh to {other}")
        yield hosts


@contextmanager
def _host(name: str, folder: Path) -> Iterator[Host]:
    own = folder / name
    own.mkdir()
    script = FIRST_PROCESS.format(name=name, folder=own, common=folder)
    namespaces = ["--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
    # The host ends with the process that started it, however that one ends.
    command = [
        "taskset",
        "-c",
        cpu_of(name),
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        *namespaces,
        "--mount-proc",
    ]
    with open(folder / f"{name}.log", "wb") as log:
        starter = subprocess.Popen([*command, "sh", "-c", script], stderr=log, env=_environment())
    try:
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")
        _wait_for(lambda: children.read_text().strip(), f"{name} did not start")
        host = Host(name, own, int(children.read_text()))
        server = f"{name} has no sshd: {folder / name}.log"
        names = (b"/usr/sbin/sshd", b"sshd:")  # after the shell has become it
        command_line = Path(f"/proc/{host.pid}/cmdline")
        _wait_for(lambda: command_line.read_bytes().startswith(names), server)
        yield host
    finally:
        starter.kill()
        starter.wait()


def _write_common(folder: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True
    )
    names = "".join(f"{address} {name}\n" for name, address in HOSTS.items())
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + names)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in HOSTS))


def _environment() -> dict[str, str]:
    return os.environ | FORWARDED | {"PYTHONPATH": str(ROOT)}


def _answers(host: Host, other: str) -> bool:
    command = host.command("ssh", "-o", "BatchMode=yes", other, "true")
    return subprocess.run(command, capture_output=True, env=_environment()).returncode == 0


def _wait_for(condition: Callable[[], object], complaint: str, patience_s: float = 120.0) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(complaint)
        time.sleep(0.02)


class Cluster:
    """Starts programs over both hosts.

    Args:
        folder: that both hosts see.
        hosts: of `two_hosts`.
    """

    def __init__(self, folder: Path, hosts: list[Host]):
        self.folder, self.hosts = folder, hosts
        self.hostfile = folder / "hostfile"

    def deepspeed(
        self,
        work: Path,
        *program: str | Path,
        launcher: Sequence[str | Path] = DEEPSPEED,
    ) -> "subprocess.Popen[bytes]":
        """`deepspeed --hostfile` on the first host, in the folder `work`; its console is a file."""
        work.mkdir(parents=True, exist_ok=True)
        (work / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in FORWARDED.items()))
        command = [
            *launcher,
            "--hostfile",
            self.hostfile,
            "--master_port",
            str(free_port()),
            *program,
        ]
        return self.hosts[0].start(command, work, console(work))

    def torchrun(self, work: Path, *program: str | Path) -> "list[subprocess.Popen[bytes]]":
        """`torchrun --nnodes 2` on each host."""
        work.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        jobs = []
        for number, host in enumerate(self.hosts):
            command = [BIN / "torchrun", "--nnodes", "2", "--nproc_per_node", "1"]
            command += ["--node_rank", str(number), "--master_addr", self.hosts[0].name]
            command += ["--master_port", port, *program]
            jobs.append(host.start(command, work, console(work, number)))
        return jobs


def console(work: Path, number: int = 0) -> Path:
    """Where a launcher's output goes."""
    return work / f"console-{number}.log"


def finish(jobs: "Sequence[subprocess.Popen[bytes]]", work: Path) -> int:
    """Waits for launchers; the worst exit status. The test fails if they take too long."""
    end = time.monotonic() + PATIENCE_S
    try:
        return max(abs(job.wait(max(0.1, end - time.monotonic()))) for job in jobs)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"not finished:\n{console(work).read_text()[-3000:]}") from None
    finally:
        for job in jobs:
            job.kill()
