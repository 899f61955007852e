"""A vision transformer for several tasks (models/task_vit.py), and what it is trained for."""

import dataclasses
from typing import ClassVar

from moejax.config.checks import require
from moejax.config.registry import MODEL_CONFIGS, OBJECTIVE_CONFIGS
from moejax.config.vision import AugmentConfig, ViTConfig


@MODEL_CONFIGS.register("task_vit")
@dataclasses.dataclass(frozen=True)
class TaskViTConfig(ViTConfig):
    """Vision transformer for several tasks, one for each picture.

    The tasks are its ``modalities``: whatever goes by modality (a router of its own, losses of the
    routing, the figures in the log) goes by task.
    """

    one_modality: ClassVar[bool] = False

    name: str = "task_vit"
    modalities: tuple[str, ...] = ("class", "rotation", "group")
    # Classes of each task; num_classes is their sum, the classes of all tasks side by side.
    task_classes: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        require(
            len(self.task_classes) in (0, len(self.modalities)),
            "model.task_classes",
            f"needs the classes of each of {len(self.modalities)} tasks (model.modalities), got "
            f"{len(self.task_classes)}",
        )
        require(
            all(count > 1 for count in self.task_classes),
            "model.task_classes",
            f"a task has at least 2 classes, got {self.task_classes}",
        )
        require(
            sum(self.task_classes) == self.num_classes,
            "model.num_classes",
            f"must be {sum(self.task_classes)}, the sum of model.task_classes",
        )


@OBJECTIVE_CONFIGS.register("multitask")
@dataclasses.dataclass(frozen=True)
class MultitaskConfig:
    """A class for each picture, by the picture's task (objectives/multitask.py)."""

    name: str = "multitask"
    # Of the task "group": the group that each label belongs to.
    groups: tuple[int, ...] = ()
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        require(min(self.groups, default=0) >= 0, "objective.groups", "must not be negative")
        self.augment.require_whole("pictures of two tasks cannot be mixed")
