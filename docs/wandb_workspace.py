"""Makes the panels of docs/tracking.md in a wandb project, as a view of its own; needs an account, and wandb-workspaces.

    python docs/wandb_workspace.py RUN_DIR --entity NAME

Project, tasks and metrics are those of the run, whose directory it reads. Panels that wandb makes by itself (system figures,
tables, histograms, spectra) stand below.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
import yaml

STEP, TASKS = "train/step", "scores/tasks_trained"
STAGE_FIGURES = {
    "sft": ("loss", "lr", "grad_norm"),
    "preference": ("loss", "lr", "grad_norm", "accuracy", "margin", "focal_weight", "gated_share"),
}


def workspace(config: Mapping[str, Any], entity: str) -> Any:
    """The view for runs of this configuration, as ``config.yaml`` holds it."""
    tasks, metrics = config["sequence"]["tasks"], config["evaluation"]["metrics"]
    sections = [
        _section(
            "Scores", [_line(f"{metric} of each task", TASKS, [f"scores/{metric}/{t}" for t in tasks]) for metric in metrics]
        ),
        _section("Score matrices", [panels.MediaBrowser(media_keys=[f"pictures/heatmap/{metric}" for metric in metrics])]),
        *(
            _section(stage, [_line(name, STEP, [f"train/{stage}/{name}"]) for name in STAGE_FIGURES[stage]])
            for stage in STAGE_FIGURES
        ),
        _section(
            "Memory",
            [
                _line(f"{name}, mean over factors", STEP, [f"consolidation/{stage}/{name}" for stage in STAGE_FIGURES])
                for name in ("kept_rank", "kept_energy", "history_share")
            ],
        ),
        *(_task(task, metrics) for task in tasks),
    ]
    return workspaces.Workspace(
        entity=entity,
        project=config["tracking"]["project"],
        name=f"LifeAlign: {config['sequence']['name']}",
        sections=sections,
        auto_generate_panels=True,
    )


def _task(task: str, metrics: Sequence[str]) -> Any:
    """What was trained on a task, and how its scores have moved since."""
    trained = [
        _line(f"{stage}: {name}", STEP, [f"task/{task}/{stage}/{name}"])
        for stage, name in (("sft", "loss"), ("preference", "loss"), ("preference", "accuracy"), ("preference", "focal_weight"))
    ]
    return _section(f"Task {task}", trained + [_line(metric, STEP, [f"evaluation/{task}/{metric}"]) for metric in metrics])


def _line(title: str, axis: str, series: Sequence[str]) -> Any:
    return panels.LinePlot(title=title, x=axis, y=list(series))


def _section(name: str, shown: list[Any]) -> Any:
    return workspaces.Section(name=name, panels=shown, is_open=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make LifeAlign's panels in a wandb project.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--entity", required=True, help="the wandb user or team that the project belongs to")
    given = parser.parse_args()
    print(workspace(yaml.safe_load((given.run / "config.yaml").read_text(encoding="utf-8")), given.entity).save().url)
