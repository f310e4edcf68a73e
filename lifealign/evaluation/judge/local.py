"""A judge held in this process: what a causal language model expects to be the reply, without generating anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lifealign.data.tokenize import apply_template, plain_speller
from lifealign.errors import UserError
from lifealign.evaluation.judge.rubrics import Question
from lifealign.runtime import distributed

TOO_LONG = "longer than the judge's context"

Tokens = tuple[int, ...]


class LocalJudge:
    """A model and its tokenizer, on this rank's device: in its own precision on an accelerator, in float32 on the CPU.

    Args:
        path: folder or hub name. Code that comes with a model is not run.

    Raises:
        UserError: where it cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        device = distributed.device()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            self._plain = plain_speller(self.tokenizer)
            dtype = torch.float32 if device.type == "cpu" else "auto"
            safe = {"trust_remote_code": False, "use_safetensors": True}  # neither its code nor pickled weights
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **safe).to(device).eval()
        except Exception as error:  # of a folder that holds anything: the library raises a dozen classes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"evaluation.judge.local={path}: no judge could be loaded ({reason})") from error

    def shares(self, question: Question) -> dict[str, float] | None:
        """How the probability of the question's replies is divided among them; None where the question is too long.

        Each reply counts with the probability that the model's text begins with its tokens, and, where these begin those
        of another reply ("1" and "10" of a tokenizer that cuts numbers into digits), does not go on to that one. So the
        events exclude each other; their probabilities are then divided by their sum.
        """
        prompt = self._prompt(question.text)
        replies = {reply: self._ids(reply) for reply in question.replies}
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(prompt) + max(map(len, replies.values())) > limit:
            return None
        logps = self._logps(prompt, list(replies.values()))
        top = max(logps.values())  # the common factor cancels, and keeps what is unlikely from vanishing
        chances = {ids: float((logp - top).exp()) for ids, logp in logps.items()}
        alone = {
            reply: chances[ids] - sum(chances[other] for other in chances if other != ids and other[: len(ids)] == ids)
            for reply, ids in replies.items()
        }
        return {reply: chance / sum(alone.values()) for reply, chance in alone.items()}

    def _prompt(self, text: str) -> list[int]:
        """The question as a user's turn with the assistant's opened, or, without a chat template, as plain text.

        A judged text may spell the tokens that end a turn; they are taken apart, so that no text opens one of its own.
        """
        text = self._plain(text)
        if not self.tokenizer.chat_template:
            return self.tokenizer(text + "\n\n").input_ids
        turns = [{"role": "user", "content": text}]
        rendered = apply_template(self.tokenizer, turns, add_generation_prompt=True)
        return self.tokenizer(rendered, add_special_tokens=False).input_ids

    def _ids(self, reply: str) -> Tokens:
        return tuple(self.tokenizer(reply, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def _logps(self, prompt: Sequence[int], replies: Sequence[Tokens]) -> dict[Tokens, torch.Tensor]:
        """Log-probability, float64, that the text after the prompt begins with each of these.

        One pass over the prompt for each reply's head (all its tokens but the last) that begins no other head: one pass in
        all where only "10" has more than a token. Prompts are not padded, so a judge sees what it would see alone.
        """
        heads = {reply[:-1] for reply in replies}
        known: dict[Tokens, torch.Tensor] = {}  # head -> log-probabilities of the token after it
        for head in sorted(heads, key=len, reverse=True):
            if head not in known:
                ids = torch.tensor([[*prompt, *head]], device=self.model.device)
                logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(head) + 1).logits[0]
                rows = logits.double().log_softmax(-1).cpu()
                known |= {head[:length]: row for length, row in enumerate(rows)}
        return {reply: torch.stack([known[reply[:i]][reply[i]] for i in range(len(reply))]).sum() for reply in replies}
