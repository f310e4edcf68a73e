"""Preferences become token ids, by the model's own chat template and within the length limits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2

from lifealign.data.schema import Preference
from lifealign.data.turns import Turn
from lifealign.errors import UserError

CUT = "response cut to nothing"
EQUAL_CUT = "equal after truncation"

TODAY = datetime(2024, 7, 26)
"""The day in every run, for templates that write it: that which Llama 3's falls back on."""

_DAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

_CHUNK = 256  # rows rendered before the tokenizer is called: it works on many texts at once


@dataclass(frozen=True)
class Pair:
    """A preference as the model reads it. ``prompt + chosen`` and ``prompt + rejected`` are the two sequences."""

    id: str
    prompt: list[int]
    chosen: list[int]  # ends with the end-of-turn or end-of-sequence token, as does rejected
    rejected: list[int]
    prompt_text: str  # readable, whole even where the ids were cut
    chosen_text: str
    rejected_text: str


def apply_template(tokenizer: Any, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
    """A conversation as the tokenizer's chat template writes it; the same on every day.

    The day is put in where the template asks for it, ``strftime_now`` with a format that is written out, as all known ones
    do: transformers takes no function from a caller.
    """
    template = _DAY.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template())
    return tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )


@dataclass(frozen=True)
class PairTokenizer:
    """Renders and tokenises preferences. Raises UserError for a tokenizer without chat template or eos token."""

    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    max_prompt_tokens: int
    max_response_tokens: int

    def __post_init__(self) -> None:
        name = getattr(self.tokenizer, "name_or_path", "") or "given"
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"model.path: the tokenizer of '{name}' has no chat template; "
                f"use an instruct model, or set tokenizer.chat_template and save it"
            )
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"model.path: the tokenizer of '{name}' has no eos token; "
                f"use an instruct model, or set tokenizer.eos_token and save it"
            )
        for key in ("max_prompt_tokens", "max_response_tokens"):
            least = 1 if key == "max_prompt_tokens" else 2  # a token to learn from, and the end
            if getattr(self, key) < least:
                raise UserError(f"data.{key}={getattr(self, key)} must be at least {least}")

    def pairs(self, preferences: Sequence[Preference], limit: int | None) -> tuple[list[Pair], Counter[str]]:
        """The first ``limit`` usable pairs, and how many of those looked at were dropped for which reason."""
        kept: list[Pair] = []
        dropped: Counter[str] = Counter({CUT: 0, EQUAL_CUT: 0})
        wanted = len(preferences) if limit is None else limit
        position = 0
        while position < len(preferences) and len(kept) < wanted:
            chunk = preferences[position : position + min(_CHUNK, wanted - len(kept))]
            position += len(chunk)
            for pair in self._tokenise(chunk):
                reason = _unusable(pair)
                if reason is None:
                    kept.append(pair)
                else:
                    dropped[reason] += 1
        return kept, dropped

    def _tokenise(self, preferences: Sequence[Preference]) -> list[Pair]:
        plain = plain_speller(self.tokenizer)
        texts = [self._render(preference, plain) for preference in preferences]
        ids = self._ids([prompt + rest for prompt, *responses in texts for rest in ("", *responses)])
        special = self._end_ids()
        pairs = []
        for row, preference in enumerate(preferences):
            prompt, *whole = ids[3 * row : 3 * row + 3]
            responses = [
                # A tokenizer that puts a space before every text must not see a response as a text of its own.
                sequence[len(prompt) :] if sequence[: len(prompt)] == prompt else self._ids([response])[0]
                for sequence, response in zip(whole, texts[row][1:], strict=True)
            ]
            pairs.append(
                Pair(
                    preference.id,
                    prompt[-self.max_prompt_tokens :],
                    self._cut(responses[0], special),
                    self._cut(responses[1], special),
                    readable(preference.prompt),
                    preference.chosen,
                    preference.rejected,
                )
            )
        return pairs

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _render(self, preference: Preference, plain: Callable[[str], str]) -> tuple[str, str, str]:
        """Prompt text and the two response texts, as the template writes them; texts of the row through ``plain`` first."""
        turns: list[Turn] = [{"role": turn["role"], "content": plain(turn["content"])} for turn in preference.prompt]
        prompt = self._template(turns, preference.id, add_generation_prompt=True)
        responses = []
        for answer in map(plain, (preference.chosen, preference.rejected)):
            whole = self._template([*turns, {"role": "assistant", "content": answer}], preference.id)
            if not whole.startswith(prompt):
                raise UserError(
                    f"model.path: the chat template of '{self.tokenizer.name_or_path}' does not begin a finished "
                    f"conversation with its own generation prompt (row {preference.id}), so responses cannot "
                    f"be told from prompts; use another template"
                )
            responses.append(whole[len(prompt) :].rstrip())  # many templates write a newline after the end token
        return prompt, responses[0], responses[1]

    def _template(self, turns: list[Turn], id: str, add_generation_prompt: bool = False) -> str:
        try:
            return apply_template(self.tokenizer, turns, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            reason = " ".join(str(error).split())
            raise UserError(
                f"row {id}: the chat template of '{self.tokenizer.name_or_path}' refuses its turns ({roles}): "
                f"{reason}; change the row or use another model"
            ) from error

    def _cut(self, ids: list[int], special: set[int]) -> list[int]:
        """A response within the limit that ends with an end token; what is lost is lost before it."""
        if not ids or ids[-1] not in special:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids if len(ids) <= self.max_response_tokens else [*ids[: self.max_response_tokens - 1], ids[-1]]

    def _end_ids(self) -> set[int]:
        """Special tokens, any of which may be the template's end of turn; an unknown word or a beginning is no end."""
        added = self.tokenizer.added_tokens_decoder
        special = {*self.tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
        return special - {self.tokenizer.unk_token_id, self.tokenizer.bos_token_id} | {self.tokenizer.eos_token_id}


def plain_speller(tokenizer: Any) -> Callable[[str], str]:
    """What takes apart, by a space, every spelling of a special token in a text: none ends its own turn, or opens another."""
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    longest_first = sorted(filter(lambda token: len(token) > 1, special), key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return lambda text: spelled.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def end_of_turn(tokenizer: Any) -> int:
    """The id that ends every response as the model reads it: of the template's own end, which need not be the eos token."""
    row = Preference("", ({"role": "user", "content": "?"},), "yes", "no")
    whole = PairTokenizer(tokenizer, max_prompt_tokens=1, max_response_tokens=1 << 20)
    return whole._tokenise([row])[0].chosen[-1]


def readable(prompt: Sequence[Turn]) -> str:
    """A prompt for people: the text of a single user turn, or one ``role: text`` paragraph a turn."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _unusable(pair: Pair) -> str | None:
    if len(pair.chosen) < 2 or len(pair.rejected) < 2:
        return CUT
    return EQUAL_CUT if pair.chosen == pair.rejected else None
