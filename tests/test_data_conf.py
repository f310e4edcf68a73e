"""The sequences, the data presets and those of the paper compose against the schema."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from support import compose_config

from lifealign.config import build
from lifealign.data.options import Columns, DataOptions, HubSource, SequenceOptions, TaskSource

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
