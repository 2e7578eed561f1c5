"""Several processes write one output: each writes its part, and the last one puts the whole into place, once."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dsconv
from dsconv.checkpoint.storage.unfinished import PARTS, STAGING, part_mark
from dsconv.convert import part_folder, shares
from dsconv.convert.parts import Part, parse_part
from dsconv.errors import DsconvError, MalformedError, OutputError, UnsupportedError, UsageError
from tests.cli.running import dsconv as command
from tests.crash.jobs import contents
from tests.trained import Trained

CASE = "llama_tied-z3-bf16-w3"
Convert = Callable[..., Any]


@pytest.fixture(autouse=True)
def fine_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut files of some kilobytes too."""
    monkeypatch.setattr(shares, "CUT_BYTES", 64)


def in_parts(convert: Convert, source: Path, out: Path, of: int, **options: Any) -> list[Any]:
    """Write all parts, one after the other and in any order."""
    numbers = random.Random(of).sample(range(1, of + 1), of)
    return [convert(source, out, part=f"{number}/{of}", fsync=False, **options) for number in numbers]


def together(work: list[Callable[[], object]]) -> list[int]:
    """Run each in a process of its own, all at once, and return how they ended: 0, 3 for an error of dsconv's."""
    pids = []
    for each in work:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                each()
                code = 0
            except DsconvError as error:
                code = 3
                os.write(2, f"{error}\n".encode())
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def odd_tensors(folder: Path) -> Path:
    """Make a file of torch.save's with views that are not contiguous, shared storages and all sorts of shapes."""
    base = torch.randn(40, 24)
    whole = torch.arange(4000, dtype=torch.int64)
    state = {
        "turned": base.t(),
        "steps": base[::2, 1:9],
        "left": whole[:1800],
        "right": whole[1700:],
        "empty": torch.zeros(0, 3),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.randn(3, 5, 7).bfloat16(),
        "bytes": torch.arange(200, dtype=torch.uint8),
    }
    torch.save(state, folder / "model.bin")
    return folder / "model.bin"


