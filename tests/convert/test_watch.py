"""A watcher beside a run: each checkpoint once, in order, whatever is killed, half written or away in between."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsconv.convert.marked_folders import MarkedFolder
from dsconv.convert.watch import FAILED, PUSHED, WAITING, Event, Watcher, locked_home, watch
from dsconv.errors import CheckpointNotFoundError, DsconvError, MalformedError, OutputError, RemoteError
from tests.servers.hubwriting import Fault, Shell, WritableHub, download
from tests.trained import Trained, load_safetensors

CASES = ("llama_tied-z3-bf16-w2", "llama_tied-z1-bf16-w3", "llama_tied-z2-fp32-w1", "llama_tied-z0-bf16-w2")
SECONDS = 60  # for a loaded machine


class Run:
    """A run's save dir, into which real checkpoints are put as a trainer would."""

    def __init__(self, folder: Path, trained: Callable[[str], Trained]) -> None:
        self.folder = folder
        self.trained = trained
        folder.mkdir()
        shutil.copy(trained(CASES[0]).checkpoint / "config.json", folder)

    def save(self, step: int, case: str = CASES[0], latest: bool = True) -> Path:
        """Put a checkpoint of ``case`` in place, and let ``latest`` name it."""
        target = self.folder / f"global_step{step}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in (self.trained(case).checkpoint / "global_step2").iterdir():
            shutil.copyfile(path, target / path.name)  # with the times of now
        if latest:
            self.name(step)
        return target

    def name(self, step: int) -> None:
        (self.folder / "latest").write_text(f"global_step{step}")

    def state(self) -> dict[str, str]:
        noted = json.loads((self.folder / ".dsconv-watch" / "org--new" / "state.json").read_text())
        return {name: item["outcome"] for name, item in noted.items()}


@pytest.fixture
def run(tmp_path: Path, trained: Callable[[str], Trained]) -> Run:
    return Run(tmp_path / "run", trained)


@pytest.fixture
def home(run: Run) -> Iterator[MarkedFolder]:
    """The watcher's own folder, locked."""
    with locked_home(run.folder, "org/new") as found:
        yield found


