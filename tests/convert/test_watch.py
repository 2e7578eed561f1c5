"""A watcher beside a run: each checkpoint once, in order, whatever is killed, half written or away in between."""

from __future__ import annotations

import contextlib
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
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from watchdog.events import FileClosedNoWriteEvent, FileModifiedEvent, FileOpenedEvent

from dsconv import merge
from dsconv.convert.marked_folders import MarkedFolder
from dsconv.convert.watch import Watcher, watch
from dsconv.convert.watch_events import DROPPED, FAILED, LOST, PUSHED, SEEN, WAITING, Event, locked_home
from dsconv.convert.watched_run import Signs, files_of, gap_before, signs
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
    assert line.endswith("(will be tried again when its files or the options change)\n")
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
    pushed = [name for name, outcome in run.state().items() if outcome == PUSHED]
    assert pushed == ["global_step10", "global_step20"]
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
    os.utime(next(target.iterdir()))
    assert outcomes(list(watcher.look())) == [("global_step2", PUSHED)]
    assert run.state() == {"global_step2": PUSHED, "global_step4": SEEN}
    assert outcomes(list(watcher.look())) == [("global_step4", PUSHED)]


def copies_of(run: Run) -> list[Path]:
    return sorted((run.folder / ".dsconv-watch" / "org--new").glob("merged-*"))


def test_while_the_hub_is_away(
    hub: WritableHub, run: Run, home: MarkedFolder, trained: Callable[[str], Trained]
) -> None:
    watcher = Watcher(run.folder, home, "org/new", False, {})
    assert list(watcher.look()) == []
    run.save(2)
    run.save(4, CASES[1])
    hub.faults = [Fault("/api/", 503, 10_000)]
    (event,) = watcher.look(settled=True)
    assert (event.name, event.outcome, isinstance(event.error, RemoteError)) == ("global_step2", WAITING, True)
    assert list(watcher.look(settled=True)) == []  # said once
    copies = copies_of(run)
    assert len(copies) == 2, "the second is merged too, since the trainer may take it away"
    written = [(copy / "model.safetensors").stat().st_mtime_ns for copy in copies]
    assert list(watcher.look(settled=True)) == []
    assert [(copy / "model.safetensors").stat().st_mtime_ns for copy in copies] == written, (
        "merged once, not for each try"
    )
    for step in (2, 4):
        shutil.rmtree(run.folder / f"global_step{step}")
    hub.faults = []
    events = list(watcher.look(settled=True))
    assert outcomes(events) == [("global_step2", PUSHED), ("global_step4", PUSHED)]
    assert copies_of(run) == []
    trained(CASES[1]).check(load_safetensors(hub.head("org/new")))


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
    assert watch(run.folder, "org/new", once=True) == []  # not again, as it is, and the newest is pushed
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
    with pytest.raises(CheckpointNotFoundError, match="no such folder; watch the folder in which the trainer saves"):
        watch(tmp_path / "no", "org/new", once=True)
    with pytest.raises(ValueError, match="a repository of the Hub is written org/model"):
        watch(run.folder, "new", once=True)
    home = run.folder / ".dsconv-watch" / "org--new"
    with locked_home(run.folder, "org/new"):
        pass
    for text in ("{", "[]", '{"a": 1}'):
        (home / "state.json").write_text(text)
        with pytest.raises(MalformedError, match=r"state\.json: .*remove it to begin with the newest"):
            watch(run.folder, "org/new", once=True)
    (run.folder / ".dsconv-watch" / "org--second").write_text("a file")
    with pytest.raises(OutputError, match="org--second is a file, and dsconv keeps a folder of that name there"):
        watch(run.folder, "org/second", once=True)
    run.save(2)
    with pytest.raises(CheckpointNotFoundError, match="is one checkpoint: watch the run's folder"):
        watch(run.folder / "global_step2", "org/new", once=True)


