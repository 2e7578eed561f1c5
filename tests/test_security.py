"""Check that the links in SECURITY.md work, that every test that it names exists and is collected, and that every
sentence of docs/safety.md has its test.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SECURITY.md").read_text()
SAFETY = (ROOT / "docs" / "safety.md").read_text()
# How each sentence of docs/safety.md begins, and what tests it; nothing where it only says why.
SENTENCES: dict[str, tuple[str, ...]] = {
    "A checkpoint is a program unless": (),
    "But dsconv has to read": (),
    "This page explains": (),
    "One reader,": ("test_nothing_else_reads_pickles",),
    "It imports nothing that a file names.": ("test_a_hostile_pickle_is_refused_by_name_and_nothing_runs",),
    "`allowlist.py` maps": (
        "test_the_objects_around_tensors",
        "test_a_hostile_pickle_is_refused_by_name_and_nothing_runs",
    ),
    "Any other name is an inert label.": ("test_objects_of_the_users_classes_become_labels",),
    "An object of a class of your own": ("test_what_a_client_state_may_hold_is_read_as_labels",),
    "`dsconv inspect` counts them": ("test_what_a_client_state_may_hold_is_read_as_labels",),
    "A *call* of anything": ("test_a_hostile_pickle_is_refused_by_name_and_nothing_runs",),
    "So is any name of Python's own library": ("test_a_hostile_pickle_is_refused_by_name_and_nothing_runs",),
    "One kind of call is allowed": ("test_members_of_enumerations_are_labels_with_their_value",),
    "A tensor that is not a view of one storage": (
        "test_tensors_that_are_not_views_of_a_storage_are_marked",
        "test_kinds_of_tensor_that_need_code_are_refused_by_name",
    ),
    "Sizes, nesting, integers and dimensions": (
        "test_a_malformed_pickle_says_what_is_wrong_and_where",
        "test_a_pickle_over_the_limit_is_refused_unread",
        "test_depth_never_escapes_as_a_recursion_error",
    ),
    "A pickle of n bytes takes": ("test_memory_and_time_are_in_proportion_to_the_pickle",),
    "Dictionary keys that a file could make": ("test_every_key_whose_hash_a_file_can_choose_pays_for_collisions",),
    "A tensor that repeats its storage": ("test_a_small_storage_repeated_into_a_huge_tensor_is_refused",),
    "The result is checked field by field": ("test_values_that_do_not_fit_are_refused_by_file_and_field",),
    "A fuzzer gives the fields": ("test_broken_files_are_refused_or_read_as_before",),
    "Upstream hands the name patterns": (),
    "Here `name_patterns.py` matches them": (
        "test_patterns_match_as_re_does",
        "test_patterns_of_autotp_are_names_and_evil_ones_take_no_time",
    ),
    "JSON is read to": ("test_json_is_read_to_a_depth", "test_a_configuration_of_any_depth_is_an_error_by_name"),
    "`torchfile/zip.py` reads only": ("test_what_torch_never_writes_is_refused",),
    "It refuses compressed": (
        "test_a_zip_that_deflates_is_refused_by_name",
        "test_what_torch_never_writes_is_refused",
        "test_a_zip64_end_that_does_not_touch_its_locator_is_refused",
    ),
    "If two readers see two different files": (
        "test_bytes_put_before_a_zip_are_refused_though_its_offsets_know_of_them",
    ),
    "A fuzzer puts archives together": ("test_broken_files_are_refused_or_read_as_before",),
    "torch's older format has no zip": (),
    "Its pickles go through the same reader": (
        "test_every_program_is_refused_wherever_it_hides",
        "test_broken_legacy_files_are_malformed",
    ),
    "A storage's size is checked": ("test_a_bad_file_says_what_is_wrong",),
    "Each record's CRC-32 is checked": ("test_damage_to_a_chunk_is_found_by_its_checksum", "test_damaged_checkpoint"),
    "Files that were saved without checksums": ("test_a_file_without_checksums_says_so",),
    "Headers must follow the rules": ("test_a_broken_header_is_malformed", "test_the_library_refuses_these_too"),
    "A name that is given twice": (
        "test_a_broken_header_is_malformed",
        "test_a_broken_index_is_malformed",
        "test_an_index_that_leaves_the_folder_is_refused",
    ),
    "A link that leaves the folder that you named": ("test_a_link_that_leaves_the_folder_is_refused",),
    "The rule covers everything that is read": (
        "test_files_of_deepspeed_and_dcp_follow_the_same_rule",
        "test_files_beside_the_weights_follow_the_same_rule",
        "test_a_configuration_in_a_parent_folder_follows_the_same_rule",
    ),
    "Links inside the folder": (
        "test_links_that_the_user_names_and_links_inside_are_fine",
        "test_a_snapshot_of_the_cache_reaches_its_own_blobs_only",
    ),
    "`--follow-links`": ("test_every_command_takes_follow_links",),
    "Only regular files are opened": ("test_only_regular_files_are_opened", "test_small_files_are_read_up_to_a_limit"),
    "A configuration that is not a regular file": ("test_a_configuration_of_gigabytes_is_refused",),
    "A warning names any other file": ("test_what_is_not_copied_is_named_with_its_reason",),
    "A file that was replaced": ("test_a_shard_that_is_replaced_while_others_are_opened",),
    "When it opens a checkpoint": (
        "test_a_whole_mp_rank_is_missing",
        "test_files_of_another_step",
        "test_swapped_mp_ranks",
        "test_every_truncation_is_refused",
    ),
    "Files left over from a larger world": ("test_stale_ranks_of_a_larger_world_are_left_aside",),
    "One function escapes control characters": (
        "test_no_character_that_a_terminal_obeys_is_left",
        "test_names_from_files_cannot_steer_the_terminal",
        "test_commands_print_through_the_console_alone",
        "test_a_manifest_and_a_files_name_write_no_markdown_and_no_code",
    ),
    "It also cleans the text of every error": (
        "test_the_text_of_an_error_can_be_logged",
        "test_the_warnings_of_a_checkpoint_can_be_logged",
    ),
    "Its time is proportional": ("test_text_is_cleaned_in_time_in_proportion",),
    "In a page for the browser": ("test_names_of_a_checkpoint_cannot_act", "test_a_download_harms_nobody"),
    "In a model card": ("test_a_manifest_and_a_files_name_write_no_markdown_and_no_code",),
    "What a server says": ("test_what_a_server_says_is_shown_as_text", "test_credentials_are_not_shown"),
    "The names and the commit": ("test_a_commit_and_names_of_no_hub_are_refused",),
    "Nothing that looks like a model": ("test_whole_or_absent_wherever_a_run_is_killed_or_a_call_fails",),
    "An existing model is replaced only": (
        "test_output_exists",
        "test_the_second_of_two_processes_at_one_output_refuses",
    ),
    "Where dsconv writes": ("test_links_on_the_way_to_the_output", "test_a_hidden_folder_that_is_a_link"),
    "A hidden folder is cleared only": (
        "test_a_folder_that_dsconv_did_not_make",
        "test_a_hidden_folder_that_is_a_link",
    ),
    "Only marked files are removed": (
        "test_a_killed_runs_folder_that_was_copied_or_used",
        "test_nothing_is_cleared_before_the_source_was_opened",
    ),
    "A link that leaves a pushed folder": ("test_links_and_the_state_of_a_run",),
    "Hidden files and the state": ("test_links_and_the_state_of_a_run",),
    "`--private` never pushes": ("test_private_means_private",),
    "A signal while something is pushed": (
        "test_a_push_that_a_signal_ends",
        "test_a_watcher_that_a_signal_ends_while_it_pushes",
    ),
}


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def known_tests() -> set[str]:
    """Return the names of all files of tests, and of all functions in them."""
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.add(path.name)
        found |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    return found


def sentences(text: str) -> list[str]:
    """Return the sentences of a page, without its headings and tables."""
    found = []
    for paragraph in text.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not line.startswith(("#", "|"))]
        for item in re.split(r"(?m)^- ", "\n".join(lines)):
            plain = " ".join(item.split())
            found += [part for part in re.split(r"(?<=[.])\s+(?=[A-Z`])", plain) if part]
    return found


def test_every_sentence_about_safety_has_its_test() -> None:
    found = sentences(SAFETY)
    begun = {sentence: [start for start in SENTENCES if sentence.startswith(start)] for sentence in found}
    assert [sentence for sentence, starts in begun.items() if len(starts) != 1] == []
    assert {starts[0] for starts in begun.values()} == set(SENTENCES)
    assert {name for names in SENTENCES.values() for name in names} - known_tests() == set()


def test_nothing_else_reads_pickles() -> None:
    """No code of dsconv's calls Python's or torch's own reader of pickles."""
    readers = {("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("torch", "load"), ("joblib", "load")}
    calls = [
        f"{path.name}: {ast.unparse(node)}"
        for path in (ROOT / "dsconv").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in readers
    ]
    assert calls == []


def test_every_promise_names_a_test_that_is_there() -> None:
    there = known_tests()
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) >= 8
    for row in rows:
        named = re.findall(r"\b(test_\w+(?:\.py)?)\b", row.split("|")[2])
        assert named, row
        assert set(named) <= there, row
