"""The commands as people and programs use them: what they print, where they print it, and what they need to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dsconv as package
from tests.cli.running import dsconv
from tests.trained import Trained, load_safetensors

CASE = "llama_tied-z3-bf16-w3"
COMMANDS = [
    "zero-to-fp32",
    "merge",
    "to-universal",
    "to-dcp",
    "inspect",
    "verify",
    "diff",
    "push",
    "watch",
    "config",
    "estimate",
    "train",
    "resume",
    "validate",
    "doctor",
]


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]])
def test_help_fits_80_columns_and_has_an_example(command: list[str]) -> None:
    result = dsconv(*command, "--help", COLUMNS="200")
    assert result.code == 0
    assert "Example:" in result.out
    assert max(map(len, result.out.splitlines())) <= 80
    assert dsconv(*command, "-h").out == dsconv(*command, "--help").out


def test_the_surface_of_the_command_line() -> None:
    """Names that users type must not change by accident. A change in this test is a change for users."""
    from dsconv.cli.commands import HOMES, command_of

    surface = {}
    for name in HOMES:
        command = command_of(name)
        options = [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
        surface[name] = sorted(option for option in options if option[0] == "-")
    merge = [
        "--adapter",
        "--adapter-name",
        "--base",
        "--config-from",
        "--debug",
        "--dry-run",
        "--dtype",
        "--exclude",
        "--exclude-frozen",
        "--exclude_frozen_parameters",
        "--fold-lora",
        "--follow-links",
        "--force",
        "--fsync",
        "--include",
        "--item",
        "--json",
        "--max-shard-size",
        "--max_shard_size",
        "--names",
        "--no-fsync",
        "--part",
        "--private",
        "--push-to-hub",
        "--quiet",
        "--rename",
        "--revision",
        "--safe_serialization",
        "--sha256",
        "--strip-prefix",
        "--tag",
        "--verify",
        "--weights",
        "--workers",
        "-d",
        "-q",
        "-t",
    ]
    assert surface == {
        "zero-to-fp32": merge,
        "merge": merge,
        "diff": [
            "--all",
            "--debug",
            "--follow-links",
            "--html",
            "--item",
            "--item-b",
            "--json",
            "--quiet",
            "--revision",
            "-d",
            "-q",
        ],
        "to-dcp": [
            "--debug",
            "--dry-run",
            "--dtype",
            "--follow-links",
            "--force",
            "--fsync",
            "--item",
            "--json",
            "--layout",
            "--max-shard-size",
            "--names",
            "--no-fsync",
            "--optimizer",
            "--part",
            "--prefix",
            "--quiet",
            "--tag",
            "--workers",
            "-d",
            "-q",
            "-t",
        ],
        "to-universal": [
            "--debug",
            "--dry-run",
            "--exclude-frozen",
            "--follow-links",
            "--force",
            "--fsync",
            "--item",
            "--json",
            "--no-fsync",
            "--part",
            "--quiet",
            "--tag",
            "--verify",
            "--workers",
            "-d",
            "-q",
            "-t",
        ],
        "inspect": [
            "--all",
            "--debug",
            "--filter",
            "--follow-links",
            "--html",
            "--item",
            "--json",
            "--revision",
            "--tag",
            "--values",
            "-d",
            "-t",
        ],
        "train": [
            "--activation-checkpointing",
            "--backend",
            "--batch-size",
            "--cp",
            "--data",
            "--debug",
            "--dropout",
            "--ds-config",
            "--dtype",
            "--fsdp",
            "--grad-clip",
            "--hook",
            "--json",
            "--keep",
            "--lr",
            "--micro-batch",
            "--monitor",
            "--no-fsdp",
            "--nproc",
            "--nvme-path",
            "--offload",
            "--output-dir",
            "--pp",
            "--quiet",
            "--save-every",
            "--seed",
            "--seq-len",
            "--sp",
            "--steps",
            "--stop-after",
            "--tp",
            "--warmup",
            "--weight-decay",
            "--zero-stage",
            "-d",
            "-q",
        ],
        "resume": [
            "--backend",
            "--cp",
            "--debug",
            "--fsdp",
            "--json",
            "--keep",
            "--no-fsdp",
            "--nproc",
            "--pp",
            "--quiet",
            "--save-every",
            "--sp",
            "--steps",
            "--stop-after",
            "--tp",
            "--zero-stage",
            "-d",
            "-q",
        ],
        "validate": [
            "--cells",
            "--debug",
            "--json",
            "--nproc",
            "--quick",
            "--quiet",
            "--report",
            "--sabotage",
            "--seed",
            "--seq-len",
            "--steps",
            "-d",
            "-q",
        ],
        "doctor": ["--debug", "--json", "-d"],
        "estimate": [
            "--accumulation",
            "--debug",
            "--dtype",
            "--fit",
            "--fp32-grads",
            "--json",
            "--micro-batch",
            "--nodes",
            "--nproc",
            "--plot",
            "--revision",
            "--seq-len",
            "--tp",
            "-d",
        ],
        "verify": [
            "--allow-cast",
            "--debug",
            "--follow-links",
            "--item",
            "--item-b",
            "--json",
            "--optimizer",
            "--quiet",
            "--revision",
            "--subset",
            "-d",
            "-q",
        ],
        "push": [
            "--check",
            "--commit-message",
            "--create-pr",
            "--debug",
            "--dry-run",
            "--json",
            "--no-check",
            "--private",
            "--quiet",
            "--revision",
            "-d",
            "-q",
        ],
        "watch": [
            "--adapter",
            "--config-from",
            "--debug",
            "--dtype",
            "--exclude-frozen",
            "--interval",
            "--item",
            "--keep",
            "--max-shard-size",
            "--once",
            "--private",
            "--push-to-hub",
            "--quiet",
            "-d",
            "-q",
        ],
        "config": [
            "--betas",
            "--debug",
            "--dtype",
            "--eps",
            "--grad-accum",
            "--json",
            "--list-recipes",
            "--lr",
            "--max-grad-norm",
            "--micro-batch",
            "--model",
            "--quiet",
            "--recipe",
            "--steps",
            "--warmup-steps",
            "--weight-decay",
            "--world",
            "-d",
            "-q",
        ],
    }


def test_version() -> None:
    assert dsconv("--version").out == f"dsconv, version {package.__version__}\n"


def test_zero_to_fp32_prints_what_it_did(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    result = dsconv("zero-to-fp32", trained(CASE).checkpoint, tmp_path / "out", "--verify")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == f"{trained(CASE).checkpoint / 'global_step2'} (ZeRO-3, step 2) → {tmp_path / 'out'}"
    assert lines[1].startswith("20 tensors, 5,376 parameters, ")
    assert lines[1].endswith(" s, verified")
    assert lines[2:] == [
        "lm_head.weight is tied to model.embed_tokens.weight, stored once",
        "with config.json",
        f'loads with AutoModelForCausalLM.from_pretrained("{tmp_path / "out"}")',
    ]
    assert not result.err


def test_quiet_and_json(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    quiet = dsconv("zero-to-fp32", trained(CASE).checkpoint, tmp_path / "a", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    result = dsconv("zero-to-fp32", trained(CASE).checkpoint, tmp_path / "b", "--json", "--dtype", "bf16")
    assert not result.err
    report = result.json
    assert report["output"] == str(tmp_path / "b")
    assert report["tensors"] == 20
    assert report["files"] == ["model.safetensors"]
    assert report["dry_run"] is False
    assert report["seconds"] > 0


def test_dry_run_prints_the_plan(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    result = dsconv(
        "zero-to-fp32",
        trained(CASE).checkpoint,
        tmp_path / "out",
        "--dry-run",
        "--dtype",
        "bf16",
        "--max-shard-size",
        "5KB",
    )
    assert result.code == 0
    assert "model-00001-of-0000" in result.out
    assert "model.layers.1.mlp.up_proj.weight" in result.out
    assert "bfloat16 from float32" in result.out
    assert "nothing was written" in result.out
    assert not (tmp_path / "out").exists()


def test_the_old_scripts_spellings(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained("llama_frozen-z3-bf16-w2")
    arguments = [
        "--max_shard_size",
        "5KB",
        "--safe_serialization",
        "-t",
        "global_step2",
        "--exclude_frozen_parameters",
        "-d",
    ]
    result = dsconv("zero-to-fp32", made.checkpoint, tmp_path / "out", *arguments)
    assert result.code == 0, result.err
    assert set(load_safetensors(tmp_path / "out")) == set(made.facts["trainable"])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_a_missing_config_is_reported(copied: Callable[[str], Path], tmp_path: Path) -> None:
    save_dir = copied(CASE)
    (save_dir / "config.json").unlink()
    result = dsconv("zero-to-fp32", save_dir, tmp_path / "out")
    assert result.code == 0
    assert "--config-from" in result.err


def test_inspect_for_people(trained: Callable[[str], Trained]) -> None:
    result = dsconv("inspect", trained("odd-z3-bf16-w2").checkpoint, NO_COLOR="1")
    assert result.code == 0
    assert "\x1b" not in result.out
    for words in (
        "ZeRO-3",
        "2 data parallel",
        "embed.weight",
        "= head.weight",
        "13 × 7",
        "bool",
        "buffer",
        "frozen",
        "float32",
    ):
        assert words in result.out
    listed = dsconv("inspect", trained("mixtral-z3-bf16-w2").checkpoint)
    assert "more; --all lists them" not in listed.out


def test_inspect_groups_layers(tmp_path: Path) -> None:
    """300 tensors fit on a page of 80 columns. --all lists each of them, --filter some, and JSON keeps all."""
    layer = {"q.weight": (8, 8), "k.weight": (4, 8), "mlp.experts.0.w": (2, 8), "mlp.experts.1.w": (2, 8), "norm": (8,)}
    state = {"embed.weight": torch.zeros(16, 8), "norm.weight": torch.zeros(8)}
    state |= {f"model.layers.{i}.{name}": torch.zeros(shape) for i in range(60) for name, shape in layer.items()}
    state["model.layers.7.norm"] = torch.zeros(9)
    save_file(state | {f"odd.{i}.w": torch.zeros(i + 1) for i in range(50)}, tmp_path / "model.safetensors")
    shown = dsconv("inspect", tmp_path, COLUMNS="80").out
    assert "model.layers.0–59: 4 tensors each" in shown
    assert "  .mlp.experts.0–1.w  " in shown
    assert "model.layers.0–6,8–59.norm" in shown
    assert "model.layers.7.norm" in shown
    assert "more rows; --all lists every tensor" in shown
    assert "odd.49.w" in shown  # the last layers
    assert len(shown.splitlines()) < 60
    assert max(map(len, shown.splitlines())) <= 80 + len(str(tmp_path))
    every = dsconv("inspect", tmp_path, "--all").out
    assert all(name in every for name in state)
    some = dsconv("inspect", tmp_path, "--all", "--filter", "*.7.*", "--filter", "embed*").out
    assert "model.layers.7.q.weight" in some
    assert "embed.weight" in some
    assert "model.layers.8." not in some
    assert "no tensor has such a name" in dsconv("inspect", tmp_path, "--filter", "x").out
    listed = dsconv("inspect", tmp_path, "--json").json
    assert len(listed["tensors"]) == len(state) + 50
    assert len(dsconv("inspect", tmp_path, "--json", "--filter", "odd.*").json["tensors"]) == 50


def test_inspect_lists_models(tmp_path: Path) -> None:
    critic = {"w": torch.ones(2, 3), "v": torch.ones(3)}
    torch.save({"actor": {"w": torch.ones(2, 3)}, "critic": critic}, tmp_path / "a.pt")
    shown = dsconv("inspect", tmp_path / "a.pt")
    assert shown.code == 0
    assert "holds 2 models" in shown.out
    assert [line.split() for line in shown.out.splitlines() if line.startswith("critic")] == [["critic", "2"]]
    assert dsconv("inspect", tmp_path / "a.pt", "--json").json["models"] == {"actor": 1, "critic": 2}
    one = dsconv("inspect", tmp_path / "a.pt", "--item", "critic", "--json").json
    assert (one["info"]["item"], len(one["tensors"])) == ("critic", 2)


def test_one_of_several_models_is_verified_and_converted(tmp_path: Path) -> None:
    critic = {"w": torch.ones(2, 3), "v": torch.ones(3)}
    torch.save({"actor": {"w": torch.ones(2, 3)}, "critic": critic}, tmp_path / "a.pt")
    merged = dsconv("merge", tmp_path / "a.pt", tmp_path / "merged", "--item", "critic")
    assert merged.code == 0
    assert dsconv("verify", tmp_path / "a.pt", tmp_path / "merged").code == 3
    assert dsconv("to-dcp", tmp_path / "a.pt", tmp_path / "dcp", "--item", "critic").code == 0
    for path in (tmp_path / "merged", tmp_path / "dcp"):
        assert dsconv("verify", tmp_path / "a.pt", path, "--item", "critic").code == 0
        assert dsconv("verify", tmp_path / "a.pt", path, "--item", "actor").code == 5


def test_inspect_for_programs(trained: Callable[[str], Trained]) -> None:
    made = trained("odd-z3-bf16-w2")
    found = dsconv("inspect", made.checkpoint, "--json").json
    assert found["format"] == "ZeRO-3"
    assert found["step"] == 2
    assert found["world"] == {"data_parallel": 2, "model_parallel": 1}
    assert found["ties"] == made.tied
    rows = {row["name"]: row for row in found["tensors"]}
    assert set(rows) | set(made.tied) == set(made.truth)
    assert rows["cube"] == {
        "name": "cube",
        "dtype": "float32",
        "shape": [3, 5, 1],
        "role": "parameter",
        "bytes": 60,
        "pieces": 2,
        "aliases": [],
    }
    assert found["parameters"] == sum(made.truth[name].numel() for name in rows)
    assert found["warnings"] == []


def test_inspect_reports_what_is_unusual(copied: Callable[[str], Path]) -> None:
    save_dir = copied(CASE)
    (save_dir / "latest").unlink()
    result = dsconv("inspect", save_dir)
    assert "Problem: " in result.out
    assert "no file 'latest'" in result.out


def test_verify_equal_and_not(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained(CASE)
    assert dsconv("zero-to-fp32", made.checkpoint, tmp_path / "out").code == 0
    same = dsconv("verify", made.checkpoint, tmp_path / "out")
    assert same.code == 0
    assert same.out.startswith("equal: 20 tensors, ")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80  # the sign of the last element of the last tensor
    path.write_bytes(bytes(data))
    differs = dsconv("verify", made.checkpoint, tmp_path / "out")
    assert differs.code == 5
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    index = [size - 1 for size in header[last]["shape"]]
    assert differs.out.startswith(f"{last}: first differs at element {index}: ")
    assert "1 difference between" in differs.err
    report = dsconv("verify", made.checkpoint, tmp_path / "out", "--json")
    assert report.code == 5
    assert report.json["equal"] is False
    assert report.json["differences"][0]["name"] == last
    assert report.json["differences"][0]["element"] == index
    quiet = dsconv("verify", made.checkpoint, tmp_path / "out", "--quiet")
    assert (quiet.code, quiet.out) == (5, "")


def test_doctor_shows_what_works_here(tmp_path: Path) -> None:
    report = dsconv("doctor", tmp_path / "not yet there", "--json")
    assert report.code == 0
    found = report.json
    assert found["dsconv"] == package.__version__
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["devices"]["cores"] >= 1
    assert found["free_bytes"][str(tmp_path / "not yet there")] > 0
    core = found["works"][:2]
    assert [check["what"] for check in core] == [
        "merging, casting and verifying a checkpoint",
        "refusing a pickle that would run code",
    ]
    assert all(check["works"] for check in core)
    assert {check["what"] for check in found["works"] if not check["works"]} <= {"gs://"}


def test_doctor_says_what_is_missing_and_what_fails(tmp_path: Path) -> None:
    """The interpreter finds no zstandard, deepspeed or transformers, and its temporary folder does not exist."""
    program = (
        "import sys\nsys.modules.update(zstandard=None, deepspeed=None, transformers=None)\nfrom dsconv.cli import"
        " main\nimport tempfile\ntempfile.tempdir = '/nonexistent'\nmain(['doctor'])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    assert any(
        line.startswith("does not work: merging, casting and verifying a checkpoint: FileNotFoundError: ")
        for line in lines
    )
    assert "works: refusing a pickle that would run code" in lines
    assert any("zstd: " in line and line.endswith("pip install 'dsconv-toolkit[zstd]'") for line in lines)


NO_HEAVY = """
import atexit, os, sys
heavy, arguments = set(sys.argv[1].split(",")), sys.argv[2:]
@atexit.register
def check():
    found = heavy & {name.partition(".")[0] for name in sys.modules}
    if found:
        print("imported:", sorted(found), file=sys.stderr, flush=True)
        os._exit(9)
