"""Which part of an output a process writes: ``--part I/N``, or what the program that launched it says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsconv.errors import UsageError
from dsconv.text import quote

AUTO = "auto"
MAX_PARTS = 65_536
# Launchers by the variables of a process's number and of how many there are, those of the innermost one first: mpirun
# and torchrun are started within a job of Slurm, and their processes inherit its variables.
LAUNCHERS = (
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPI", "PMI_RANK", "PMI_SIZE"),
    ("Slurm", "SLURM_PROCID", "SLURM_NTASKS"),
    ("an indexed job of Kubernetes", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
)
TORCHRUN = ("torchrun", "RANK", "WORLD_SIZE")
BY_TORCHRUN = "TORCHELASTIC_RUN_ID"  # which torchrun sets; RANK and WORLD_SIZE are also set by hand
NEIGHBOURS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Part:
    """Part ``number`` (from 1 on) of ``of``. ``neighbours`` processes share the cores of this machine."""

    number: int
    of: int
    neighbours: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def parse_part(text: str | None, variables: Mapping[str, str] = os.environ) -> Part | None:
    """Return the part that ``I/N`` or ``auto`` names; None for None, which is all of the output.

    Raises:
        UsageError: it is neither, or the variables do not say which part this process is.
    """
    if text is None:
        return None
    if text == AUTO:
        return _from_launcher(variables)
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    if match is None:
        raise UsageError(f"--part {quote(text)}: write it like 3/8, from 1/8 to 8/8, or auto")
    number, of = int(match[1]), int(match[2])
    if not 1 <= number <= of <= MAX_PARTS:
        raise UsageError(f"--part {quote(text)}: parts of {of} are numbered from 1/{of} to {of}/{of}")
    return Part(number, of)


def _from_launcher(variables: Mapping[str, str]) -> Part:
    found = [(who, part) for who, *names in LAUNCHERS if (part := _read(variables, who, *names)) is not None]
    by_rank = _read(variables, *TORCHRUN)
    if by_rank is not None:
        other = found[0] if found else None
        if BY_TORCHRUN not in variables and other is not None and other[1] != by_rank:
            raise UsageError(
                f"--part auto: RANK and WORLD_SIZE say part {by_rank}, and the variables of {other[0]} say {other[1]}:"
                " unset RANK and WORLD_SIZE, or give --part I/N"
            )
        found.insert(0, (TORCHRUN[0], by_rank))
    if not found:
        known = ", ".join(f"{rank} and {size}" for _, rank, size in (TORCHRUN, *LAUNCHERS))
        raise UsageError(f"--part auto: none of {known} are set: start dsconv by a launcher, or give --part I/N")
    part = found[0][1]
    if part.of == 1 and (tasks := variables.get("SLURM_ARRAY_TASK_COUNT", "1")) != "1":
        raise UsageError(
            f"--part auto: this is one of {quote(tasks)} tasks of a job array, each of which would write everything:"
            ' give --part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT"'
        )
    return Part(part.number, part.of, min(part.of, _neighbours(variables)))


def _read(variables: Mapping[str, str], who: str, rank: str, size: str) -> Part | None:
    """Return what two variables say, the first of which counts from 0; None where it is not set.

    Raises UsageError where they say nothing sensible.
    """
    number, of = variables.get(rank), variables.get(size)
    if number is None or (rank == TORCHRUN[1] and of is None):  # other programs set RANK alone
        return None
    if of is None:
        raise UsageError(
            f"--part auto: {rank} is set, as {who} sets it, and {size} is not: set it to the number of parts, or give"
            " --part I/N"
        )
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of) <= MAX_PARTS):
        raise UsageError(f"--part auto: {rank} is {quote(number)} and {size} is {quote(of)}: give --part I/N")
    return Part(int(number) + 1, int(of))


def _neighbours(variables: Mapping[str, str]) -> int:
    for name in NEIGHBOURS:
        if variables.get(name, "").isdecimal():
            return max(1, int(variables[name]))
    tasks = re.match(r"\d{1,6}", variables.get("SLURM_STEP_TASKS_PER_NODE", ""))  # 4(x2),3
    return max(1, int(tasks[0])) if tasks else 1
