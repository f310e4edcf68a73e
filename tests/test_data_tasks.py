"""From folders and options to token ids, with a tokenizer small enough to work its ids out by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lifealign.data.options import Columns, DataOptions, HubSource, SequenceOptions, TaskSource
from lifealign.data.tasks import Task, load_tasks, seen_prompts
from lifealign.data.tokenize import Pair, PairTokenizer, apply_template, end_of_turn
from lifealign.errors import UserError, check_name

WORDS = [
    "[UNK]",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "system",
    "user",
    "assistant",
    "the",
    "sky",
    "is",
    "blue",
    "black",
    "very",
    ".",
    "a",
    "b",
]
ID = {word: number for number, word in enumerate(WORDS)}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }} . {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant . {% endif %}"
)


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; ChatML template."""
    words = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="[UNK]",
        eos_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.chat_template = CHATML
    return made


def write(root: Path, task: str, rows: list[dict[str, Any]], *splits: str) -> None:
    (root / task).mkdir(parents=True, exist_ok=True)
    for split in splits or ("train", "test"):
        (root / task / f"{split}.json").write_text(json.dumps(rows))


def sequence(*tasks: str, **sources: TaskSource) -> SequenceOptions:
    return SequenceOptions(name="s", tasks=list(tasks), sources=sources)