from dsconv.cli import main
sys.exit(main(arguments))
"""
HEAVY = ("torch", "deepspeed", "transformers", "numpy", "safetensors", "huggingface_hub")


@pytest.mark.parametrize(
    "case",
    [
        "llama_groups-z0-bf16-w2",
        "llama_tied-z1-bf16-w3",
        "llama_frozen-z2-bf16-w2",
        "odd-z3-bf16-w2",
        "mixtral-z3-fp32-w4",
    ],
)
def test_a_merge_without_a_cast_needs_no_torch_and_no_deepspeed(
    case: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    made = trained(case)
    # Masters without names are told apart by their values, which needs numpy.
    heavy = [name for name in HEAVY if not (name == "numpy" and "-z0-" in case)]
    for arguments in (
        ["zero-to-fp32", made.checkpoint, tmp_path / "out", "--verify", "--sha256"],
        ["inspect", made.checkpoint, "--json"],
        ["verify", made.checkpoint, tmp_path / "out"],
    ):
        result = subprocess.run(
            [sys.executable, "-c", NO_HEAVY, ",".join(heavy), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    made.check(load_safetensors(tmp_path / "out"))


def test_a_closed_pipe_is_not_an_error(trained: Callable[[str], Trained]) -> None:
    command = f"{sys.executable} -m dsconv inspect {trained(CASE).checkpoint} --json | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_progress_on_a_terminal_and_in_a_log(tmp_path: Path) -> None:
    """On a terminal, stderr shows a bar with bytes, rate and time left. The output of a pipe stays clean."""
    import pty

    save_file({f"w{i}": torch.zeros(4 << 20) for i in range(5)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-m", "dsconv", "merge", str(tmp_path), str(tmp_path / "out")]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command, stderr=slave, stdout=subprocess.PIPE, env={**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    assert process.wait() == 0
    text = shown.decode()
    assert "copy" in text
    assert "MB" in text
    assert "/s" in text
    piped = dsconv("merge", tmp_path, tmp_path / "out2")
    assert piped.code == 0
    assert not [line for line in piped.err.splitlines() if "config.json" not in line]
