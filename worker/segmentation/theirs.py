"""What TotalSegmentator's own installed package says: class maps and archives; and how to run it without its posts.

Only its tables are imported in a worker; they are plain dictionaries and run nothing. Its program runs in the
comparison (tests, `make bench`), in a process of its own, with the environment that `environment` gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from worker.segmentation.weights import Task

RELEASES = "https://github.com/wasserth/TotalSegmentator/releases/download"
VERTEBRAE = "class_map_part_vertebrae"
BACKGROUND = "background"


def class_map(task: Task, dataset: int) -> Mapping[int, str]:
    """Class index -> name of one of the task's networks, by TotalSegmentator's installed tables."""
    from totalsegmentator import map_to_binary as tables

    if dataset == task.coarse:
        names: Mapping[int, str] = tables.class_map[task.name]
    else:
        parts = tables.class_map_5_parts_total_v3 if task.name == "total_v3" else tables.class_map_5_parts
        names = parts[VERTEBRAE]
    return {0: BACKGROUND, **names}


def archive_url(dataset: int, releases: str = RELEASES) -> str:
    """Where the published archive of a data set lies."""
    from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS

    described = TASK_ID_WEIGHTS_CONFIGS[dataset]
    return f"{releases.rstrip('/')}/{described['version']}/{described['foldername']}.zip"


def folder_name(dataset: int) -> str:
    """How TotalSegmentator names the data set's folder."""
    from totalsegmentator.map_tasks_config import TASK_ID_WEIGHTS_CONFIGS

    return str(TASK_ID_WEIGHTS_CONFIGS[dataset]["foldername"])


def environment(home: Path, weights: Path) -> Mapping[str, str]:
    """Variables for a process that runs TotalSegmentator: our folders, and its usage statistics off.

    It posts to its makers' server after every run unless its config.json says otherwise before the first one.
    """
    home.mkdir(parents=True, exist_ok=True)
    config = {
        "totalseg_id": "none",
        "send_usage_stats": False,
        "statistics_disclaimer_shown": True,
        "prediction_counter": 0,
    }
    (home / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {"TOTALSEG_HOME_DIR": str(home), "TOTALSEG_WEIGHTS_PATH": str(weights)}