class Process:
    """A watcher of its own, and its lines as they come."""

    def __init__(self, shell: Shell, run: Run, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "dsconv",
            "watch",
            str(run.folder),
            "--push-to-hub",
            "org/new",
            "--interval",
            "0.1",
            *arguments,
        ]
        environment = {**os.environ, **shell.environment, "HF_HUB_DISABLE_XET": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def next(self) -> str:
        return self.lines.get(timeout=SECONDS)

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


@pytest.fixture
def start(hub: WritableHub, run: Run, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def make(*arguments: str) -> Process:
        processes.append(Process(Shell(hub, tmp_path), run, *arguments))
        return processes[-1]

    yield make
    for process in processes:
        process.kill()


def test_each_checkpoint_once_through_kills(
    hub: WritableHub, run: Run, start: Callable[..., Process], trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    run.save(10, CASES[0])
    first = start("--private")
    assert first.next().startswith("global_step10 (step 2) → org/new: http")
    trained(CASES[0]).check(load_safetensors(hub.head("org/new")))
    assert hub.is_private("org/new")

    second = Shell(hub, tmp_path)("watch", run.folder, "--push-to-hub", "org/new")
    assert second.code == 3
    assert "another watcher pushes this run to org/new" in second.err

    whole = run.save(20, CASES[1], latest=False)  # still being written when `latest` moves: a file is short
    shard = next(whole.glob("*optim_states.pt"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    run.name(20)
    line = first.next()
    assert line.startswith("Error: global_step20: ")
    assert shard.name in line
    assert line.endswith("(tried again when its files change)\n")
    shard.write_bytes(data)
    assert first.next().startswith("global_step20 ")
    trained(CASES[1]).check(load_safetensors(hub.head("org/new")))

    first.kill()
    assert len(hub.commits) == 3
    run.save(30, CASES[2])  # while nobody watches
    run.save(40, CASES[3])
    # The worst moment: the Hub has the commit of step 30, the state does not say so.
    process = start("--private")
    hub.faults = [Fault("/commit/", process.kill)]
    process.process.wait(SECONDS)
    assert len(hub.commits) == 4
    assert run.state() == {"global_step10": "pushed", "global_step20": "pushed"}
    third = start("--private")
    assert [third.next().split()[0] for _ in range(2)] == ["global_step30", "global_step40"]
    assert len(hub.commits) == 5
    trained(CASES[3]).check(load_safetensors(hub.head("org/new")))
    assert third.kill(signal.SIGTERM) == 128 + signal.SIGTERM
    assert list(run.state().values()) == ["pushed"] * 4
    left = {path.name for path in (run.folder / ".dsconv-watch" / "org--new").iterdir()}
    assert left == {"lock", "state.json"}
    card = (hub.head("org/new") / "README.md").read_text()
    assert card.count("## The weights") == 1


def outcomes(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.name, event.outcome) for event in events]


def test_what_was_there_and_what_comes(hub: WritableHub, run: Run) -> None:
    for step in (2, 4, 6):
        run.save(step)
    run.name(4)  # 6 is still being written
    assert outcomes(watch(run.folder, "org/new", once=True)) == [("global_step4", PUSHED)]
    assert run.state() == {"global_step2": "was there before", "global_step4": PUSHED}
    assert watch(run.folder, "org/new", once=True) == []
    run.name(6)
    (event,) = watch(run.folder, "org/new", once=True)
    assert (event.name, event.outcome, event.step) == ("global_step6", PUSHED, 2)
    run.save(4, CASES[1])  # the run went back, and saves the step again
    assert outcomes(watch(run.folder, "org/new", once=True)) == [("global_step4", PUSHED)]
    assert len(hub.commits) == 4
    shutil.rmtree(run.folder / "global_step2")
    assert watch(run.folder, "org/new", once=True) == []
    assert outcomes(watch(run.folder, "org/second", once=True, dtype="bf16")) == [("global_step4", PUSHED)]


def test_nothing_is_taken_before_a_second_look(hub: WritableHub, run: Run, home: MarkedFolder) -> None:
    watcher = Watcher(run.folder, home, "org/new", False, {})
    assert list(watcher.look()) == []  # nothing there: what comes now is new
    run.save(2)
    target = run.save(4)
    assert list(watcher.look()) == []
    assert list(watcher.look()) != []
    os.utime(next(target.iterdir()))
    assert run.state() == {"global_step2": PUSHED}
    assert list(watcher.look()) == []
    assert outcomes(list(watcher.look())) == [("global_step4", PUSHED)]


def test_while_the_hub_is_away(hub: WritableHub, run: Run, home: MarkedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher(run.folder, home, "org/new", False, {})
    assert list(watcher.look()) == []
    run.save(2)
    run.save(4, CASES[1])
    hub.faults = [Fault("/api/", 503, 10_000)]
    (event,) = watcher.look(settled=True)
    assert (event.name, event.outcome, isinstance(event.error, RemoteError)) == ("global_step2", WAITING, True)
    assert list(watcher.look(settled=True)) == []  # said once
    merged = next((run.folder / ".dsconv-watch" / "org--new" / "merged").iterdir())
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert list(watcher.look(settled=True)) == []
    assert (merged / "model.safetensors").stat().st_mtime_ns == written  # not merged again for each try
    hub.faults = []
    assert outcomes(list(watcher.look(settled=True))) == [("global_step2", PUSHED), ("global_step4", PUSHED)]
    assert not merged.parent.exists()


def test_what_cannot_be_merged(hub: WritableHub, run: Run, tmp_path: Path) -> None:
    assert watch(run.folder, "org/new", once=True) == []
    bad = run.save(2)
    next(bad.glob("*model_states.pt")).unlink()
    run.save(4)
    failed, pushed = watch(run.folder, "org/new", once=True)
    assert (failed.name, failed.outcome, pushed.name, pushed.outcome) == (
        "global_step2",
        FAILED,
        "global_step4",
        PUSHED,
    )
    assert isinstance(failed.error, DsconvError)
    assert watch(run.folder, "org/new", once=True) == []  # not again, as it is
    ran = Shell(hub, tmp_path)("watch", run.folder, "--push-to-hub", "org/third", "--once", HF_HUB_DISABLE_XET="1")
    assert (ran.code, ran.out.split()[0]) == (0, "global_step4")
    run.save(6)
    (run.folder / "global_step6" / "mp_rank_00_model_states.pt").unlink(missing_ok=True)
    for path in (run.folder / "global_step6").glob("*model_states.pt"):
        path.write_bytes(b"x")
    ran = Shell(hub, tmp_path)("watch", run.folder, "--push-to-hub", "org/third", "--once", HF_HUB_DISABLE_XET="1")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("Error: global_step6: ")


def test_a_trainers_folder(hub: WritableHub, run: Run, tmp_path: Path) -> None:
    """checkpoint-N, each with its own `latest`; the one without trainer_state.json is still being written."""
    for step in (5, 10, 20):
        target = run.folder / f"checkpoint-{step}"
        run.save(step)
        target.mkdir()
        (run.folder / f"global_step{step}").rename(target / f"global_step{step}")
        (run.folder / "latest").rename(target / "latest")
        shutil.copy(run.folder / "config.json", target)
        if step != 20:
            (target / "trainer_state.json").write_text("{}")
    assert outcomes(watch(run.folder, "org/new", once=True)) == [("checkpoint-10", PUSHED)]
    (run.folder / "checkpoint-20" / "trainer_state.json").write_text("{}")
    assert outcomes(watch(run.folder, "org/new", once=True)) == [("checkpoint-20", PUSHED)]
    assert set(download(hub, "org/new", tmp_path / "back")) == {
        "README.md",
        "config.json",
        "dsconv.manifest.json",
        "model.safetensors",
    }


def test_what_a_watcher_refuses(hub: WritableHub, run: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no such folder; what is watched is a run's save dir"):
        watch(tmp_path / "no", "org/new", once=True)
    with pytest.raises(ValueError, match="a repository of the Hub is written org/model"):
        watch(run.folder, "new", once=True)
    home = run.folder / ".dsconv-watch" / "org--new"
    with locked_home(run.folder, "org/new"):
        pass
    for text in ("{", "[]", '{"a": 1}'):
        (home / "state.json").write_text(text)
        with pytest.raises(MalformedError, match=r"state\.json: .*take it away to begin with the newest"):
            watch(run.folder, "org/new", once=True)
    (run.folder / ".dsconv-watch" / "org--second").write_text("a file")
    with pytest.raises(OutputError, match="org--second is a file, and dsconv keeps a folder of that name there"):
        watch(run.folder, "org/second", once=True)
