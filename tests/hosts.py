"""Machines of one's own on one machine: hosts with an address, a /tmp and processes of their own.

A host is a process in new namespaces, the first one of its PID namespace: when it ends, the kernel
ends everything that ever ran on the host and takes its network and mounts away. It ends when its
standard input closes, so whatever becomes of the test, nothing is left. Hosts share the Python
environment and one folder, as machines share an NFS mount; home, /tmp, /run and /dev/shm are each
host's own.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HOME = "/srv/home"
READY_TIMEOUT_S = 30.0
LOG_TAIL = 6000

# Waits for the end of its input, and reaps, as the first process of a machine must.
_INIT = """
import os, signal, sys
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, reap)
print("ready", flush=True)
sys.stdin.read()
"""


def why_not(tools: Sequence[str]) -> str | None:
    """Why this machine cannot play several, for a skip; None where it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    needed = ("ip", "unshare", "nsenter", *tools)
    if missing := [tool for tool in needed if find(tool) is None]:
        return f"needs {', '.join(missing)} (apt install iproute2 openssh-server rsync)"
    try:
        with network({"probe": "192.0.2.1"}) as hosts:
            hosts["probe"].run("true", timeout_s=10)
    except (subprocess.SubprocessError, OSError, AssertionError) as error:
        return f"namespaces are not allowed here: {error}"
    return None


def find(tool: str) -> str | None:
    """Path of an executable, in the system's folders too."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine.

    `pid` is its first process as seen from outside, `folder` holds its home as `home`, seen from
    outside too.
    """

    name: str
    address: str
    pid: int
    folder: Path
    switch_pid: int
    background: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def command(self, script: str) -> list[str]:
        """The command that runs a shell script on this host, in its home."""
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        environment = [f"HOME={HOME}", f"PATH={path}", "LANG=C.UTF-8", "TERM=dumb"]
        inside = ["env", "-i", *environment, "bash", "-c", f"cd {HOME}; {script}"]
        return [*_enter(self.pid, "--net", "--mount", "--pid", "--uts", "--ipc"), *inside]

    def start(self, script: str, log: Path) -> "subprocess.Popen[bytes]":
        """Run a script in the background, until the host ends; its output goes to `log`."""
        process = _start(self.command(script), log)
        self.background.append(process)
        return process

    def run(self, script: str, *, timeout_s: float) -> str:
        """What a script prints; an AssertionError with all of it where the script fails."""
        said = self.folder / "last-command.log"
        said.unlink(missing_ok=True)
        with _start(self.command(script), said) as process:
            try:
                status = process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                status = None
        text = said.read_text(errors="replace")
        how = f"took longer than {timeout_s:.0f} s" if status is None else f"ended with {status}"
        assert status == 0, f"{self.name}: {script!r} {how}:\n{text[-LOG_TAIL:]}"
        return text

    def unplug(self) -> None:
        """Cut the host off: its link goes down."""
        _ip(self.switch_pid, f"link set {_port(self.name)} down")

    def plug(self) -> None:
        """Join it to the others again."""
        _ip(self.switch_pid, f"link set {_port(self.name)} up")