def load(root: Path, tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> Task:
    write(root, "sky", rows)
    (task,) = load_tasks(sequence("sky"), DataOptions(root=str(root), **options), tokenizer, root / "unused")
    return task


def row(prompt: str = "the sky is", chosen: str = "blue", rejected: str = "black") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_ids_of_a_pair(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The template's text, split at the end of the generation prompt, without the newline after the end of turn."""
    (pair,) = load(tmp_path, tokenizer, [row()]).train
    assert pair.id == "sky/train/0"
    assert pair.prompt == ids("<|im_start|> user the sky is <|im_end|> <|im_start|> assistant")
    assert pair.chosen == ids("blue <|im_end|>")
    assert pair.rejected == ids("black <|im_end|>")
    assert (pair.prompt_text, pair.chosen_text, pair.rejected_text) == ("the sky is", "blue", "black")


def test_trl_forms_give_identical_ids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    turn = {"role": "user", "content": "the sky is"}
    answers = [{"role": "assistant", "content": word} for word in ("blue .", "black .")]
    forms = [
        {"prompt": "the sky is", "chosen": " blue .", "rejected": " black ."},
        {"chosen": "the sky is blue .", "rejected": "the sky is black ."},
        {"prompt": [turn], "chosen": [answers[0]], "rejected": [answers[1]]},
        {"chosen": [turn, answers[0]], "rejected": [turn, answers[1]]},
    ]
    pairs = load(tmp_path, tokenizer, forms).train
    assert {(tuple(p.prompt), tuple(p.chosen), tuple(p.rejected)) for p in pairs} == {
        (tuple(pairs[0].prompt), tuple(ids("blue . <|im_end|>")), tuple(ids("black . <|im_end|>")))
    }


def test_the_longest_name_of_a_task() -> None:
    """The name of an entry of long-term memory has the task's in it, and must be one as well."""
    assert sequence("x" * 180).tasks == ["x" * 180]
    check_name("entry", f"9999_{'x' * 180}_preference")
    with pytest.raises(UserError, match="181 characters; at most 180"):
        sequence("x" * 181)


def test_several_turns_are_readable(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = load(tmp_path, tokenizer, [row("Human: a\nAssistant: b\nHuman: the sky")]).train
    assert pair.prompt == ids(
        "<|im_start|> user a <|im_end|> <|im_start|> assistant b <|im_end|> "
        "<|im_start|> user the sky <|im_end|> <|im_start|> assistant"
    )
    assert pair.prompt_text == "user: a\nassistant: b\nuser: the sky"


def test_what_spells_a_control_token_ends_no_turn(tmp_path: Path, tokenizer: Any) -> None:
    """Taken apart, ``<`` and ``|im_end|>`` are words that this tokenizer does not know."""
    (pair,) = load(tmp_path, tokenizer, [row(prompt="the <|im_end|> sky", chosen="blue <eos> very")]).train
    marked = [ID["<eos>"], ID["<|im_end|>"]]
    assert [token for token in pair.prompt if token in marked] == [ID["<|im_end|>"]]
    assert [token for token in pair.chosen if token in marked] == [ID["<|im_end|>"]]
    assert pair.chosen_text == "blue <eos> very"


def test_a_response_follows_its_prompt_in_the_eyes_of_a_tokenizer_that_begins_texts_with_a_space(tmp_path: Path) -> None:
    """As Llama 2's does, behind a template that opens the answer with plain text."""
    vocabulary = {
        piece: number for number, piece in enumerate(["[UNK]", "<eos>", "▁", "▁u", "▁a", "u", "a", ":", "b", "c", "\n"])
    }
    pieces = Tokenizer(models.BPE(vocabulary, [("▁", "u"), ("▁", "a")], unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]", eos_token="<eos>")
    made.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    assert made("a", add_special_tokens=False).input_ids == [vocabulary["▁a"]]
    (pair,) = load(tmp_path, made, [row(prompt="c", chosen="a", rejected="b")]).train
    assert pair.prompt == [vocabulary[piece] for piece in ("▁u", ":", "c", "a", ":")]
    assert pair.chosen == [vocabulary["a"], vocabulary["<eos>"]]
    assert pair.rejected == [vocabulary["b"], vocabulary["<eos>"]]


def test_the_end_of_a_turn_is_the_templates(tokenizer: Any) -> None:
    """Also where it opens every answer with the same tokens, as Qwen3's does, and where words are unknown."""
    assert end_of_turn(tokenizer) == ID["<|im_end|>"]
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ 'the sky is ' if m.role == 'assistant' }}{{ m.content }}")
    assert end_of_turn(tokenizer) == ID["<|im_end|>"]
    tokenizer.chat_template = PLAIN
    assert end_of_turn(tokenizer) == ID["<eos>"]


def test_truncation_keeps_the_end_of_the_prompt_and_the_end_token(tmp_path: Path, tokenizer: Any) -> None:
    """Prompt of 8 ids: the last 5. Responses of 5 and 2 ids, at most 3: two words and the end; untouched."""
    (pair,) = load(tmp_path, tokenizer, [row(chosen="very very blue .")], max_prompt_tokens=5, max_response_tokens=3).train
    assert pair.prompt == ids("sky is <|im_end|> <|im_start|> assistant")
    assert pair.chosen == ids("very very <|im_end|>")
    assert pair.rejected == ids("black <|im_end|>")
    assert pair.chosen_text == "very very blue ."


def test_pairs_that_truncation_spoils_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    """Row 0 is equal in its first two words; row 2's zero-width space strips to no token at all."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    rows = [row(chosen="very very blue", rejected="very very black"), row(), row(chosen="\u200b")]
    task = load(tmp_path, tokenizer, rows, max_response_tokens=3)
    assert [pair.id for pair in task.train] == ["sky/train/1"]
    assert task.dropped == {
        "chosen equals rejected": 0,
        "empty response": 0,  # of both files, which are the same here
        "response cut to nothing": 2,
        "equal after truncation": 2,
    }
    with pytest.raises(UserError, match=r"no pair is left after truncation \(equal after truncation: 1\)"):
        load(tmp_path, tokenizer, rows[:1], max_response_tokens=3)


def test_eos_is_added_where_the_template_ends_without_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = PLAIN
    (pair,) = load(tmp_path, tokenizer, [row()]).train
    assert (pair.prompt, pair.chosen) == (ids("user . the sky is assistant ."), ids("blue <eos>"))
    (pair,) = load(tmp_path, tokenizer, [row(chosen="unheard")]).train
    assert pair.chosen == ids("[UNK] <eos>")  # an unknown word is a special token, but no end


def test_limits_take_the_first_usable_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows 0 (equal) and 2 (equal once cut) are not usable; limits look past them, and later rows are still checked."""
    same = row(chosen="very very blue", rejected="very very black")
    rows = [row(rejected="blue"), row(), same, row(), row(), row()]
    task = load(tmp_path, tokenizer, rows, max_train=2, max_eval=3, max_response_tokens=3)
    assert [pair.id for pair in task.train] == ["sky/train/1", "sky/train/3"]
    assert [pair.id for pair in task.test] == ["sky/test/1", "sky/test/3", "sky/test/4"]
    with pytest.raises(UserError, match=r"train.json, row 7: column 'chosen' is missing"):
        load(tmp_path, tokenizer, [*rows, {"prompt": "a", "rejected": "b"}], max_train=2)


def test_hash_follows_the_rows_in_use(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def hash_of(rows: list[dict[str, Any]], **options: Any) -> str:
        return load(tmp_path, tokenizer, rows, **options).data_hash

    rows = [row(), row(chosen="very blue")]
    assert hash_of(rows) == hash_of([{**rows[0], "note": 1}, rows[1]])
    assert len({hash_of(rows), hash_of(rows[::-1]), hash_of(rows[:1]), hash_of(rows, max_eval=1)}) == 4
    assert hash_of(rows, max_train=1, max_eval=1) == hash_of(rows[:1])


def test_tasks_come_in_the_order_of_the_sequence_with_their_domains(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path, "x", [row()])
    write(tmp_path, "y", [{"q": "a", "good": "a", "bad": "b"}], "train", "dev")
    options = sequence("y", "x", y=TaskSource(domain="letters", columns=Columns(prompt="q", chosen="good", rejected="bad")))
    for given in (options, OmegaConf.structured(options)):
        tasks = load_tasks(given, DataOptions(), tokenizer, bundled_root=tmp_path)
        assert [(t.name, t.domain, t.test[0].id) for t in tasks] == [
            ("y", "letters", "y/dev/0"),
            ("x", "x", "x/test/0"),
        ]


def test_rows_from_the_hub_use_its_columns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path, "set", [{"q": "the sky", "good": ["", "blue"], "bad": ["black", "a"]}])
    hub = HubSource(path=str(tmp_path / "set"), columns=Columns("q", "good", "bad", join_rejected=" . "))
    options = OmegaConf.structured(sequence("sky", sky=TaskSource(hub=hub)))
    (task,) = load_tasks(options, DataOptions(hub=True), tokenizer, tmp_path)
    assert (task.train[0].chosen_text, task.test[0].rejected_text) == ("blue", "black . a")


def test_no_prompt_that_is_held_out_of_a_split_stays_in_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 rows of 8 prompts 4 are held out; with them go the other rows of their prompts, five rows each."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    words = [word for word in WORDS if word.isalpha()][:8]
    write(tmp_path, "set", [row(prompt=words[n % 8]) for n in range(40)], "train")
    hub = HubSource(path=str(tmp_path / "set"), eval_split=None)
    (task,) = load_tasks(sequence("sky", sky=TaskSource(hub=hub)), DataOptions(hub=True), tokenizer, tmp_path)
    held = {pair.prompt_text for pair in task.test}
    assert len(task.test) == 4 and len(task.train) == 40 - 5 * len(held)
    assert task.dropped["prompt is held out"] == 36 - len(task.train)
    assert seen_prompts([task]) == [0]
    hub.eval_share = 0.9
    with pytest.raises(UserError, match="every prompt is held out, so nothing is left to train on"):
        load_tasks(sequence("sky", sky=TaskSource(hub=hub)), DataOptions(hub=True), tokenizer, tmp_path)


def test_held_out_pairs_whose_prompt_is_trained_on_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path, "sky", [row(), row(prompt="is blue the sky")], "train")
    write(tmp_path, "sky", [row(chosen="very blue"), row(prompt="very black"), row()], "test")
    write(tmp_path, "sea", [row(prompt="very black")], "train")
    write(tmp_path, "sea", [row(prompt="very blue")], "test")
    sky, sea = load_tasks(sequence("sky", "sea"), DataOptions(root=str(tmp_path)), tokenizer, tmp_path / "unused")
    assert (len(sky.train), len(sky.test)) == (2, 3)
    assert seen_prompts([sky]) == [2]
    assert seen_prompts([sky, sea]) == [3, 0], "of whatever task: one model is trained on them all"


@pytest.mark.parametrize(
    "tasks, options, message",
    [
        ([], {}, "sequence.tasks is empty"),
        (["sky", "sky"], {}, "sequence.tasks names 'sky' twice; to meet it again, name 'sky_again' and say"),
        (["skye"], {}, "sequence.tasks: unknown task 'skye'; did you mean 'sky'?"),
        (["sky"], {"hub": True, "root": None}, "sequence.sources.sky.hub names no data set"),
        (["sky"], {"hub": True}, "exclude each other"),
        (["sky"], {"max_response_tokens": 1}, "data.max_response_tokens=1 must be at least 2"),
        (["sea"], {}, "for task 'sea'"),
        (
            ["one_sided"],
            {},
            "sequence.sources.one_sided: columns.responses (two columns) and columns.preferred go together",
        ),
    ],
)
def test_mistakes_in_options_are_one_line(
    tmp_path: Path, tokenizer: Any, tasks: list[str], options: dict[str, Any], message: str
) -> None:
    write(tmp_path, "sky", [row()])
    write(tmp_path, "one_sided", [row()])
    given = sequence(*tasks, sky=TaskSource(), sea=TaskSource(), one_sided=TaskSource(columns=Columns(responses=["a", "b"])))
    with pytest.raises(UserError) as caught:
        load_tasks(given, DataOptions(**{"root": str(tmp_path), **options}), tokenizer, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# A task that is met again


def numbered(count: int) -> list[dict[str, Any]]:
    return [row(prompt=f"the sky {n}") for n in range(count)]


def numbers(pairs: list[Pair]) -> list[int]:
    return [int(pair.id.rpartition("/")[2]) for pair in pairs]


def test_parts_of_one_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Row 1 of 6 is not usable. The halves of the other five are the first round(2.5) = 2 and the last 3; thirds 2, 1, 2.

    The columns are those of the task whose rows they are, the ids are their own, and the held-out rows are whole in both.
    """
    rows = [{"q": r["prompt"], "chosen": r["chosen"], "rejected": r["rejected"]} for r in numbered(6)]
    rows[1]["rejected"] = rows[1]["chosen"]
    write(tmp_path, "sky", rows)
    columns = Columns(prompt="q")
    for parts, expected in (
        ([[0.0, 0.5], [0.5, 1.0]], [[0, 2], [3, 4, 5]]),
        ([[0.0, 1 / 3], [1 / 3, 2 / 3], [2 / 3, 1.0]], [[0, 2], [3], [4, 5]]),
    ):
        sources = {f"part{n}": TaskSource(of="sky", part=part) for n, part in enumerate(parts)}
        options = sequence(*sources, sky=TaskSource(columns=columns), **sources)
        for given in (options, OmegaConf.structured(options)):
            tasks = load_tasks(given, DataOptions(root=str(tmp_path)), tokenizer, tmp_path)
            assert [numbers(task.train) for task in tasks] == expected
            assert [numbers(task.test) for task in tasks] == [[0, 2, 3, 4, 5]] * len(parts)
            assert [task.train[0].id.split("/")[0] for task in tasks] == list(sources)
            assert len({task.data_hash for task in tasks}) == len(parts)


def test_max_train_counts_from_the_beginning_of_the_part(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path, "sky", numbered(6))
    options = sequence("again", again=TaskSource(of="sky", part=[0.5, 1.0]))
    (task,) = load_tasks(options, DataOptions(root=str(tmp_path), max_train=2), tokenizer, tmp_path)
    assert numbers(task.train) == [3, 4]


@pytest.mark.parametrize(
    "source, message",
    [
        ({"part": [0.5]}, "sequence.sources.b.part=[0.5]: must be [from, to] with 0 <= from < to <= 1"),
        ({"part": [0.5, 0.5]}, "sequence.sources.b.part=[0.5, 0.5]: must be"),
        ({"part": [0.0, 1.1]}, "sequence.sources.b.part=[0.0, 1.1]: must be"),
        ({"part": [0.0, float("nan")]}, "sequence.sources.b.part=[0.0, nan]: must be"),
        ({"part": [0.0, 0.01]}, "sequence.sources.b.part=[0.0, 0.01]: none of the 4 usable rows of"),
        ({"of": "skyy"}, "sequence.sources.b.of=skyy: no other task; did you mean 'sky'?"),
        ({"of": "b"}, "sequence.sources.b.of=b: no other task"),
        ({"of": "again"}, "sequence.sources.b.of=again: that one has no rows of its own; say of=sky"),
        ({"of": "sky", "columns": Columns(prompt="q")}, "sequence.sources.b: columns and hub are those of 'sky'"),
        ({"of": "sky", "hub": HubSource("x")}, "sequence.sources.b: columns and hub are those of 'sky'"),
    ],
)
def test_mistakes_in_parts_are_one_line(tmp_path: Path, tokenizer: Any, source: dict[str, Any], message: str) -> None:
    write(tmp_path, "sky", numbered(4))
    write(tmp_path, "b", numbered(4))
    options = sequence("b", b=TaskSource(**source), again=TaskSource(of="sky"))
    for given in (options, OmegaConf.structured(options)):
        with pytest.raises(UserError) as caught:
            load_tasks(given, DataOptions(root=str(tmp_path)), tokenizer, tmp_path)
        assert message in str(caught.value) and "\n" not in str(caught.value)


# The tuning slice


def tuned(root: Path, tokenizer: Any, options: SequenceOptions, **data: Any) -> dict[str, tuple[list[int], list[str]]]:
    """Of each task: numbers of the training rows, and ids of the held-out ones."""
    tasks = load_tasks(options, DataOptions(root=str(root), **data), tokenizer, root)
    return {task.name: (numbers(task.train), [pair.id for pair in task.test]) for task in tasks}


def test_the_slice_stands_behind_the_training_pairs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows 0 to 7, of which 1 (equal) and 4 (equal once cut to two words and the end) are not usable: 0 2 3 5 6 7.

    Two set aside of all: 6 and 7. With max_train = 3, of the first five the last two: 5 and 6, and 0 2 3 are trained on, as
    without a slice. With max_train = 5 all six are looked at, so 6 and 7 go and four pairs stay.
    """
    rows = numbered(8)
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[4].update(chosen="very very blue", rejected="very very black")
    write(tmp_path, "sky", rows, "train")
    write(tmp_path, "sky", numbered(2), "test")
    held_out = ["sky/test/0", "sky/test/1"]
    for max_train, trained, aside in ((None, [0, 2, 3, 5], [6, 7]), (3, [0, 2, 3], [5, 6]), (5, [0, 2, 3, 5], [6, 7])):
        options: dict[str, Any] = {"max_train": max_train, "max_response_tokens": 3, "tuning_pairs": 2}
        assert tuned(tmp_path, tokenizer, sequence("sky"), **options) == {"sky": (trained, held_out)}
        ids = [f"sky/train/{number}" for number in aside]
        assert tuned(tmp_path, tokenizer, sequence("sky"), **options, tuning=True) == {"sky": (trained, ids)}
    with pytest.raises(UserError, match=r"data\.tuning_pairs=6: task 'sky' has 6 usable training pairs, which leaves none"):
        tuned(tmp_path, tokenizer, sequence("sky"), max_response_tokens=3, tuning_pairs=6)


def test_only_the_named_task_gives_pairs_away(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The first task where none is named. The others are as without a slice, held-out pairs included."""
    for task in ("a", "b"):
        write(tmp_path, task, numbered(3))
    everything = {task: ([0, 1, 2], [f"{task}/test/{n}" for n in range(3)]) for task in ("a", "b")}
    both = sequence("a", "b")
    assert tuned(tmp_path, tokenizer, both) == everything
    first = tuned(tmp_path, tokenizer, both, tuning_pairs=1, tuning=True)
    assert first == {**everything, "a": ([0, 1], ["a/train/2"])}
    second = tuned(tmp_path, tokenizer, both, tuning_pairs=1, tuning=True, tuning_task="b")
    assert second == {**everything, "b": ([0, 1], ["b/train/2"])}
    with pytest.raises(UserError, match=r"data\.tuning_task=sky: no task of this sequence; known: a, b$"):
        tuned(tmp_path, tokenizer, both, tuning_pairs=1, tuning_task="sky")


def test_a_slice_is_trained_on_under_no_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows 3 and 4 of 5 are set aside from `sky`, and from `again`, which reads the same file; `sea` keeps its own 3 and 4."""
    write(tmp_path, "sky", numbered(5))
    write(tmp_path, "sea", numbered(5))
    options = sequence("again", "sky", "sea", again=TaskSource(of="sky", part=[0.5, 1.0]))
    found = tuned(tmp_path, tokenizer, options, tuning_pairs=2, tuning_task="sky")
    assert {task: trained for task, (trained, _) in found.items()} == {"again": [2], "sky": [0, 1, 2], "sea": [0, 1, 2, 3, 4]}
    with pytest.raises(UserError, match=r"data\.tuning_pairs=3: no training row of task 'again' is left; give fewer"):
        tuned(tmp_path, tokenizer, options, tuning_pairs=3, tuning_task="sky")


def test_hash_follows_the_slice(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Three rows, the last set aside: the hash of the first two, whatever the third says, unless it is what is scored on."""
    rows = numbered(3)
    other = [*rows[:2], row(prompt="a")]

    def hash_of(given: list[dict[str, Any]], **options: Any) -> str:
        write(tmp_path, "sky", given, "train")
        (task,) = load_tasks(sequence("sky"), DataOptions(root=str(tmp_path), **options), tokenizer, tmp_path)
        return task.data_hash

    write(tmp_path, "sky", rows, "test")
    assert hash_of(rows, tuning_pairs=1) == hash_of(other, tuning_pairs=1) == hash_of(rows[:2])
    scored = {"tuning_pairs": 1, "tuning": True}
    assert len({hash_of(rows, **scored), hash_of(other, **scored), hash_of(rows, tuning_pairs=1), hash_of(rows)}) == 4


def test_a_slice_to_score_on_needs_pairs() -> None:
    with pytest.raises(UserError, match=r"^data\.tuning=true, but data\.tuning_pairs=0 sets no pairs aside"):
        DataOptions(tuning=True)


def test_relative_roots_start_at_the_current_directory(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    write(tmp_path / "rows", "sky", [row()])
    monkeypatch.chdir(tmp_path)
    assert load_tasks(sequence("sky"), DataOptions(root="rows"), tokenizer, tmp_path)[0].train


def test_template_that_refuses_a_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system\nrole!') }}{% endif %}" + CHATML
    )
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(UserError, match=r"^row sky/train/1: .* refuses its turns \(system, user\): No system role!;"):
        load(tmp_path, tokenizer, [row(), {**row(), "prompt": turns}])


def test_tokenizers_that_cannot_do(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}now:{% endif %}"
    with pytest.raises(UserError, match=r"does not begin a finished conversation with its own generation prompt"):
        load(tmp_path, tokenizer, [row()])
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template; use an instruct model, or set tokenizer.chat_template"):
        PairTokenizer(tokenizer, 8, 8)
    tokenizer.chat_template, tokenizer.eos_token = CHATML, None
    with pytest.raises(UserError, match=r"has no eos token"):
        PairTokenizer(tokenizer, 8, 8)


@pytest.mark.parametrize(
    "option", [{"max_train": 0}, {"max_eval": -1}, {"max_response_tokens": 0}, {"max_empty": 1.5}, {"tuning_pairs": -1}]
)
def test_an_option_out_of_range_is_refused_by_its_key(option: dict[str, float]) -> None:
    (key,) = option
    with pytest.raises(UserError, match=rf"^data\.{key}="):
        DataOptions(**option)


def test_a_template_that_writes_the_day_writes_the_same_every_day(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The library would tell it today: rows would change at midnight, under a run and between those of a study."""
    write(tmp_path, "sky", [row()], "train")
    write(tmp_path, "sky", [row(prompt="is blue the sky")], "test")
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %B %Y') }} " + str(tokenizer.chat_template)
    (task,) = load_tasks(sequence("sky"), DataOptions(root=str(tmp_path)), dated, tmp_path / "unused")
    text = apply_template(dated, [{"role": "user", "content": "sky"}], add_generation_prompt=True)
    assert text == "26 July 2024 " + apply_template(tokenizer, [{"role": "user", "content": "sky"}], add_generation_prompt=True)
    assert len(task.train[0].prompt) > len(_plain(tmp_path, tokenizer).train[0].prompt)


def _plain(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Task:
    return load_tasks(sequence("sky"), DataOptions(root=str(folder)), tokenizer, folder / "unused")[0]
