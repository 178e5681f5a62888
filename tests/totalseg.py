"""Weights in TotalSegmentator's own layout and class order, for tests and benchmarks: none can be downloaded here."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import torch

from models.spine_unet import NETWORKS, SpineUNetConfig, build, write_network
from models.weight_files import CHECKPOINT
from worker.segmentation.theirs import class_map, folder_name
from worker.segmentation.weights import BUILT_IN, TASKS, Task

TOTAL, TOTAL_V3 = TASKS
NEVER = -500.0  # the logit of a class that the built-in networks do not know
TRAINERS = {
    "coarse": "nnUNetTrainer_4000epochs_NoMirroring",
    "fine": "nnUNetTrainerNoMirroring",
}


def config(task: Task, dataset: int, **changes: object) -> SpineUNetConfig:
    """A network of the task's data set, with all the classes that TotalSegmentator's table gives it."""
    role = "coarse" if dataset == task.coarse else "fine"
    names = class_map(task, dataset)
    made = dataclasses.replace(
        NETWORKS[role],
        dataset=folder_name(dataset),
        trainer=TRAINERS[role],
        spacing_mm=(task.coarse_mm if role == "coarse" else task.fine_mm,) * 3,
        classes=tuple(names[index] for index in sorted(names)),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def tiny(task: Task, root: Path) -> Path:
    """Both networks of a task with random weights, a few KB each."""
    return random_weights(task, root, features=(2, 4), convolutions=(1, 1), patch_size=(32, 32, 32))


def published_size(task: Task, root: Path) -> Path:
    """Both networks as large as the published ones: 6 stages of 32 to 320 channels, tiles of 128^3."""
    channels = (32, 64, 128, 256, 320, 320)
    return random_weights(task, root, features=channels, convolutions=(2,) * 6, patch_size=(128, 128, 128))


def random_weights(task: Task, root: Path, **changes: object) -> Path:
    """Both networks of a task, untrained."""
    torch.manual_seed(task.fine)
    for dataset in task.datasets:
        made = config(task, dataset, **changes)
        write_network(made, build(made).state_dict(), root, training_cases=0)
    return root


def built_in_in_their_layout(root: Path) -> Path:
    """The built-in networks, their classes moved to the places that TotalSegmentator's tables give them."""
    for role, own in NETWORKS.items():
        names = class_map(TOTAL, TOTAL.coarse if role == "coarse" else TOTAL.fine)
        place = {name: index for index, name in names.items()}
        known = [index for index, name in enumerate(own.classes) if name in place]
        folder = root / own.folder
        (folder / CHECKPOINT).parent.mkdir(parents=True)
        checkpoint = torch.load(BUILT_IN / own.folder / CHECKPOINT, weights_only=True)
        for name, value in checkpoint["network_weights"].items():
            if ".seg_layers." in name:
                moved = torch.full((len(names), *value.shape[1:]), NEVER if name.endswith("bias") else 0.0).half()
                moved[[place[own.classes[index]] for index in known]] = value[known].half()
                checkpoint["network_weights"][name] = moved
        torch.save(checkpoint, folder / CHECKPOINT)
        shutil.copy(BUILT_IN / own.folder / "plans.json", folder / "plans.json")
        dataset = json.loads((BUILT_IN / own.folder / "dataset.json").read_text())
        dataset["labels"] = place
        (folder / "dataset.json").write_text(json.dumps(dataset))
    return root


def zipped(root: Path, into: Path) -> list[Path]:
    """One archive for each data set folder below `root`, as TotalSegmentator publishes them."""
    into.mkdir(parents=True, exist_ok=True)
    archives = []
    for folder in sorted(root.glob("Dataset*")):
        path = into / f"{folder.name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(root).as_posix())
            archive.writestr(f"{folder.name}/progress.png", b"a plot that nobody needs")
        archives.append(path)
    return archives