def test_a_folder_without_checkpoints_is_not_watched_in_silence(hub: WritableHub, run: Run) -> None:
    said: list[str] = []
    assert watch(run.folder, "org/new", once=True, on_message=said.append) == []
    run.save(2, latest=False)
    run.name(7)
    with pytest.raises(CheckpointNotFoundError, match=r"names 'global_step7', and no checkpoint of that name is there"):
        watch(run.folder, "org/new", once=True, on_message=said.append)
    assert len(said) == 1
    assert "holds no complete checkpoint yet: neither 'latest'" in said[0]


def test_reading_is_no_sign_of_a_new_checkpoint(run: Run) -> None:
    """The watcher reads ``latest`` itself, and the file system tells of that too."""
    run.name(7)
    seen = Signs(run.folder)
    latest = str(run.folder / "latest")
    for event in (FileOpenedEvent(latest), FileClosedNoWriteEvent(latest)):
        seen.dispatch(event)
    assert seen.take() == set()
    seen.dispatch(FileModifiedEvent(latest))
    assert seen.take() == {"global_step7"}


def test_what_goes_away_unmerged_is_told(hub: WritableHub, run: Run, home: MarkedFolder) -> None:
    watcher = Watcher(run.folder, home, "org/new", False, {})
    run.save(2)
    assert list(watcher.look()) == []  # seen, and to be checked again
    shutil.rmtree(run.folder / "global_step2")
    run.save(4)
    watcher = Watcher(run.folder, home, "org/new", False, {})  # a watcher that was started again
    lost, pushed = watcher.look(settled=True)
    assert (lost.name, lost.outcome, str(lost.error)) == (
        "global_step2",
        LOST,
        f"{run.folder / 'global_step2'} was deleted before it could be merged",
    )
    assert (pushed.name, pushed.outcome) == ("global_step4", PUSHED)
    assert list(watcher.look(settled=True)) == [], "told once"


def test_a_checkpoint_that_lives_shorter_than_two_looks(hub: WritableHub, run: Run, home: MarkedFolder) -> None:
    run.save(2)
    watcher = Watcher(run.folder, home, "org/new", False, {})
    assert outcomes(list(watcher.look(settled=True))) == [("global_step2", PUSHED)]
    with signs(run.folder) as seen:
        run.save(4)
        seen.wait(SECONDS)  # the file system's event ends it, not the time
        shutil.rmtree(run.folder / "global_step4")
        run.name(2)
        (lost,) = watcher.look(settled=True, signs=seen)
    assert (lost.name, lost.outcome) == ("global_step4", LOST)


