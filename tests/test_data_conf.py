"""The sequences, the data presets and those of the paper compose against the schema."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from support import compose_config

from lifealign.config import build
from lifealign.data.options import Columns, DataOptions, HubSource, SequenceOptions, TaskSource
from lifealign.data.rows import Rows
from lifealign.data.rules import read_preferences
from lifealign.strategies.gem import Gradients

CONF = Path(__file__).parents[1] / "conf"
TASKS = ["instruct", "hc3", "hh_harmless", "hh_helpful", "safe_rlhf", "truthfulqa"]


@dataclass
class _Root:
    sequence: SequenceOptions = MISSING
    data: DataOptions = field(default_factory=DataOptions)


def composed(*overrides: str) -> _Root:
    ConfigStore.instance().store(name="test_data_root", node=_Root)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("test_data_root", overrides=list(overrides))
    return OmegaConf.to_object(config)  # type: ignore[return-value]  # raises where a mandatory value is missing


@pytest.mark.parametrize(
    "name, order",
    [
        ("six_domains", [1, 2, 3, 4, 5, 6]),
        ("six_domains_reversed", [6, 5, 4, 3, 2, 1]),
        ("six_domains_3_1_6_4_2_5", [3, 1, 6, 4, 2, 5]),
    ],
)
def test_sequences(name: str, order: list[int]) -> None:
    sequence = composed(f"+sequence={name}").sequence
    assert (sequence.name, sequence.tasks) == (name, [TASKS[n - 1] for n in order])
    assert sorted(sequence.sources) == sorted(TASKS)
    assert all(source.hub and source.hub.path and source.domain for source in sequence.sources.values())


def test_recurring_meets_three_domains_twice_with_other_rows() -> None:
    sequence = composed("+sequence=recurring").sequence
    first = ["instruct", "hc3", "hh_harmless"]
    assert (sequence.name, sequence.tasks) == ("recurring", [*first, *(f"{task}_again" for task in first)])
    for task in first:
        again = sequence.sources[f"{task}_again"]
        assert (sequence.sources[task].of, sequence.sources[task].part) == (None, [0.0, 0.5])
        assert (again.of, again.part, again.hub) == (task, [0.5, 1.0], None)


def test_cross_domain_has_one_task_of_a_source() -> None:
    sequence = composed("+sequence=cross_domain").sequence
    assert (sequence.name, sequence.tasks) == ("cross_domain", ["instruct", "truthfulqa", "hc3", "hh_harmless"])
    hubs = [sequence.sources[task].hub for task in sequence.tasks]
    assert len({hub.path for hub in hubs if hub}) == 4


def test_a_part_of_a_sequence() -> None:
    assert composed("+sequence=six_domains", "sequence.tasks=[hc3]").sequence.tasks == ["hc3"]


def test_data_presets() -> None:
    assert composed("+sequence=six_domains", "+data=bundled").data == DataOptions()
    assert composed("+sequence=six_domains", "+data=hub").data == DataOptions(hub=True)


def test_example_of_the_docs() -> None:
    text = (CONF.parent / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    sequence = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SequenceOptions), OmegaConf.create(example)))
    assert sequence == SequenceOptions(
        name="my_tasks",
        tasks=["support", "jokes"],
        sources={
            "support": TaskSource("polite support", Columns(prompt="ticket", chosen="good_reply", rejected="bad_reply")),
            "jokes": TaskSource("humour", hub=HubSource("me/jokes", eval_split=None)),
        },
    )


@pytest.mark.parametrize("preset", ["paper_qwen2_5_7b", "paper_mistral_7b", "paper_llama3_1_8b"])
@pytest.mark.parametrize(
    "words", [[], ["strategy=seqft", "objective=dpo"], ["strategy=er", "objective=dpo"], ["objective=dpo"], ["strategy=er"]]
)
def test_baselines_and_ablations_go_with_the_papers_presets(preset: str, words: list[str]) -> None:
    """Those of the README; what they share with LifeAlign has the paper's values."""
    config = build(compose_config("+sequence=six_domains", f"experiment={preset}", *words))
    assert (config.sft.lr, config.preference.lr, config.sft.batch_size) == (1e-4, 5e-6, 64)
    assert config.objective.beta == 0.1
    if "objective=dpo" not in words:
        assert config.objective.gamma == 2
    if "strategy=seqft" not in words:
        assert (config.strategy.buffer_size, config.strategy.buffer_fraction) == (3000, 0.2)
    if not any(word.startswith("strategy") for word in words):
        assert (config.strategy.denoise_energy, config.strategy.projection_scale) == (0.9, 0.5)


@pytest.mark.parametrize(
    ("preset", "path"),
    [
        ("paper_qwen2_5_7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("paper_mistral_7b", "mistralai/Mistral-7B-Instruct-v0.3"),
        ("paper_llama3_1_8b", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_the_papers_presets_have_its_models_and_epochs(preset: str, path: str) -> None:
    config = build(compose_config("+sequence=six_domains", f"experiment={preset}"))
    assert (config.model.path, config.sft.epochs, config.preference.epochs) == (path, 3, 3)


@pytest.mark.parametrize(
    ("preset", "values"),
    [
        ("gem_released", {"margin": 0.1, "gradients": Gradients.stored}),
        ("l2p_released", {"top_k": 3}),
        ("olora_released", {"orthogonality": 0.1, "l2": 0.01}),
    ],
)
def test_released_presets_are_as_their_page_says(preset: str, values: dict[str, Any]) -> None:
    strategy = build(compose_config("+sequence=six_domains", f"strategy={preset}")).strategy
    assert {key: getattr(strategy, key) for key in values} == values


QUESTION = {"role": "user", "content": "q"}
GOOD, BAD = ([QUESTION, {"role": "assistant", "content": text}] for text in ("good", "bad"))
HH = {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
PUBLIC = {
    "instruct": ({"source": "x", "chosen": GOOD, "rejected": BAD}, "bad"),
    "hc3": ({"id": "0", "question": "q", "human_answers": ["", "good"], "chatgpt_answers": ["bad", "x"]}, "bad"),
    "hh_harmless": (HH, "bad"),
    "hh_helpful": (HH, "bad"),
    "safe_rlhf": (
        {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 0, "safer_response_id": 1},
        "bad",
    ),
    "truthfulqa": (
        {"question": "q", "best_answer": "good", "correct_answers": ["fine"], "incorrect_answers": ["bad", "worse"]},
        "bad; worse",
    ),
}
"""A row as each of the public data sets has them, in which one answer is better, and the rejected text."""


@pytest.mark.parametrize("task", TASKS)
def test_of_public_rows_the_better_answer_is_the_chosen_one(task: str) -> None:
    source, (row, rejected) = composed("+sequence=six_domains").sequence.sources[task], PUBLIC[task]
    assert source.hub is not None
    columns = source.hub.columns or source.columns
    (found,), _ = read_preferences(Rows(task, "train", [row], range(1)), task, columns, max_empty=1.0)
    assert ([*found.prompt], found.chosen, found.rejected) == ([QUESTION], "good", rejected)
