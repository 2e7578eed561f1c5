"""A run beside a watcher that is killed, and a Hub that refuses, freezes, goes away and is replaced by an empty one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.servers.hubwriting import Fault, WritableHub, serve_writable_hub
from tests.trained import load_safetensors, same

REPO = "org/run"
# The client's pauses between its tries are shortened as the hour is; everything else is the command as it is.
WATCH = """
import sys, time, types
import huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 20), time=time.time)
from dsconv.cli import main
main(sys.argv[1:])
"""
TOLD = re.compile(
    r"^Error: (checkpoint-\d+).*: .*(?:was deleted before it could be merged|was dropped, since|not seen)"
)
FOREVER = 1 << 30
SECONDS = 120  # for a loaded machine


@dataclass
class Hour:
    """What became of each checkpoint: how often each was pushed, and which losses the watcher told of."""

    saved: list[str] = field(default_factory=list)
    pushed: Counter[str] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)  # commits that are no checkpoint's weights
    kills: int = 0
    code: int = -1  # of the last ``watch --once``
    log: str = ""

    @property
    def problems(self) -> list[str]:
        """What must not be."""
        twice = [f"{name} was pushed {count} times" for name, count in self.pushed.items() if count > 1]
        silent = [
            f"{name} is lost in silence" for name in self.saved if not self.pushed[name] and name not in self.told
        ]
        both = [f"{name} was pushed and told to be lost" for name in self.told if self.pushed[name]]
        return [*twice, *silent, *both, *self.wrong, *([] if self.code == 0 else [f"--once ended with {self.code}"])]


class Watching:
    """The watcher, which is started again whenever it was killed."""

    def __init__(self, run: Path, hub: WritableHub, home: Path) -> None:
        self.log = home / "watch.log"
        self.command = [sys.executable, "-c", WATCH, "watch", str(run), "--push-to-hub", REPO, "--interval", "0.2"]
        self.environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_ETAG_TIMEOUT": "2",
        }  # fmt: skip
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(SECONDS)

    def once(self) -> int:
        with self.log.open("ab") as log:
            command = [*self.command, "--once"]
            return subprocess.run(command, stdout=log, stderr=log, env=self.environment, check=False).returncode


def live(home: Path, saves: int, every: float, kills: int, deepspeed: bool = False, seed: int = 0) -> Hour:
    """Let ``saves`` checkpoints come and go, ``every`` so many seconds, while the watcher is killed ``kills`` times."""
    run, truths = home / "run", home / "truths"
    truths.mkdir(parents=True)
    run.mkdir()
    chosen, hour = random.Random(seed), Hour()
    with serve_writable_hub(home / "hub") as hub:
        watching = Watching(run, hub, home)
        training = subprocess.Popen(
            [sys.executable, "-m", "tests.hour.training", str(run), str(truths), "--saves", str(saves),
             "--every", str(every), "--deepspeed" if deepspeed else "--plain"],
            stdout=subprocess.DEVNULL, stderr=(home / "training.log").open("wb"),
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip

        def saved() -> int:
            return len(list(truths.glob("checkpoint-*.safetensors")))

        def wait_for(count: int) -> None:
            end = time.monotonic() + SECONDS
            while saved() < count and training.poll() is None and time.monotonic() < end:
                time.sleep(0.02)

        phases = (refuse, freeze, go_away, replace, heal)
        turns: list[tuple[float, Callable[[WritableHub], None] | None]] = [
            (saves * (number + 1) / (len(phases) + 1), phase) for number, phase in enumerate(phases)
        ]
        turns += [(chosen.uniform(3.5, saves), None) for _ in range(kills)]
        for at, phase in sorted(turns, key=lambda turn: turn[0]):
            wait_for(int(at))
            time.sleep(every * (at % 1))
            if phase is not None:
                phase(hub)
                continue
            watching.kill()
            hour.kills += 1
            time.sleep(chosen.uniform(0, 2 * every))
            watching.process = watching.start()
        hour.code = training.wait(SECONDS * 3)
        assert hour.code == 0, (home / "training.log").read_text()[-3000:]
        heal(hub)
        watching.kill()
        hour.code = watching.once()
        judge(hour, hub, truths, watching.log)
    return hour


def refuse(hub: WritableHub) -> None:
    hub.faults = [Fault("/commit/", 503, 2), Fault("/lfs/", 500, 2), Fault("/api/", 429, 3, {"Retry-After": "1"})]


def freeze(hub: WritableHub) -> None:
    """Requests are taken and not answered, until the Hub is healed."""
    released = threading.Event()
    hub.faults = [Fault(".", released, FOREVER)]


def go_away(hub: WritableHub) -> None:
    _release(hub)
    hub.faults = [Fault(".", "drop", FOREVER)]


def replace(hub: WritableHub) -> None:
    """The same address is another Hub from now on, which has nothing."""
    _release(hub)
    hub.repos.clear()
    hub.objects.clear()
    hub.faults = []


def heal(hub: WritableHub) -> None:
    _release(hub)
    hub.faults = []


def _release(hub: WritableHub) -> None:
    for fault in hub.faults:
        if isinstance(fault.what, threading.Event):
            fault.what.set()


def judge(hour: Hour, hub: WritableHub, truths: Path, log: Path) -> None:
    """Compare each commit with the weights that the training held when it saved."""
    held = {path.stem: load_safetensors(path) for path in truths.glob("checkpoint-*.safetensors")}
    hour.saved = sorted(held, key=lambda name: int(name.rpartition("-")[2]))
    hour.log = log.read_text()
    hour.told = {match[1] for line in hour.log.splitlines() if (match := TOLD.match(line))}
    for folder in sorted((hub.base / REPO).iterdir(), key=lambda path: int(path.name)):
        if not (folder / "model.safetensors").is_file():
            continue  # the commit that makes the repository
        found = load_safetensors(folder)
        names = [
            name for name, truth in held.items() if all(key in truth and same(found[key], truth[key]) for key in found)
        ]
        if len(names) == 1:
            hour.pushed[names[0]] += 1
        else:
            hour.wrong.append(f"commit {folder.name} holds the weights of {names or 'no checkpoint'}")
