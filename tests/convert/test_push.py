"""Push to a server with the Hub's API: what arrives, what is refused, what is sent again and what is not."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import dsconv as package
from dsconv import merge
from dsconv.convert.model_card import BEGIN, END, make_card
from dsconv.convert.model_card import merged as merged_card
from dsconv.convert.push_files import open_model, read_manifest
from dsconv.errors import DsconvError, MalformedError, MismatchError, RemoteError, UnsafeError
from tests.servers.hubwriting import Fault, Shell, WritableHub, contents, download
from tests.trained import Trained, load_safetensors

CASE = "llama_tied-z3-bf16-w2"


@pytest.fixture(scope="module")
def merged(trained: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a merge in several shards, with a file in a subfolder."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge(trained(CASE).checkpoint, folder, max_shard_size="8KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def folder(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "model"))


def test_what_is_pushed_comes_back_byte_by_byte(
    hub: WritableHub, folder: Path, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    before = contents(folder)
    calls: list[tuple[str, int, int]] = []
    report = package.push(folder, "org/new", private=True, progress=lambda *call: calls.append(call))
    assert contents(folder) == before  # the folder is unchanged
    assert (report.created, report.private, report.checked, report.changed) == (True, True, True, True)
    assert hub.is_private("org/new")
    assert [c["message"] for c in hub.commits] == ["initial commit", "Step 2 of a ZeRO-3 checkpoint"]
    back = download(hub, "org/new", tmp_path / "back")
    card = back.pop("README.md").decode()
    assert back == before
    trained(CASE).check(load_safetensors(tmp_path / "back"))
    for words in (
        "# new\n",
        "| merged from | ZeRO-3 |",
        "| ranks | 2 data parallel, 1 model parallel |",
        "| step | 2 |",
        "| dtype | float32 |",
        "| parameters | 5,376 in 20 tensors |",
        "library_name: transformers",
        'LlamaForCausalLM.from_pretrained("org/new")',
    ):
        assert words in card, card
    assert calls[-1] == ("check", report.nbytes - len(card.encode()), report.nbytes - len(card.encode()))
    assert report.files[-1] == {
        "file": "README.md",
        "bytes": len(card.encode()),
        "sha256": hashlib.sha256(card.encode()).hexdigest(),
    }
    for row in report.files[:-1]:
        assert f"| `{row['file']}` | {row['bytes']:,} | `{row['sha256']}` |" in card

    sent = len(hub.received)
    again = package.push(folder, "org/new", private=True)
    assert (again.created, again.changed, again.commit) == (False, False, report.commit)
    assert (len(hub.received), len(hub.commits)) == (sent, 2)


PASSING: dict[str, tuple[str, int | str, dict[str, str]]] = {
    "too many requests": ("PUT /lfs", 429, {"Retry_After": "1"}),
    "a failure of the server": ("PUT /lfs", 500, {}),
    "a failure of the preupload": ("/preupload/", 503, {}),
    "connections that are dropped": ("PUT /lfs", "drop", {}),
    "connections that are cut half way": ("PUT /lfs", "half", {}),
    "an answer to the commit that is lost": ("/commit/", "deaf", {}),
}


@pytest.mark.parametrize("name", PASSING)
def test_transient_failures_are_retried(name: str, hub: WritableHub, folder: Path, tmp_path: Path) -> None:
    request, what, headers = PASSING[name]
    hub.faults = [Fault(request, what, 1 if what == "deaf" else 3, headers)]
    assert package.push(folder, "org/new").changed
    assert hub.faults[0].times == 0
    assert len(hub.commits) == 2
    back = download(hub, "org/new", tmp_path / "back")
    back.pop("README.md")
    assert back == contents(folder)


def test_what_has_arrived_is_not_sent_again(hub: WritableHub, folder: Path) -> None:
    last = package.push(folder, "org/other").files[-5]["sha256"]  # a shard
    assert last in hub.objects
    hub.objects.clear()
    hub.received.clear()
    hub.faults = [Fault(f"PUT /lfs/{last}", 500, 99)]
    with pytest.raises(RemoteError, match=r"failed with 500 .*run it again to go on") as failed:
        package.push(folder, "org/new")
    assert "\n" not in str(failed.value)
    assert len(hub.commits) == 3  # the repository exists, without half a model in it
    arrived = {oid for oid, _ in hub.received}
    assert arrived
    assert last not in arrived
    hub.faults, hub.received = [], []
    assert package.push(folder, "org/new").changed
    assert {oid for oid, _ in hub.received}.isdisjoint(arrived)
    assert last in {oid for oid, _ in hub.received}


def test_a_commit_of_somebody_else_in_between(hub: WritableHub, folder: Path) -> None:
    hub.make("org/new", {"README.md": b"# mine\n"})

    def interfere(phase: str, done: int, total: int) -> None:
        if done == total:
            hub.put("org/new", "main", hub.head("org/new"), {"other.txt": b"x"}, [], "theirs")

    with pytest.raises(
        RemoteError, match=r"org/new: the repository changed while this ran \(.*A commit has happened since"
    ):
        package.push(folder, "org/new", progress=interfere)
    assert hub.commits[-1]["message"] == "theirs"
    assert package.push(folder, "org/new").changed
    assert (hub.head("org/new") / "other.txt").read_bytes() == b"x"


Damage = Callable[[Path], object]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def rename_in_manifest(folder: Path) -> None:
    path = folder / "dsconv.manifest.json"
    path.write_text(path.read_text().replace('"model.norm.weight"', '"model.norm.bias"'))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a bit": (
        lambda f: flip(f / "model-00002-of-00003.safetensors"),
        "in model-00002-of-00003.safetensors has the CRC-32 ",
    ),
    "weights of another model": (
        lambda f: shutil.copy(f / "model-00001-of-00003.safetensors", f / "model-9.safetensors"),
        "does not know",
    ),
    "a name": (rename_in_manifest, "tensor 'model.norm.bias' is only in the manifest"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_is_not_what_its_manifest_says(name: str, hub: WritableHub, folder: Path) -> None:
    damage, words = DAMAGES[name]
    damage(folder)
    with pytest.raises(MismatchError, match="Nothing was pushed: merge again, or --no-check") as refused:
        package.push(folder, "org/new")
    assert words in str(refused.value)
    assert hub.commits == []
    report = package.push(folder, "org/new", check=False)
    assert (report.checked, report.changed) == (False, True)


def test_a_file_that_changes_after_its_check(hub: WritableHub, folder: Path) -> None:
    hub.make("org/new")

    def change(phase: str, done: int, total: int) -> None:
        if done == total:
            flip(folder / "model-00001-of-00003.safetensors")

    with pytest.raises(
        MismatchError, match=r"the Hub's commit .* differs: model-00001-of-00003\.safetensors has the sha256"
    ):
        package.push(folder, "org/new", progress=change)


def test_weights_of_an_earlier_push_are_removed(hub: WritableHub, folder: Path, tmp_path: Path) -> None:
    """from_pretrained would prefer an old model.safetensors to a new index."""
    keep = {"other.safetensors": b"x", "pytorch_model.bin": b"y", "sub/model.safetensors": b"z"}
    hub.make("org/new", {"model.safetensors": b"old", "model-00007-of-00007.safetensors": b"old", **keep})
    report = package.push(folder, "org/new")
    assert report.deleted == ["model-00007-of-00007.safetensors", "model.safetensors"]
    back = download(hub, "org/new", tmp_path / "back")
    assert {name: back[name] for name in keep} == keep
    assert "model.safetensors" not in back


def test_branches(hub: WritableHub, folder: Path) -> None:
    hub.make("org/new", {"README.md": b"# mine\n"})
    start = hub.head("org/new")
    report = package.push(folder, "org/new", revision="step/2", commit_message="hello")
    assert (report.revision, hub.commits[-1]["message"], hub.commits[-1]["revision"]) == ("step/2", "hello", "step/2")
    assert hub.head("org/new") == start
    assert not package.push(folder, "org/new", revision="step/2").changed
    with pytest.raises(RemoteError, match="no such repository or no revision 'refs/pr/9' of it"):
        package.push(folder, "org/new", revision="refs/pr/9")
    with pytest.raises(RemoteError, match="no such repository or no revision"):
        package.push(folder, "org/never", revision="refs/pr/1")
    assert "org/never" not in hub.repos
    with pytest.raises(ValueError, match="against the main branch"):
        package.push(folder, "org/new", revision="v1", create_pr=True)


def test_private_means_private(hub: WritableHub, folder: Path) -> None:
    hub.make("org/public")
    with pytest.raises(UnsafeError, match="org/public already exists and is public"):
        package.push(folder, "org/public", private=True)
    hub.make("org/private", private=True)
    assert package.push(folder, "org/private").private


def test_links_and_the_state_of_a_run(hub: WritableHub, folder: Path, tmp_path: Path) -> None:
    """A link out of the folder would publish its target, and optimizer states are not part of the model."""
    for name in ("optimizer.pt", "rng_state_0.pth", "training_args.bin", ".hidden", "latest"):
        (folder / name).write_text("x")
    (folder / "global_step2").mkdir()
    (folder / "global_step2" / "mp_rank_00_model_states.pt").write_text("x")
    (folder / "copy.json").symlink_to("tokenizer.json")
    report = package.push(folder, "org/new", dry_run=True)
    assert report.left_out == [
        "global_step2/",
        ".hidden",
        "latest",
        "optimizer.pt",
        "rng_state_0.pth",
        "training_args.bin",
    ]
    assert hub.requests == []
    package.push(folder, "org/new")
    pushed = set(contents(hub.head("org/new")))
    assert pushed == {row["file"] for row in report.files} | {"README.md", ".gitattributes"}
    assert "copy.json" in pushed
    (tmp_path / "secret").write_text("hf_secret")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeError, match=r"vocab\.txt is a link out of its folder"):
        package.push(folder, "org/new")


def test_a_readme_keeps_every_line(hub: WritableHub, folder: Path) -> None:
    ours = "---\n# a comment\nlicense:   mit   # mine\ntags: [a]\n---\r\n# Title\n\nText | with `things`.\n"
    hub.make("org/new", {"README.md": ours.encode()})
    package.push(folder, "org/new")
    first = (hub.head("org/new") / "README.md").read_bytes().decode()
    lines = first.splitlines()
    assert [line for line in ours.splitlines() if line not in lines] == []
    assert first.count("tags:") == 1
    assert "library_name: transformers" in lines
    written = (hub.head("org/new") / "README.md").read_text() + "\nAn afterthought.\n"
    hub.put("org/new", "main", hub.head("org/new"), {"README.md": written.encode()}, [], "by hand")
    (folder / "README.md").write_text("# From the folder\n")
    replaced = package.push(folder, "org/new")
    assert any("replaces the Hub's, of which it lacks" in warning for warning in replaced.warnings)
    assert (folder / "README.md").read_text() == "# From the folder\n"
    assert "# From the folder\n" in (hub.head("org/new") / "README.md").read_text()


TEXT = st.lists(
    st.sampled_from(["---", "a: 1", "tags: [b]", "# c", "text", "", "  x", "- y", "<!-- dsconv: end -->", "{d: 1}"])
)


@given(TEXT, st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_readme_keeps_its_lines_in_order(lines: list[str], newline: str, ends: bool) -> None:
    text = newline.join(lines) + newline * ends
    section = f"{BEGIN}\n## The weights\n{END}"
    made = merged_card(text, section, {"library_name": "transformers", "tags": ["dsconv"]})
    remaining = iter(made.splitlines())
    assert all(line in remaining for line in text.splitlines())
    assert made.count("## The weights") == 1
    assert merged_card(made, section.replace("weights", "new weights"), {}) == made.replace(
        "The weights", "The new weights"
    )


HOSTILE = "![x](//evil.example/t.png) [y](javascript:alert(1)) <img src=x> `|` \\| https://evil.example \x1b[2J\n# z"


def test_a_manifest_and_a_files_name_write_no_markdown_and_no_code(folder: Path) -> None:
    """What a download brings is shown in the card as text, and its file's name as a literal of Python."""
    manifest = json.loads((folder / "dsconv.manifest.json").read_text())
    manifest["source"] |= {"format": HOSTILE, "step": HOSTILE, "world": {HOSTILE: HOSTILE}}
    manifest["dsconv_version"] = HOSTILE
    weights = 'a")); evil("//x") #```\n.safetensors'
    model = open_model(folder)
    (folder / "none").mkdir()
    digests = {HOSTILE: "0", weights: "1"}
    card = make_card(None, "org/new", folder / "none", model, manifest, dict.fromkeys(digests, 1), digests)
    assert all(char.isprintable() or char == "\n" for char in card)
    tokens = MarkdownIt("commonmark").enable("table").parse(card[card.index(BEGIN) :])
    inner = [token for token in tokens for token in [token, *(token.children or ())]]
    links = {str(token.attrs["href"]) for token in inner if token.type == "link_open"}
    assert links == {"https://pypi.org/project/dsconv/"}
    assert {token.content for token in inner if token.type in ("html_block", "html_inline")} == {
        f"{BEGIN}\n",
        f"{END}\n",
    }
    assert not [token for token in inner if token.type == "image"]
    assert "evil.example" not in "".join(
        token.content for token in inner if token.type == "text"
    )  # no address to click
    rows = [
        sum(cell.type == "td_open" for cell in tokens[at:])
        for at, token in enumerate(tokens)
        if token.type == "tr_open"
    ]
    assert rows
    fence = next(token.content for token in inner if token.type == "fence")
    call = ast.parse(fence).body[-1]
    assert isinstance(call, ast.Assign)
    assert [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)] == ["org/new", weights]
    calls = [ast.unparse(node.func) for node in ast.walk(call) if isinstance(node, ast.Call)]
    assert calls == ["load_file", "hf_hub_download"]


