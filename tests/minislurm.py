#!/usr/bin/env python3
"""A throw-away, loopback-only, real Slurm cluster for tests.  Stdlib only.

    python minislurm.py start  ROOT [--nodes 2 --gpus 2]   # idempotent, bounded
    python minislurm.py env    ROOT                        # shell exports
    python minislurm.py status ROOT
    python minislurm.py stop   ROOT                        # by recorded pid only

Everything (config, state, logs, sockets, spool, pid files) lives under ROOT; nothing
under /etc, /var or /run is read or written, so it cannot disturb a real installation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sinfo", "sbatch", "srun", "scontrol", "squeue", "scancel")


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def missing(auth: str = "munge") -> list[str]:
    return [n for n in (*NEEDED, *(("munged",) if auth == "munge" else ())) if _find(n) is None]


def free_ports(n: int) -> list[int]:
    socks = [socket.socket() for _ in range(n)]
    try:
        for s in socks:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in socks]
    finally:
        for s in socks:
            s.close()


def _start_time(pid: int) -> str | None:
    """Kernel start time: pid+starttime names one process for good, pids alone are reused."""
    try:
        raw = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    rest = raw.rpartition(")")[2].split()
    return None if rest[0] == "Z" else rest[19]


class MiniSlurm:
    def __init__(
        self,
        root: str | Path,
        nodes: int = 2,
        cpus: int = 4,
        mem_mb: int = 4000,
        gpus: int = 2,
        auth: str = "munge",
        sacct_shim: bool = True,
    ) -> None:
        self.root = Path(root).resolve()
        self.nodes, self.cpus, self.mem_mb, self.gpus = nodes, cpus, mem_mb, gpus
        self.auth = auth
        self.sacct_shim = sacct_shim
        self.state = self.root / "minislurm.json"
        self.conf = self.root / "slurm.conf"
        self.bin = self.root / "bin"

    # ---- life-cycle ------------------------------------------------------------
    def alive(self) -> bool:
        if not self.state.exists():
            return False
        procs = json.loads(self.state.read_text())
        return bool(procs) and all(_start_time(p["pid"]) == p["start"] for p in procs)

    def start(self, timeout: float = 30.0) -> MiniSlurm:
        if self.alive():
            return self
        if gone := missing(self.auth):
            raise RuntimeError(
                f"Slurm programs not installed: {', '.join(gone)} "
                "(apt-get install slurmctld slurmd slurm-client munge)"
            )
        self.stop()
        for old in ("state", "log", "run", *(f"spool.n{i}" for i in range(1, self.nodes + 1))):
            shutil.rmtree(self.root / old, ignore_errors=True)
        for d in (
            "state",
            "log",
            "run",
            "bin",
            "munge",
            *(f"spool.n{i}" for i in range(1, self.nodes + 1)),
        ):
            (self.root / d).mkdir(parents=True, exist_ok=True)
        (self.root / "munge").chmod(0o700)
        self._write_conf()
        self._procs: list[dict] = []
        deadline = time.monotonic() + timeout
        try:
            if self.auth == "munge":
                self._munge(deadline)
            self._spawn("slurmctld", [_find("slurmctld"), "-D", "-i", "-f", str(self.conf)])
            for i in range(1, self.nodes + 1):
                self._spawn(
                    f"slurmd.n{i}", [_find("slurmd"), "-D", "-N", f"n{i}", "-f", str(self.conf)]
                )
            self._wait_idle(deadline)
        except BaseException:
            self.stop()
            raise
        return self

    def _spawn(self, name: str, argv: list[str]) -> None:
        log = open(self.root / "log" / f"{name}.out", "ab")  # noqa: SIM115 - the daemon's
        # own session: a Ctrl-C in pytest must not reach the daemons before stop() does
        p = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self.env(),
            cwd=self.root,
            start_new_session=True,
        )
        self._procs.append({"name": name, "pid": p.pid, "start": _start_time(p.pid)})
        self.state.write_text(json.dumps(self._procs, indent=1))

    def _munge(self, deadline: float) -> None:
        key = self.root / "munge" / "key"
        if not key.exists():
            key.write_bytes(os.urandom(128))
            key.chmod(0o600)
        m = self.root / "munge"
        sock = m / "socket"
        self._spawn(
            "munged",
            [
                _find("munged"),
                "--foreground",
                "--force",
                f"--key-file={key}",
                f"--socket={sock}",
                f"--pid-file={m}/pid",
                f"--seed-file={m}/seed",
                f"--log-file={m}/log",
                "--num-threads=2",
            ],
        )
        while not sock.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"munged did not open {sock}: {self._tails()}")
            time.sleep(0.02)

    def _wait_idle(self, deadline: float) -> None:
        out = ""
        while time.monotonic() < deadline:
            dead = [p["name"] for p in self._procs if _start_time(p["pid"]) != p["start"]]
            if dead:
                raise RuntimeError(f"{', '.join(dead)} ended at once\n{self._tails()}")
            r = subprocess.run(
                [_find("sinfo"), "-h", "-N", "-p", "main", "-o", "%N %t"],
                env=self.env(),
                capture_output=True,
                text=True,
                timeout=15,
            )
            out = r.stdout + r.stderr
            states = [ln.split()[1] for ln in r.stdout.splitlines()]
            if len(states) == self.nodes and set(states) == {"idle"}:
                return
            time.sleep(0.1)
        raise TimeoutError(f"cluster not idle in time: {out!r}\n{self._tails()}")

    def _tails(self) -> str:
        parts = []
        for f in sorted((self.root / "log").glob("*")):
            parts.append(
                f"--- {f.name}\n" + "\n".join(f.read_text(errors="replace").splitlines()[-8:])
            )
        return "\n".join(parts)

    def stop(self, grace: float = 5.0) -> None:
        if not self.state.exists():
            return
        procs = [
            p for p in json.loads(self.state.read_text()) if _start_time(p["pid"]) == p["start"]
        ]
        if procs:  # end jobs first: a slurmstepd outlives its slurmd otherwise
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                me = ["--user", pwd.getpwuid(os.getuid()).pw_name]
                subprocess.run(
                    [_find("scancel"), "--signal=KILL", "--full", *me],
                    env=self.env(),
                    capture_output=True,
                    timeout=5,
                )
                subprocess.run(
                    [_find("scancel"), *me], env=self.env(), capture_output=True, timeout=5
                )
                end = time.monotonic() + grace
                while (
                    time.monotonic() < end
                    and subprocess.run(
                        [_find("squeue"), "-h", "-o", "%i"],
                        env=self.env(),
                        capture_output=True,
                        timeout=5,
                    ).stdout.strip()
                ):
                    time.sleep(0.1)
        for p in reversed(procs):  # slurmd, slurmctld, munged
            with contextlib.suppress(ProcessLookupError):
                os.kill(p["pid"], signal.SIGTERM)
        end = time.monotonic() + grace
        left = procs
        while left and time.monotonic() < end:
            for p in left:
                with contextlib.suppress(ChildProcessError, OSError):
                    os.waitpid(p["pid"], os.WNOHANG)
            left = [p for p in left if _start_time(p["pid"]) == p["start"]]
            time.sleep(0.05)
        for pid in [p["pid"] for p in left] + self._stepds():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.state.unlink(missing_ok=True)

    def _stepds(self) -> list[int]:
        """slurmstepd processes of this cluster: their environment names our slurm.conf."""
        mark, found = f"SLURM_CONF={self.conf}".encode(), []
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (proc / "comm").read_text().startswith("slurmstepd") and mark in (
                    proc / "environ"
                ).read_bytes().split(b"\0"):
                    found.append(int(proc.name))
        return found

    def __enter__(self) -> MiniSlurm:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # ---- what a client needs ---------------------------------------------------
    def exports(self) -> dict[str, str]:
        path = os.environ.get("PATH", "/usr/bin:/bin")
        return {
            "SLURM_CONF": str(self.conf),
            "PATH": f"{self.bin}:{path}" if str(self.bin) not in path else path,
        }

    def env(self) -> dict[str, str]:
        e = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        return {**e, **self.exports()}

    # ---- configuration -----------------------------------------------------------
    def _write_conf(self) -> None:
        r, host = self.root, socket.gethostname()
        ports = free_ports(1 + self.nodes)
        user = "root" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        lines = [
            "ClusterName=mini",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            # never hand out a job id twice: submitit takes an old <id>_0_result.pkl for the answer
            f"FirstJobId={int(time.time()) % 60_000_000 + 1}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            f"StateSaveLocation={r}/state",
            f"SlurmdSpoolDir={r}/spool.%n",
            f"SlurmctldPidFile={r}/run/slurmctld.pid",
            f"SlurmdPidFile={r}/run/slurmd.%n.pid",
            f"SlurmctldLogFile={r}/log/slurmctld.log",
            f"SlurmdLogFile={r}/log/slurmd.%n.log",
            f"PlugStackConfig={r}/plugstack.conf",
            # no cgroup, no task binding: must run in a container / firecracker VM
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "MpiDefault=none",
            "MailProg=/bin/true",
            "SwitchType=switch/none",
            "PropagateResourceLimits=NONE",
            # more CPUs than there are, per virtual node
            "SlurmdParameters=config_overrides",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core_Memory",
            "DefMemPerCPU=100",
            "SchedulerType=sched/builtin",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0",
            # a preempted job gets its own sbatch --signal (submitit: USR2) instead of TERM
            "SlurmctldParameters=preempt_send_user_signal",
            # finished jobs stay visible to scontrol/squeue (there is no sacct database)
            "MinJobAge=86400",
            "MaxJobCount=10000",
            "InactiveLimit=0",
            "KillWait=3",
            "WaitTime=0",
            "ReturnToService=2",
            "SlurmctldTimeout=60",
            "SlurmdTimeout=60",
            "MessageTimeout=10",
            "JobRequeue=1",
            "RebootProgram=/bin/false",
            # 'urgent' pushes out jobs of 'main', GraceTime seconds after the signal
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
        ]
        # cred_expire (5 is the least) is also how long a requeued job must wait; 120 s by default
        if self.auth == "munge":
            lines += [
                "AuthType=auth/munge",
                "CredType=cred/munge",
                f"AuthInfo=socket={r}/munge/socket,cred_expire=5",
            ]
        else:
            lines += ["AuthType=auth/none", "CredType=cred/none", "AuthInfo=cred_expire=5"]
        gres = f" Gres=gpu:fake:{self.gpus}" if self.gpus else ""
        if self.gpus:
            lines.append("GresTypes=gpu")
            # slurmd wants each File= to be a character device (it never opens it without cgroups);
            # with File= Slurm hands out indices, i.e. CUDA_VISIBLE_DEVICES; Count= alone does not
            gl = [
                f"NodeName=n{n} Name=gpu Type=fake File={self._fake_devices()} Flags=nvidia_gpu_env"
                for n in range(1, self.nodes + 1)
            ]
            (r / "gres.conf").write_text("AutoDetect=off\n" + "\n".join(gl) + "\n")
        for i, port in enumerate(ports[1:], 1):
            lines.append(
                f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
                f"CPUs={self.cpus} RealMemory={self.mem_mb}{gres} State=UNKNOWN"
            )
        names = f"n[1-{self.nodes}]" if self.nodes > 1 else "n1"
        lines += [
            f"PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP "
            "PriorityTier=1 PreemptMode=REQUEUE GraceTime=5",
            f"PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP "
            "PriorityTier=10 PreemptMode=OFF",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        (r / "plugstack.conf").write_text("")
        # slurmd 22.05 always loads a cgroup plugin and dies if it cannot; v1 loads without touching
        # anything where nothing uses it (v2 wants systemd); "disabled" is of later versions
        (r / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        if self.sacct_shim:
            shim = self.bin / "sacct"
            shim.write_text(SACCT_SHIM)
            shim.chmod(0o755)

    def _fake_devices(self) -> str:
        dev = self.root / "fakegpu"
        dev.mkdir(exist_ok=True)
        null = os.stat("/dev/null").st_rdev
        try:
            for g in range(self.gpus):
                node = dev / f"nvidia{g}"
                if not node.is_char_device():
                    node.unlink(missing_ok=True)
                    os.mknod(node, 0o666 | stat.S_IFCHR, null)
            return f"{dev}/nvidia" + (f"[0-{self.gpus - 1}]" if self.gpus > 1 else "0")
        except PermissionError:  # not root: borrow devices that every Linux has
            have = [
                d
                for d in (
                    "/dev/null",
                    "/dev/zero",
                    "/dev/full",
                    "/dev/random",
                    "/dev/urandom",
                    "/dev/tty",
                )
                if Path(d).is_char_device()
            ]
            if self.gpus > len(have):
                raise RuntimeError(
                    f"at most {len(have)} fake GPUs a node without mknod (not root)"
                ) from None
            return ",".join(have[: self.gpus])


# submitit asks `sacct -o JobID,State,NodeList --parsable2 -j ID...` and takes no answer as "still
# going".  Without slurmdbd sacct cannot answer, so a job that dies without writing its result
# (scancel, time limit, SIGKILL) would be waited for for ever.  slurmctld itself knows the state.
SACCT_SHIM = r"""#!/bin/sh
ids=""
while [ $# -gt 0 ]; do
  case "$1" in
    -j|--jobs) ids="${ids:+$ids,}$2"; shift 2;;
    *) shift;;
  esac
done
echo "JobID|State|NodeList"
[ -n "$ids" ] || exit 0
squeue --noheader --states=all --jobs="$ids" --format='%i|%T|%N'
exit 0
"""


def main() -> int:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("action", choices=["start", "stop", "status", "env"])
    ap.add_argument("root")
    ap.add_argument("--nodes", type=int, default=2)
    ap.add_argument("--gpus", type=int, default=2)
    ap.add_argument("--auth", choices=["munge", "none"], default="munge")
    ap.add_argument("--timeout", type=float, default=30)
    ap.add_argument("--no-sacct-shim", action="store_true")
    a = ap.parse_args()
    c = MiniSlurm(a.root, nodes=a.nodes, gpus=a.gpus, auth=a.auth, sacct_shim=not a.no_sacct_shim)
    if a.action == "start":
        t = time.monotonic()
        c.start(a.timeout)
        print(f"up in {time.monotonic() - t:.2f} s", file=sys.stderr)
    elif a.action == "stop":
        c.stop()
    elif a.action == "status":
        print("up" if c.alive() else "down")
        return 0 if c.alive() else 1
    if a.action in ("start", "env"):
        for k, v in c.exports().items():
            print(f"export {k}={v}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