@pytest.mark.parametrize("of", [1, 2, 4, 7])
def test_the_same_bytes_as_one_process(of: int, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    odd = odd_tensors(tmp_path)
    cases: list[tuple[Convert, Path, dict[str, Any]]] = [
        (dsconv.merge, trained(CASE).checkpoint, {"max_shard_size": "5KB", "sha256": True, "verify_output": True}),
        (dsconv.merge, trained(CASE).checkpoint, {"dtype": "bf16"}),
        (dsconv.merge, odd, {}),
        (dsconv.to_dcp, odd, {"max_shard_size": "9KB"}),
        (dsconv.to_universal, trained(CASE).checkpoint, {"verify_output": True}),
    ]
    for number, (convert, source, options) in enumerate(cases):
        alone, out = (tmp_path / f"{kind}{number}" / "out" for kind in ("alone", "parts"))
        convert(source, alone, fsync=False, **options)
        reports = in_parts(convert, source, out, of, **options)
        assert contents(out.parent) == contents(alone.parent), number
        assert not (out / STAGING).exists()
        assert [report.part.by_this for report in reports] == [False] * (of - 1) + [True]
        assert sum(report.part.nbytes for report in reports) > 0
        assert [len(report.part.missing) for report in reports] == list(range(of - 1, -1, -1))


def test_parts_that_run_at_once_put_the_output_into_place_once(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    source, alone, out, ended = trained(CASE).checkpoint, tmp_path / "alone", tmp_path / "out", tmp_path / "ended"
    dsconv.merge(source, alone, max_shard_size="5KB", fsync=False)
    ended.mkdir()

    def write(number: int) -> None:
        report = dsconv.merge(source, out, max_shard_size="5KB", fsync=False, part=f"{number}/4", workers=1)
        assert report.part is not None
        (ended / f"{number}-{report.part.by_this}-{report.part.placed}").touch()

    for _ in range(5):
        assert together([lambda number=number: write(number) for number in range(1, 5)]) == [0] * 4  # type: ignore[misc]
        assert contents(out) == contents(alone)
        assert not (out / STAGING).exists()
        assert sum("True-True" in path.name for path in ended.iterdir()) == 1
        shutil.rmtree(out)
        for path in ended.iterdir():
            path.unlink()


def test_shares_are_balanced_by_bytes_and_cut_between_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    large = {"a": torch.zeros(3_000_001), "b": torch.zeros(7_000_000).bfloat16(), "c": torch.zeros(5_000_000)}
    save_file(large, tmp_path / "model.safetensors")
    reports = in_parts(dsconv.merge, tmp_path / "model.safetensors", tmp_path / "out", 3)
    sizes = [report.part.nbytes for report in reports]
    assert max(sizes) <= 1.01 * sum(sizes) / 3
    assert shares.CUT_BYTES % 65_536 == 0


@pytest.fixture
def half_done(trained: Callable[[str], Trained], tmp_path: Path) -> Path:
    """Make a folder in which one of two parts is done."""
    dsconv.merge(trained(CASE).checkpoint, tmp_path / "out", part="1/2", fsync=False)
    assert os.listdir(tmp_path / "out") == [STAGING]
    return tmp_path / "out"


def test_a_half_done_output_is_no_model_and_no_run_takes_it_away(
    half_done: Path, trained: Callable[[str], Trained], copied: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(DsconvError, match="is being written there in parts, and not all of them are done: run"):
        dsconv.open_checkpoint(half_done)
    before = contents(half_done / STAGING)
    source = trained(CASE).checkpoint
    touched = copied(CASE)
    next(touched.rglob("*optim_states.pt")).touch()
    whole = r"holds an output that is written in parts, of which 1 are done: run the others, by the command"
    for convert, options, message in (
        (dsconv.merge, {}, whole),
        (dsconv.merge, {"force": True}, whole),
        (dsconv.to_dcp, {}, whole),
        (dsconv.merge, {"part": "1/3"}, r"\(1 of 2 are done\): it is written in 2 parts, and this is one of 3"),
        (dsconv.merge, {"part": "2/2", "dtype": "bf16"}, "it was begun with other options"),
        (dsconv.merge, {"part": "2/2", "exclude": ["nothing*"]}, "other options|fits no tensor"),
        (dsconv.to_dcp, {"part": "2/2"}, "it was begun with other options"),
    ):
        with pytest.raises(DsconvError, match=message):
            convert(source, half_done, fsync=False, **options)
        assert contents(half_done / STAGING) == before
    with pytest.raises(OutputError, match="its source is another one, or was written to since"):
        dsconv.merge(touched, half_done, part="2/2", fsync=False)
    assert contents(half_done / STAGING) == before
    dsconv.merge(source, half_done, part="2/2", fsync=False)
    assert not (half_done / STAGING).exists()


def test_a_file_that_is_only_copied_may_not_change_between_parts(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(CASE)
    dsconv.to_universal(save_dir, tmp_path / "out", part="1/2", fsync=False)
    next(save_dir.rglob("zero_pp_rank_2_*model_states.pt")).touch()
    with pytest.raises(OutputError, match="its source is another one, or was written to since"):
        dsconv.to_universal(save_dir, tmp_path / "out", part="2/2", fsync=False)


def test_another_version_is_refused(
    half_done: Path, trained: Callable[[str], Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsconv.convert.part_writing.__version__", "99.0")
    with pytest.raises(OutputError, match=r"it was begun by dsconv .*, and this is 99\.0"):
        dsconv.merge(trained(CASE).checkpoint, half_done, part="2/2", fsync=False)


def test_a_part_that_is_done_is_not_written_again(half_done: Path, trained: Callable[[str], Trained]) -> None:
    before = contents(half_done / STAGING)
    report = dsconv.merge(trained(CASE).checkpoint, half_done, part="1/2", fsync=False)
    assert (report.part.missing, report.bytes_read) == ((2,), 0)  # type: ignore[union-attr]
    assert contents(half_done / STAGING) == before


def test_a_part_that_is_started_again_after_the_end_has_nothing_to_do(
    half_done: Path, trained: Callable[[str], Trained]
) -> None:
    source = trained(CASE).checkpoint
    dsconv.merge(source, half_done, part="2/2", fsync=False)
    before = contents(half_done)
    for force in (False, True):
        report = dsconv.merge(source, half_done, part="1/2", fsync=False, force=force)
        assert report.part is not None
        assert (report.part.placed, report.part.by_this, report.bytes_read) == (True, False, 0)
        assert (contents(half_done), (half_done / STAGING).exists()) == (before, False)
    with pytest.raises(OutputError, match="already holds a model"):
        dsconv.merge(source, half_done, part="1/3", fsync=False)
    (half_done / "model.safetensors").write_bytes(before["model.safetensors"])  # by another
    with pytest.raises(OutputError, match="already holds a model"):
        dsconv.merge(source, half_done, part="1/2", fsync=False)


def test_files_of_others_among_the_parts(half_done: Path, trained: Callable[[str], Trained]) -> None:
    """What the parts wrote may not be another file now, and nothing of others is removed."""
    source, file = trained(CASE).checkpoint, half_done / STAGING / "model.safetensors"
    data = file.read_bytes()
    file.rename(half_done / "kept")
    file.write_bytes(bytes(len(data)))
    with pytest.raises(OutputError, match=r"model\.safetensors is not what the parts wrote: remove .*, and run all"):
        dsconv.merge(source, half_done, part="2/2", fsync=False)
    (half_done / "kept").unlink()
    (half_done / STAGING / part_mark(2)).unlink()
    file.unlink()
    (half_done / "mine").write_bytes(data)
    file.hardlink_to(half_done / "mine")
    with pytest.raises(OutputError, match="was not put there by dsconv"):
        dsconv.merge(source, half_done, part="2/2", fsync=False)
    assert (half_done / "mine").read_bytes() == data
    file.unlink()
    file.symlink_to(half_done / "mine")
    with pytest.raises(OutputError):
        dsconv.merge(source, half_done, part="2/2", fsync=False)
    assert (half_done / "mine").read_bytes() == data


def test_a_second_process_with_the_same_part_is_refused(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    source, out = trained(CASE).checkpoint, tmp_path / "out"
    waiting: list[str] = ["first"]

    def progress(phase: str, done: int, total: int) -> None:
        if waiting:
            waiting.pop()
            with pytest.raises(OutputError, match="part 1/2 is being written by another process: give each a part"):
                dsconv.merge(source, out, part="1/2", fsync=False)
            with pytest.raises(OutputError, match="another dsconv run is writing here"):
                dsconv.merge(source, out, fsync=False)
            dsconv.merge(source, out, part="2/2", fsync=False)

    report = dsconv.merge(source, out, part="1/2", fsync=False, progress=progress, workers=1)
    assert report.part is not None
    assert report.part.by_this
    assert waiting == []


def test_a_part_waits_for_no_run_of_another_kind(
    trained: Callable[[str], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = trained(CASE).checkpoint, tmp_path / "out"
    monkeypatch.setattr(part_folder, "WAIT_SECONDS", 0.1)
    waiting = [1]

    def progress(phase: str, done: int, total: int) -> None:
        if waiting:
            waiting.pop()
            with pytest.raises(OutputError, match="another dsconv run is writing here"):
                dsconv.merge(source, out, part="1/2", fsync=False)

    dsconv.merge(source, out, fsync=False, progress=progress, workers=1)
    assert waiting == []
    with pytest.raises(OutputError, match="already holds a model"):
        dsconv.merge(source, out, part="1/2", fsync=False)
    assert not (out / STAGING).exists()


def test_damage_that_only_all_parts_together_can_see(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Each part reads some bytes of a record; its CRC-32 covers all of them."""
    save_dir = copied(CASE)
    piece = dsconv.open_checkpoint(save_dir)["model.norm.weight"].pieces[-1]
    victim = Path(piece.extent.record.path)
    data = bytearray(victim.read_bytes())
    data[piece.extent.offset_bytes] ^= 1
    victim.write_bytes(data)
    out = tmp_path / "out"
    for convert in (dsconv.merge, dsconv.to_universal, dsconv.to_dcp):
        with pytest.raises(MalformedError, match=rf"{victim.name}: record .* fails its CRC-32"):
            in_parts(convert, save_dir, out, 3)
        assert not (out / STAGING).exists()
        assert not out.exists()


def test_a_failure_leaves_nothing_where_no_part_is_done(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(CASE)
    checkpoint = dsconv.open_checkpoint(save_dir)
    next(save_dir.rglob("bf16_zero_pp_rank_1_*")).unlink()
    with pytest.raises(DsconvError, match="no such file"):
        dsconv.merge(checkpoint, tmp_path / "out", part="2/3", fsync=False)
    assert not (tmp_path / "out").exists()


def test_an_older_output_is_replaced_with_force_alone(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    source, out, alone = trained(CASE).checkpoint, tmp_path / "out", tmp_path / "alone"
    dsconv.merge(source, out, dtype="bf16", fsync=False)
    before = contents(out)
    with pytest.raises(OutputError, match=r"already holds a model .* give --force"):
        dsconv.merge(source, out, part="1/2", fsync=False)
    assert (contents(out), (out / STAGING).exists()) == (before, False)
    dsconv.merge(source, out, part="2/2", force=True, fsync=False)
    assert contents(out) == before
    dsconv.merge(source, out, part="1/2", force=True, fsync=False)
    dsconv.merge(source, alone, fsync=False)
    assert contents(out) == contents(alone)


def test_what_has_no_parts_is_refused(trained: Callable[[str], Trained], tmp_path: Path, memory: Any) -> None:
    source = trained(CASE).checkpoint
    with pytest.raises(UnsupportedError, match="meet in a folder of a disk that they share, not in a store"):
        dsconv.merge(source, "memory://shelf/out", part="1/2")
    with pytest.raises(UsageError, match="--push-to-hub cannot be combined with --part"):
        dsconv.merge(source, tmp_path / "out", part="1/2", push_to_hub="org/model")
    assert not (tmp_path / "out").exists()


def test_a_part_that_cannot_be_read_is_said_so(half_done: Path, trained: Callable[[str], Trained]) -> None:
    source = trained(CASE).checkpoint
    (half_done / STAGING / part_mark(1)).write_text('{"files": {}}')
    with pytest.raises(OutputError, match=r"part-1\.json is not what the parts wrote"):
        dsconv.merge(source, half_done, part="2/2", fsync=False)
    (half_done / STAGING / PARTS).write_text("[]")
    with pytest.raises(OutputError, match=r"parts\.json: cannot be read .*: remove .*\.dsconv-partial"):
        dsconv.merge(source, half_done, part="2/2", fsync=False)


LAUNCHED: list[tuple[dict[str, str], str]] = [
    ({"RANK": "2", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "0",
      "SLURM_NTASKS": "2"}, "3/8"),
    ({"RANK": "2", "WORLD_SIZE": "8"}, "3/8"),
    ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "4/4"),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "1/2"),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "2/4"),
    ({"JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "6"}, "6/6"),
    ({"RANK": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "2/4"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "expected"), LAUNCHED)
def test_auto_reads_what_launchers_set(variables: dict[str, str], expected: str) -> None:
    part = parse_part("auto", variables)
    assert str(part) == expected
    assert part == Part(part.number, part.of, int(variables.get("LOCAL_WORLD_SIZE", "1")))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"none of RANK and WORLD_SIZE, .* are set: start dsconv by a launcher, or give --part I/N"),
        ({"RANK": "0", "WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "say part 1/4, and .* say 2/4"),
        ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS is not: set it to the number of parts"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is '4' and WORLD_SIZE is '4'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, "8' tasks of a job array"),
    ],
)
def test_auto_does_not_guess(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_part("auto", variables)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/0", "a/b", "-1/4", "1/4/2", "", "1/99999"])
def test_a_part_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--part"):
        parse_part(text, {})


@pytest.fixture
def launched(trained: Callable[[str], Trained], tmp_path: Path) -> list[str | Path]:
    return ["merge", trained(CASE).checkpoint, tmp_path / "out", "--no-fsync", "--part"]


def test_what_a_part_prints(launched: list[str | Path], tmp_path: Path) -> None:
    first = command(*launched, "1/3")
    assert (first.code, "still missing: 2/3, 3/3" in first.out) == (0, True), first.out + first.err
    second = command(*launched, "auto", "--json", RANK="1", WORLD_SIZE="3")
    part = second.json["part"]
    assert (part["number"], part["of"], part["missing"], part["placed"]) == (2, 3, [3], False)
    assert command(*launched, "auto").code == 2
    third = command(*launched, "3/3")
    assert "all parts are done" in third.out
    assert "loads with AutoModelForCausalLM" in third.out
    assert json.loads((tmp_path / "out" / "dsconv.manifest.json").read_text())["tensors"]
