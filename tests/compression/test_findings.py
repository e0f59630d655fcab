"""What a comparison's folder holds is all reported, whatever was asked for now."""

import json
from pathlib import Path
from typing import Any

import pytest

from policykd.compression.comparison import DONE, Setting
from policykd.compression.findings import finished_rows
from policykd.compression.rows import TEACHER, Row, standard_rows
from policykd.evaluation.evaluate import PROTOCOLS
from policykd.io.files import BadFile
from policykd.legacy.states import DatasetStates

ROWS = standard_rows(6, 1.0)


def write(folder: Path, row: Row, **changed: Any) -> None:
    """Writes what an older version wrote: neither `from_card` nor what a row descends from."""
    results = {"name": row.name, "made_by": row.made_by, "protocols": {p: {"num_episodes": 3} for p in PROTOCOLS}}
    (folder / row.name).mkdir()
    (folder / row.name / DONE).write_text(json.dumps(results | changed))


def test_rows_that_were_not_asked_for_stay_and_say_what_they_descend_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = Setting(tmp_path, "Pong", "auto", DatasetStates(tmp_path), 20, 8, 100, 0)
    for name in (TEACHER, "7pct", "7pct-int8", "magnitude-7pct"):
        write(tmp_path, ROWS[name])
    write(tmp_path, ROWS["1pct"], made_by="in another way")
    found = finished_rows(setting, ROWS, [TEACHER])
    assert list(found) == [TEACHER, "7pct", "7pct-int8", "magnitude-7pct"]  # each with 3 games of 100
    assert found["7pct-int8"]["origin"] == "distillation"
    assert found["7pct-int8"]["begins_with"] == ("7pct",)
    assert [row["updates_in_all"] for row in found.values()] == [0, 20, 20, 20]
    warning = capsys.readouterr().err
    assert warning.startswith("warning: not in the table: ")
    assert warning.count("\n") == 1
    with pytest.raises(ValueError, match="1pct: made by in another way"):
        finished_rows(setting, ROWS, ["1pct"])
    (tmp_path / "7pct" / DONE).write_text("{")
    with pytest.raises(BadFile, match=r"7pct/row\.json: damaged"):
        finished_rows(setting, ROWS, [TEACHER])