def test_a_card_takes_time_in_proportion() -> None:
    began = time.process_time()
    text = BEGIN * 20_000
    assert merged_card(text, f"{BEGIN}fresh{END}", {}).count("fresh") == 1
    assert time.process_time() - began < 1


FAILURES: dict[str, tuple[str, list[Fault], dict[str, str], str]] = {
    "401": ("org/new", [], {"HF_TOKEN": "hf_wrong"}, "does not accept the token, or gives it no access: set HF_TOKEN"),
    "403": ("others/new", [], {}, "the token may not write there: set HF_TOKEN"),
    "404": ("org/new", [Fault("/preupload/", 404)], {}, "no such repository on the Hub"),
    "409": ("org/new", [Fault("/commit/", 409)], {}, "the repository changed while this ran"),
    "429": ("org/new", [Fault("/lfs/", 429, 99)], {}, "the Hub asks for fewer requests"),
    "500": ("org/new", [Fault("/batch", 500, 99)], {}, "failed with 500 (injected 500): run it again to go on"),
    "413": ("org/new", [Fault("/commit/", 413)], {}, "the Hub refused it (413): injected 413"),
    "a cut connection": ("org/new", [Fault("/commit/", "drop")], {}, "cannot be reached: RemoteProtocolError"),
    "no network": ("org/new", [], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached: ConnectError"),
    "offline": ("org/new", [], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, and a push needs the Hub"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_failures_of_the_hub_are_one_sentence(
    name: str, hub: WritableHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, hub.faults, environment, words = FAILURES[name]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(RemoteError) as failed:
        package.push(folder, repo)
    message = str(failed.value)
    assert message.startswith(f"{repo}: ")
    assert words in message
    assert "\n" not in message
    assert "://127.0.0.1" not in message.replace(f"({os.environ['HF_ENDPOINT']}", "")  # no signed addresses
    assert failed.value.exit_code == 6


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_manifest_that_is_not_a_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "dsconv.manifest.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(MalformedError, match="not the JSON that a merge writes"):
        read_manifest(tmp_path)


def test_folders_without_a_model(hub: WritableHub, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    for source, words in (
        (trained(CASE).checkpoint, "holds no safetensors"),
        (tmp_path / "no", "no such folder"),
    ):
        with pytest.raises(DsconvError, match=words):
            package.push(source, "org/new")
    with pytest.raises(ValueError, match="a repository of the Hub is written org/model"):
        package.push(tmp_path, "model")
    assert hub.requests == []


def test_the_command_over_xet(hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hf_xet as installed, chunks go to its local store and the commit to the Hub, and everything comes back."""
    import hf_xet
    from safetensors.torch import save_file

    folder = tmp_path / "saved"  # save_pretrained makes no manifest
    folder.mkdir()
    save_file(
        {"w": torch.arange(300_000, dtype=torch.float32)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "_name_or_path": "org/base"}))
    shell = Shell(hub, tmp_path)
    dry = shell("push", folder, "org/new", "--dry-run")
    assert dry.code == 0, dry.err
    assert [line.split() for line in dry.out.splitlines()[:2]] == [
        ["61", "config.json"],
        ["1,200,104", "model.safetensors"],
    ]
    assert dry.out.splitlines()[2] == "2 files, 1.20 MB, and a model card; nothing was sent (--dry-run)"
    assert hub.requests == []

    hub.xet = tmp_path / "store"
    (row,) = hf_xet.hash_files([str(folder / "model.safetensors")])
    weights = folder / "model.safetensors"
    hub.xet_files = {hashlib.sha256(weights.read_bytes()).hexdigest(): (row.hash, weights)}
    pushed = shell("push", folder, "org/new", "--private", "--json")
    assert pushed.code == 0, pushed.err
    assert pushed.err == ""
    assert pushed.json["warnings"] == [
        f"{folder} has no dsconv.manifest.json: there was nothing to check the files against"
    ]
    assert (pushed.json["checked"], pushed.json["private"], hub.received) == (False, True, [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    back = download(hub, "org/new", tmp_path / "back")
    card = back.pop("README.md").decode()
    assert back == contents(folder)
    assert "base_model: org/base" in card
    assert 'BertModel.from_pretrained("org/new")' in card

    # The client sends the commit again, which is refused, since the head has moved.
    hub.faults = [Fault("/commit/", "deaf")]
    (folder / "config.json").write_text("{}")
    lost = shell("push", folder, "org/new")
    assert lost.code == 0, lost.err
    assert [c["revision"] for c in hub.commits] == ["main", "main", "main"]
    assert lost.out.splitlines()[:2] == [f"{folder} → org/new, main", "3 files, 1.20 MB, not checked"]


def test_pull_requests(hub: WritableHub, folder: Path) -> None:
    hub.make("others/theirs", {"README.md": b"# theirs\n"})
    start = hub.head("others/theirs")
    hub.faults = [Fault("/preupload/", 404)]
    hub.others = ""
    with pytest.raises(RemoteError, match="The pull request is open: push with --revision refs/pr/1 to go on with it"):
        package.push(folder, "others/theirs", create_pr=True)
    report = package.push(folder, "others/theirs", revision="refs/pr/1")
    assert (hub.pulls, hub.head("others/theirs")) == (1, start)
    second = package.push(folder, "others/theirs", create_pr=True)
    assert (second.revision, second.pull_request) == ("refs/pr/2", f"{hub.url}/others/theirs/discussions/2")
    hub.repos["others/theirs"]["main"] = hub.head("others/theirs", "refs/pr/1")  # as if the pull request were merged
    third = package.push(folder, "others/theirs", create_pr=True)
    assert (third.changed, third.pull_request, third.commit, hub.pulls) == (False, None, report.commit, 2)


def test_a_merge_that_pushes(hub: WritableHub, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    shell = Shell(hub, tmp_path)
    source = trained(CASE).checkpoint
    failed = shell("zero-to-fp32", source, "out", "--push-to-hub", "others/new", HF_HUB_DISABLE_XET="1")
    assert failed.code == 6, failed.err
    assert failed.err.startswith("Error: others/new: the token may not write there")
    assert "The model is whole in out; to push it: dsconv push out others/new" in failed.err
    trained(CASE).check(load_safetensors(tmp_path / "out"))
    before = shell("merge", source, "never", "--push-to-hub", "org/new", HF_TOKEN="")
    assert (before.code, (tmp_path / "never").exists()) == (6, False)  # the error comes before the work, not after it
    assert "no token to write with" in before.err
    assert shell("merge", source, "never", "--private").code == 2
    hub.make("org/public")
    public = shell("merge", source, "kept", "--push-to-hub", "org/public", "--private")
    assert (public.code, "dsconv push kept org/public --private" in public.err) == (4, True), public.err
    options = ("--push-to-hub", "org/new", "--private", "--dtype", "bf16", "--json")
    report = shell("merge", source, "again", *options, HF_HUB_DISABLE_XET="1")
    assert report.code == 0, report.err
    assert (report.json["pushed"]["checked"], hub.is_private("org/new")) == (True, True)
    back = download(hub, "org/new", tmp_path / "back")
    back.pop("README.md")
    assert back == contents(tmp_path / "again")
    assert shell("push", "again", "no-repo").code == 2
