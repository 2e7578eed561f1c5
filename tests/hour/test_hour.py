"""Twenty seconds of ``make hour``."""

from __future__ import annotations

from pathlib import Path

from tests.hour import hub, stores


def test_each_checkpoint_is_pushed_once_or_its_loss_is_told(tmp_path: Path) -> None:
    hour = hub.live(tmp_path, saves=12, every=0.7, kills=3)
    assert hour.problems == [], hour.log
    assert len(hour.saved) == 12
    assert hour.kills == 3
    assert len(hour.pushed) >= 3, hour.log
    assert "%|" not in hour.log, "no bars where there is no terminal"


def test_a_store_that_fails_gets_the_output_whole(tmp_path: Path) -> None:
    with stores.failing_s3(seed=1) as s3:
        outcome = stores.convert("to-dcp", tmp_path, s3, share=0.15)
    assert outcome.problems == []
    assert outcome.faults > 0
