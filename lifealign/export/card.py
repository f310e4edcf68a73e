"""The model card of an export: what it is made of, what it scored, and how it is loaded. All from the run's own files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from lifealign.config import Config, that_matter
from lifealign.evaluation.scores import ScoreBook, closing_rows, format_score, metric_info, progress_note
from lifealign.export.licences import data_source
from lifealign.export.markdown import escaped, fenced, table
from lifealign.export.reload import Reload
from lifealign.models.options import ModelOptions, Quantization
from lifealign.run import versions
from lifealign.runtime.files import read_json

BUNDLED = "bundled"


@dataclass(frozen=True)
class Subject:
    """What the card is about."""

    run: Path
    left: Path  # what the task left behind which the adapter was taken, RUN_DIR/tasks/NN_NAME
    title: str
    merged: bool
    of_task: str | None  # the task that was asked for by name; None: the run's newest adapter

    @property
    def after(self) -> str:
        """The task that was trained last."""
        return self.left.name.split("_", 1)[1]


def model_card(subject: Subject, config: Config, settings: Mapping[str, Any], reload: Reload) -> str:
    """The whole ``README.md``; ``settings`` is the configuration as plain values, secrets masked."""
    parts = [_front_matter(subject, config), f"# {escaped(subject.title)}", *_about(subject, config)]
    parts += ["## Tasks of the sequence, in its order", _tasks(config), "## Scores", *_scores(subject, config)]
    parts += ["## Loading it", _loading(subject, config.model), f"Before this folder was written it was {reload.line()}."]
    parts += ["## Settings", fenced(yaml.safe_dump(_settings(settings), sort_keys=False, allow_unicode=True), "yaml")]
    parts += ["## Versions at export", table(["Package", "Version"], versions().items())]
    return "\n\n".join(parts) + "\n"


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the run computed with: without where it was kept and watched, and without tasks that it did not meet."""
    sequence = settings["sequence"]
    met = {*sequence["tasks"], *(sequence["sources"].get(task, {}).get("of") for task in sequence["tasks"])}
    sources = {task: source for task, source in sequence["sources"].items() if task in met}
    return {**that_matter(settings), "sequence": {**sequence, "sources": sources}}


def _front_matter(subject: Subject, config: Config) -> str:
    """What the hub reads. A base is named there by a hub name only; a folder of this machine is none."""
    path = config.model.path
    on_hub = path != BUNDLED and not Path(path).expanduser().is_dir()
    data = ModelCardData(
        base_model=path if on_hub else None,
        library_name="transformers" if subject.merged else "peft",
        pipeline_tag="text-generation",
        tags=["lifealign", "preference-alignment", *([] if subject.merged else ["lora"])],
    )
    return f"---\n{data.to_yaml()}\n---"


def _about(subject: Subject, config: Config) -> Iterator[str]:
    lora = config.strategy.lora(config.model.lora, len(config.sequence.tasks))
    what = "Merged weights" if subject.merged else "A LoRA adapter in PEFT's layout"
    how, trained = _training(subject, config)
    yield (
        f"{what}, made by [LifeAlign](https://arxiv.org/abs/2509.17183): {how}. "
        "Its use is bound by the licences of the base and of the data."
    )
    rows = [
        ("Base", _base_name(config.model)),
        ("Dtype of the base", config.model.dtype.value),
        ("Adapter", f"LoRA, r={lora.r}, alpha={lora.alpha}, on {', '.join(lora.target_modules)}"),
        ("Trained", f"{trained}; the sequence {config.sequence.name} has {len(config.sequence.tasks)} tasks"),
        ("Objective", _component(config.objective)),
        ("Strategy", _component(config.strategy)),
        ("Seed", config.seed),
    ]
    yield table(["What", "Value"], rows)


def _training(subject: Subject, config: Config) -> tuple[str, str]:
    """What the model is, and what it was trained on: not every strategy goes with one model from task to task."""
    if config.strategy.name == "stl":
        return "a language model aligned to one preference task alone", f"on {subject.after} alone"
    if config.strategy.name == "mtl":
        return "one language model aligned to several preference tasks at once", "on all tasks at once"
    what = "one language model aligned to a sequence of preference tasks, one after another"
    return what, f"through {subject.after}"


def _base_name(model: ModelOptions) -> str:
    return "the demonstration model that ships with lifealign" if model.path == BUNDLED else model.path


def _component(chosen: Any) -> str:
    """Name and options of an objective or a strategy, as the configuration has them."""
    values = {field.name: getattr(chosen, field.name) for field in fields(chosen) if field.name != "name"}
    options = ", ".join(f"{key}={getattr(value, 'value', value)}" for key, value in values.items())
    return f"{chosen.name} ({options})" if options else chosen.name


def _tasks(config: Config) -> str:
    rows = []
    for number, name in enumerate(config.sequence.tasks, 1):
        source = config.sequence.sources.get(name)
        rows.append((number, name, (source.domain if source else "") or name, *data_source(name, config)))
    return table(["#", "Task", "Domain", "Rows", "Licence"], rows)


def _scores(subject: Subject, config: Config) -> Iterator[str]:
    """What this adapter scored on each task; of the newest, what the whole run did as well."""
    scores: dict[str, dict[str, float | None]] = read_json(subject.left / "scores.json")["scores"]
    metrics = list(next(iter(scores.values()), {}))
    book = ScoreBook.from_json(read_json(subject.run / "scores.json"))
    seen = max((len(book.matrix(name)) for name in book.metrics), default=0)
    if subject.of_task is None and scores.keys() >= set(book.tasks[:seen]):  # where each task has a model, figures are of many
        yield f"Over {progress_note(book)}; ↓: lower is better, and a positive BWT is then forgetting."
        yield table(["Metric", "Last", "BWT", "AP"], closing_rows(book))
    yield f"On held-out rows of each task, after training {escaped(_training(subject, config)[1])}:"
    rows = [[task, *(format_score(values.get(metric)) for metric in metrics)] for task, values in scores.items()]
    yield table(["Task", *(_label(metric) for metric in metrics)], rows)


def _label(metric: str) -> str:
    info = metric_info(metric)
    return info.label if info.higher_is_better else f"{info.label} ↓"


def _loading(subject: Subject, model: ModelOptions) -> str:
    """Code that loads the folder; paths are literals of Python, whatever is in them."""
    path = Path(model.path).expanduser()
    base = repr(str(path) if path.is_dir() else model.path)
    trust = ", trust_remote_code=True" if model.trust_remote_code else ""
    dtype, quantised = repr(model.dtype.value), model.quantization is not Quantization.none
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f"folder = {subject.title!r}  # where this folder lies"]
    if subject.merged:
        own = repr("auto") if quantised else dtype
        lines += [f"model = AutoModelForCausalLM.from_pretrained(folder, dtype={own}{trust})"]
    else:
        lines.insert(0, "from peft import PeftModel")
        if model.path == BUNDLED:
            lines.insert(0, "from lifealign.assets import TINY_MODEL")
            base = "TINY_MODEL"
        how = f"dtype={dtype}"
        if quantised:
            lines[1] = "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig"
            settings = f"load_in_4bit=True, bnb_4bit_quant_type={model.quantization.value!r}, bnb_4bit_use_double_quant=True"
            lines += [f"in_4_bits = BitsAndBytesConfig({settings}, bnb_4bit_compute_dtype={dtype})"]
            how += ", quantization_config=in_4_bits"
        lines += [f"base = AutoModelForCausalLM.from_pretrained({base}, {how}{trust})"]
        lines += ["model = PeftModel.from_pretrained(base, folder)"]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})"]
    return fenced("\n".join(lines), "python")
