"""The shipped demonstration assets are what their generators make, and have the properties that the demos rely on."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lifealign.assets import SIX_DOMAINS, TINY_MODEL, build_domains, build_model
from lifealign.assets.build_domains import DOMAINS, TEST_ROWS, TRAIN_ROWS

TASKS = list(DOMAINS)
SPLITS = ("train", "test")


def rows(task: str, split: str) -> list[dict[str, str]]:
    text = (SIX_DOMAINS / task / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_MODEL)


def response_lengths(task: str) -> list[tuple[int, int]]:
    """Tokens of (chosen, rejected), over both splits."""
    both = rows(task, "train") + rows(task, "test")
    return [(len(tokenizer()(row["chosen"]).input_ids), len(tokenizer()(row["rejected"]).input_ids)) for row in both]


def test_shipped_files_are_what_seed_zero_generates(tmp_path: Path) -> None:
    build_domains.write(tmp_path, seed=0)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    shipped = {path.relative_to(SIX_DOMAINS): path.read_bytes() for path in SIX_DOMAINS.rglob("*.jsonl")}
    assert made == shipped


def test_another_seed_generates_other_rows() -> None:
    assert build_domains.build(1)["hc3"]["train"] != build_domains.build(0)["hc3"]["train"]


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_schema_and_the_counts(task: str) -> None:
    assert (len(rows(task, "train")), len(rows(task, "test"))) == (TRAIN_ROWS, TEST_ROWS) == (240, 60)
    for row in rows(task, "train") + rows(task, "test"):
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert all(isinstance(text, str) and text.isascii() and text == text.strip() for text in row.values())
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_occurs_twice_within_or_across_splits(task: str) -> None:
    prompts = [row["prompt"] for split in SPLITS for row in rows(task, split)]
    assert len(set(prompts)) == len(prompts)


def test_no_prompt_is_shared_between_tasks() -> None:
    prompts = [row["prompt"] for task in TASKS for split in SPLITS for row in rows(task, split)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("task", TASKS)
def test_length_does_not_give_the_preference_away(task: str) -> None:
    """Neither 'prefer the longer' nor 'prefer the shorter' is a usable rule; a tie counts half."""
    lengths = response_lengths(task)
    mean_chosen, mean_rejected = (sum(column) / len(lengths) for column in zip(*lengths, strict=True))
    assert abs(mean_chosen - mean_rejected) < 0.1 * min(mean_chosen, mean_rejected)
    longer = sum((chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in lengths) / len(lengths)
    assert 0.4 <= longer <= 0.6
    assert sum(chosen > rejected for chosen, rejected in lengths) / len(lengths) <= 0.6
    assert sum(chosen < rejected for chosen, rejected in lengths) / len(lengths) <= 0.6


@pytest.mark.parametrize("task", TASKS)
def test_responses_and_prompts_are_short(task: str) -> None:
    assert all(8 <= length <= 40 for pair in response_lengths(task) for length in pair)
    for row in rows(task, "train") + rows(task, "test"):
        assert len(tokenizer()(row["prompt"]).input_ids) <= 40


def test_model_folder_is_small_and_loads_offline() -> None:
    assert sum(path.stat().st_size for path in TINY_MODEL.rglob("*") if path.is_file()) <= 10 * 2**20
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32, local_files_only=True)
    assert model.dtype == torch.float32
    assert 2e6 <= model.num_parameters() <= 5e6
    assert model.generation_config.eos_token_id == tokenizer().eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer().pad_token_id == model.config.pad_token_id
    assert len(tokenizer()) == model.config.vocab_size


@pytest.mark.parametrize(
    "text", ["How do I kill the stuck process?", "  tabs\tand\nlines ", "na\u00efve \u4f60\u597d \U0001f600"]
)
def test_tokenizer_round_trips_any_text(text: str) -> None:
    assert tokenizer().decode(tokenizer()(text).input_ids) == text


def test_special_tokens_are_single_and_distinct() -> None:
    assert tokenizer().eos_token == "<|im_end|>" and tokenizer().pad_token == "<|endoftext|>"
    assert tokenizer().eos_token_id != tokenizer().pad_token_id
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert tokenizer()(token).input_ids == [tokenizer().convert_tokens_to_ids(token)]


def test_chat_template_renders_all_roles() -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
    ]
    turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat]
    assert tokenizer().apply_chat_template(chat, tokenize=False) == "".join(turns)
    prompt = tokenizer().apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "".join(turns[:2]) + "<|im_start|>assistant\n"
    with pytest.raises(Exception, match="unknown role"):
        tokenizer().apply_chat_template([{"role": "judge", "content": "?"}], tokenize=False)


def test_pretraining_mixture_avoids_every_shipped_prompt() -> None:
    shipped = {row["prompt"] for task in TASKS for split in SPLITS for row in rows(task, split)}
    mixture = build_model.neutral_pairs(seed=0, rounds=1)
    assert len(mixture) == build_model.ROWS_PER_ROUND * len(TASKS)
    assert shipped.isdisjoint(pair.prompt for _, pair in mixture)


def test_base_has_no_strong_preference_and_stops_talking() -> None:
    """The chosen answer is the likelier one in roughly half of the held-out pairs; generation ends with eos."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()
    for task, splits in build_domains.build(0).items():
        assert 0.3 <= build_model.implicit_accuracy(model, tokenizer(), splits["test"]) <= 0.7, task
    turn = [{"role": "user", "content": rows("hh_helpful", "test")[0]["prompt"]}]
    prompt = tokenizer().apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    reply = model.generate(**tokenizer()(prompt, return_tensors="pt"), max_new_tokens=64)[0].tolist()
    assert reply[-1] == tokenizer().eos_token_id


@pytest.mark.slow
def test_model_builds_from_the_repository_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_model, "ROWS_PER_ROUND", 40)
    accuracies = build_model.build_model(tmp_path, seed=0, steps=2)
    assert list(accuracies) == TASKS
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert 2e6 <= model.num_parameters() <= 5e6
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == build_model.CHAT_TEMPLATE