def test_what_is_deleted_during_its_merge_is_lost_and_not_failed(
    hub: WritableHub, run: Run, home: MarkedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher(run.folder, home, "org/new", False, {})
    assert list(watcher.look()) == []
    tag = run.save(2)

    def rotating(*args: Any, **options: Any) -> Any:
        next(tag.glob("*optim_states.pt")).unlink(missing_ok=True)  # the trainer deletes one file after the other
        return merge(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("dsconv.convert.watch.merge", rotating)
        (lost,) = watcher.look(settled=True)
        assert (lost.name, lost.outcome) == ("global_step2", LOST)
        assert "was deleted before it could be merged" in str(lost.error)
        assert list(watcher.look(settled=True)) == [], "told once, also while some of its files are there"
    run.save(2)
    assert outcomes(list(watcher.look(settled=True))) == [("global_step2", PUSHED)]


def test_what_came_and_went_while_nobody_watched_is_told(hub: WritableHub, run: Run) -> None:
    for step in (10, 20, 30):
        run.save(step)
        watch(run.folder, "org/new", once=True)
    run.save(60)  # and 40 and 50, which were deleted since
    events = watch(run.folder, "org/new", once=True)
    assert outcomes(events) == [("global_step40", LOST), ("global_step50", LOST), ("global_step60", PUSHED)]
    assert "was not seen: if the run saved it, as it saved the others, it was deleted" in str(events[0].error)
    assert watch(run.folder, "org/new", once=True) == [], "told once"


@pytest.mark.parametrize(
    ("name", "known", "missed"),
    [
        ("step-50", ["step-10", "step-20", "step-30"], ["step-40"]),
        ("step-00050", ["step-00010", "step-00020", "step-00030"], ["step-00040"]),
        ("step-50", ["step-20", "step-30"], []),  # too few to know the distance
        ("step-55", ["step-10", "step-20", "step-30"], []),
        ("step-50", ["step-10", "step-15", "step-30"], []),
        ("best", ["step-10", "step-20", "step-30"], []),
        ("step-50", ["other-10", "other-20", "other-30"], []),
        ("step-50", ["step-10", "step-20", "step-30", "step-40"], []),
        ("step-20", ["step-10", "step-20", "step-30"], []),
    ],
)
def test_gaps(name: str, known: list[str], missed: list[str]) -> None:
    assert gap_before(name, known) == missed


def test_a_push_that_takes_long_keeps_nothing_from_being_merged(
    hub: WritableHub, run: Run, home: MarkedFolder, trained: Callable[[str], Trained]
) -> None:
    """The trainer may delete its checkpoints while the Hub takes its time."""
    watcher = Watcher(run.folder, home, "org/new", False, {}, keep=2)
    assert list(watcher.look()) == []
    frozen, ended = threading.Event(), threading.Event()
    hub.faults = [Fault("/commit/", frozen)]
    run.save(2)
    assert list(watcher.look(settled=True, done=ended.set)) == []
    for step, case in ((4, CASES[1]), (6, CASES[2])):
        run.save(step, case)
        found = list(watcher.look(settled=True, done=ended.set))
        shutil.rmtree(run.folder / f"global_step{step}")
    assert outcomes(found) == [("global_step4", DROPPED)], "not the copy that is being pushed"
    frozen.set()
    assert ended.wait(SECONDS)
    while not (found := list(watcher.look(settled=True, done=ended.set))):
        ended.wait(0.05)
    assert found[0].name == "global_step2"
    assert list(watcher.look(settled=True))[-1].name == "global_step6"
    trained(CASES[2]).check(load_safetensors(hub.head("org/new")))


def test_copies_wait_in_line_and_the_oldest_makes_room(hub: WritableHub, run: Run, home: MarkedFolder) -> None:
    watcher = Watcher(run.folder, home, "org/new", False, {}, keep=2)
    assert list(watcher.look()) == []
    hub.faults = [Fault("/api/", 503, 10_000)]
    dropped = []
    for step in (2, 4, 6):
        run.save(step)
        dropped += [event for event in watcher.look(settled=True) if event.outcome == DROPPED]
        shutil.rmtree(run.folder / f"global_step{step}")  # save_total_limit=1
    (event,) = dropped
    assert event.name == "global_step2"
    assert "its copy was dropped, since more than 2 copies waited (--keep)" in str(event.error)
    assert len(copies_of(run)) == 2
    hub.faults = []
    again = Watcher(run.folder, home, "org/new", False, {}, keep=2)
    assert outcomes(list(again.look(settled=True))) == [("global_step4", PUSHED), ("global_step6", PUSHED)]
    assert len(hub.commits) == 3


def test_a_failure_is_forgotten_when_the_options_are_put_right(hub: WritableHub, run: Run, tmp_path: Path) -> None:
    run.save(2)
    wrong = tmp_path / "config"
    wrong.mkdir()
    (wrong / "config.json").write_text("{")
    for _ in range(3):  # a cron job: not 0 while the newest is not pushed
        (event,) = watch(run.folder, "org/new", once=True, config_from=wrong, adapter=True)
        assert event.error is not None
    assert outcomes(watch(run.folder, "org/new", once=True)) == [("global_step2", PUSHED)]
    assert watch(run.folder, "org/new", once=True) == []


def test_every_tag_that_is_saved_again_counts_again(hub: WritableHub, run: Run) -> None:
    for step in (2, 4, 6):
        run.save(step)
        watch(run.folder, "org/new", once=True)
    for step in (2, 4, 6):
        run.save(step, CASES[1])
    events = watch(run.folder, "org/new", once=True)
    assert outcomes(events) == [(f"global_step{step}", PUSHED) for step in (2, 4, 6)]
    next((run.folder / "global_step4").glob("*optim_states.pt")).unlink()  # half way through a rotation
    assert watch(run.folder, "org/new", once=True) == []


def test_a_trainer_without_deepspeed(hub: WritableHub, tmp_path: Path) -> None:
    run = tmp_path / "output"
    for step, value in ((5, 1.0), (10, 2.0)):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((3, 4), value)}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text("{}")
    assert outcomes(watch(run, "org/new", once=True)) == [("checkpoint-10", PUSHED)]
    assert load_safetensors(hub.head("org/new"))["w"].unique().tolist() == [2.0]


def test_files_are_told_whatever_lies_beside_them(tmp_path: Path) -> None:
    (tmp_path / "a-link").symlink_to("nothing")
    Path(os.fsdecode(bytes(tmp_path) + b"/name\xff")).touch()
    (tmp_path / "model.pt").write_bytes(b"1")
    before = files_of(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"12")
    assert files_of(tmp_path).digest != before.digest
    assert files_of(tmp_path / "none") == files_of(tmp_path / "neither")


def test_a_checkpoint_that_is_a_link_out_of_the_run_is_not_pushed(hub: WritableHub, tmp_path: Path) -> None:
    """What it leads to may be somebody's private model; a link inside the run is followed."""
    run, home = tmp_path / "output", tmp_path / "home"
    for folder, value in ((run / "kept", 1.0), (home, 6.0)):
        folder.mkdir(parents=True)
        save_file({"w": torch.full((3, 4), value)}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text("{}")
    (run / "checkpoint-5").symlink_to("kept")
    assert outcomes(watch(run, "org/new", once=True)) == [("checkpoint-5", PUSHED)]
    (run / "checkpoint-10").symlink_to(home)
    (event,) = watch(run, "org/new", once=True)
    assert (event.name, event.outcome) == ("checkpoint-10", FAILED)
    assert "a link that leaves the run" in str(event.error)
    assert load_safetensors(hub.head("org/new"))["w"].unique().tolist() == [1.0]


@pytest.mark.parametrize("value", [None, True, -1, 1.5, "../../home", [], {"a": 1}, 10**30], ids=repr)
def test_a_state_of_other_types_is_an_error_of_dsconvs(value: object, hub: WritableHub, run: Run) -> None:
    sound = {"outcome": "merged", "files": "a", "newest_ns": 1, "key": "k", "copy": "merged-1", "step": 1, "nbytes": 1}
    sound |= {"order": 1, "seconds": 0.5, "url": "u", "error": "e"}
    with locked_home(run.folder, "org/new") as home:
        for key in sound:
            for outcome in ("merged", "seen", "pushed"):
                (home.path / "state.json").write_text(json.dumps({"step-1": {**sound, "outcome": outcome, key: value}}))
                with contextlib.suppress(DsconvError):
                    list(Watcher(run.folder, home, "org/new", False, {}).look(settled=True))


def test_a_home_that_dsconv_did_not_make_is_not_touched(hub: WritableHub, run: Run, tmp_path: Path) -> None:
    """A downloaded run may bring a watcher's folder: as a link, or with marks of another disk in it."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "org--new").mkdir(parents=True)
    (elsewhere / "org--new" / "thesis.tex").write_text("mine")
    home = run.folder / ".dsconv-watch"
    home.symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link"):
        watch(run.folder, "org/new", once=True)
    home.unlink()
    home.mkdir()
    (home / "org--new").symlink_to(elsewhere / "org--new")
    with pytest.raises(OutputError, match="is a link"):
        watch(run.folder, "org/new", once=True)
    (home / "org--new").unlink()
    (home / "org--new").mkdir()
    marks = 'dsconv made this folder, whose inode is 1, and in it:\n"thesis.tex"\n"*"\n'
    (home / "org--new" / "lock").write_text(marks)
    (home / "org--new" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="was not made by dsconv on this disk"):
        watch(run.folder, "org/new", once=True)
    for folder in (home, elsewhere):
        assert (folder / "org--new" / "thesis.tex").read_text() == "mine"