@contextlib.contextmanager
def network(
    addresses: dict[str, str], *, folder: Path | None = None, user: str = "root", shared: str = ""
) -> Iterator[dict[str, Host]]:
    """Hosts by name on one network of 24 bits; they are gone afterwards.

    Args:
        addresses: IPv4 address of each host by name; all in one /24.
        folder: where the hosts keep their files, `folder`/NAME; none keeps nothing.
        user: the one account of the hosts.
        shared: absolute path below /srv at which all hosts see `folder`/shared.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(_scratch()))
        hosts: dict[str, Host] = {}
        stack.callback(_await_ends, hosts)
        switch = stack.enter_context(_machine("unshare", "--net"))
        _ip(switch, "link add name bridge type bridge")
        _ip(switch, "link set bridge up")
        for name, address in addresses.items():
            place = folder / name
            script = _mounts(name, place, addresses, user=user, shared=shared)
            flags = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
            pid = stack.enter_context(_machine("unshare", *flags, script=script))
            port = _port(name)
            _ip(switch, f"link add {port} type veth peer name eth0 netns {pid}")
            _ip(switch, f"link set {port} master bridge up")
            _ip(pid, f"address add {address}/24 dev eth0")
            _ip(pid, "link set eth0 up")
            _ip(pid, "link set lo up")
            hosts[name] = Host(name=name, address=address, pid=pid, folder=place, switch_pid=switch)
        yield hosts


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    folder = subprocess.check_output(["mktemp", "-d"], text=True).strip()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _machine(*unshare: str, script: str = "") -> Iterator[int]:
    """A process in namespaces of its own that has run `script` there; its pid from outside."""
    init = shlex.join([sys.executable, "-I", "-S", "-c", _INIT])
    with subprocess.Popen(
        [*unshare, "bash", "-ec", f"{script}\nexec {init}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            said = process.stdout.readline()
            assert said == "ready\n", f"no new machine: {said}{process.stdout.read()}"
            yield _child(process.pid) if "--fork" in unshare else process.pid
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=READY_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()  # --kill-child takes the host's first process with it


def _await_ends(hosts: dict[str, Host]) -> None:
    for host in hosts.values():
        for process in host.background:
            process.wait(timeout=READY_TIMEOUT_S)


def _start(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _child(pid: int) -> int:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < deadline, f"process {pid} has no child"
        time.sleep(0.01)
    return int(children[0])


def _mounts(name: str, place: Path, addresses: dict[str, str], *, user: str, shared: str) -> str:
    """What a host does first: folders of its own in place of the machine's."""
    for part in ("home", "tmp", "etc"):
        (place / part).mkdir(parents=True, exist_ok=True)
    (place.parent / "shared").mkdir(exist_ok=True)
    # The account is root under the name that the test wants, with a home of this host's.
    others = [
        line
        for line in Path("/etc/passwd").read_text().splitlines()
        if not line.startswith((f"{user}:", "root:"))
    ]
    accounts = [f"{user}:x:0:0::{HOME}:/bin/bash", *others]
    (place / "etc/passwd").write_text("\n".join(accounts) + "\n")
    names = [f"{address} {host}" for host, address in addresses.items()]
    (place / "etc/hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
    lines = [
        "mount --make-rprivate /",
        f"hostname {shlex.quote(name)}",
        "mount -t tmpfs tmpfs /srv",
        *_bind(place / "home", HOME),
        *_bind(place / "tmp", "/srv/tmp"),
        *(_bind(place.parent / "shared", shared) if shared else ()),
    ]
    # What lies in /tmp and is needed must not vanish under the host's own.
    kept = [path for path in _environment() if path.is_relative_to("/tmp")]
    for number, path in enumerate(kept):
        lines += _bind(path, f"/srv/kept/{number}")
    lines += [
        f"mount --bind {shlex.quote(str(place / 'etc/passwd'))} /etc/passwd",
        f"mount --bind {shlex.quote(str(place / 'etc/hosts'))} /etc/hosts",
        "mount --move /srv/tmp /tmp",
        "chmod 1777 /tmp",
    ]
    for number, path in enumerate(kept):
        lines += _bind(Path(f"/srv/kept/{number}"), str(path))
    lines += [
        "mount -t tmpfs tmpfs /run",
        "mkdir -m 0755 /run/sshd",
        "mount -t tmpfs tmpfs /dev/shm",
        "mount -t proc proc /proc",
    ]
    return "\n".join(lines)


def _environment() -> list[Path]:
    """Folders without which there is no Python on a host."""
    return [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]


def _bind(source: Path, target: str) -> list[str]:
    quoted = shlex.quote(target)
    return [f"mkdir -p {quoted}", f"mount --bind {shlex.quote(str(source))} {quoted}"]


def _enter(pid: int, *namespaces: str) -> list[str]:
    return ["nsenter", "--target", str(pid), *namespaces, "--"]


def _ip(pid: int, command: str) -> None:
    """Run `ip` in the network of a process."""
    done = subprocess.run(
        [*_enter(pid, "--net"), find("ip") or "ip", *command.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"ip {command}: {done.stderr.strip()}"


def _port(name: str) -> str:
    """The host's end at the switch; the kernel takes 15 characters."""
    return f"to-{name}"[:15]
