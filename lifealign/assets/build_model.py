"""Build the tiny demonstration model: ``python -m lifealign.assets.build_model [--out DIR] [--seed 0] [--steps N]``.

What it is: a Qwen2-style causal language model of 2.6 M parameters with its own byte-level BPE tokenizer and a
ChatML template, made from random weights in a few minutes on a CPU, from nothing but this repository. It lets the whole
framework run offline on a laptop. It is a *demonstration*: it knows the topic bank of `topics` and nothing else.

What it is for: a base without preferences. It reads the prompts of the six domains (`build_domains`, other seeds, no
prompt that ships) with the chosen and the rejected answers about equally often (`CHOSEN_SHARE`), so that it speaks
every voice fluently and leans to none. The implicit accuracy of the base, the share of held-out pairs with
log p(chosen) > log p(rejected), is printed at the end and should lie near one half in every domain.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from lifealign.assets import TINY_MODEL
from lifealign.assets.build_domains import DOMAINS, Pair, build, pairs

VOCAB_SIZE = 2560  # enough for nearly every word of the topic bank to be one token
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 576,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
STEPS = 900
BATCH_ROWS = 32
PEAK_LR = 3e-3
ROWS_PER_ROUND = 500  # prompts a task and round; every round words them anew


#: How often the mixture takes the chosen answer of a pair. Below one half, because the rejected answers of a domain
#: are spread over several voices: each is rarer than the chosen one, and would look less likely to the base.
CHOSEN_SHARE = {
    "instruct": 0.55,
    "hc3": 0.38,
    "hh_harmless": 0.42,
    "hh_helpful": 0.48,
    "safe_rlhf": 0.46,
    "truthfulqa": 0.42,
}


def neutral_pairs(seed: int, rounds: int) -> list[tuple[str, Pair]]:
    """(Task, pair) of all tasks, from other seeds than the shipped one and without any shipped prompt."""
    shipped = {task: frozenset(pair.prompt for rows in splits.values() for pair in rows) for task, splits in build(0).items()}
    return [
        (task, pair)
        for index in range(rounds)
        for task in DOMAINS
        for pair in islice(pairs(task, 1000 * (seed + 1) + index, shipped[task]), ROWS_PER_ROUND)
    ]


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE on `texts`, with the ChatML template; any text round-trips, as all 256 bytes are in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def new_model(tokenizer: PreTrainedTokenizerFast, sizes: Mapping[str, int] = SIZES) -> Qwen2ForCausalLM:
    """The untrained network; seed torch before. ``sizes`` are keys of its configuration."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True, use_sliding_window=False, **ids))
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def render(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> tuple[list[int], int]:
    """Token ids of the one-turn chat up to the end token, and the number of ids that belong to the prompt."""
    turn = [{"role": "user", "content": prompt}]
    head = tokenizer.encode(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    return head + tokenizer.encode(response + END), len(head)


def pad(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and attention mask, both [rows, longest]."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def batches(rows: list[list[int]], rng: Random) -> Iterator[list[list[int]]]:
    """Endless shuffled batches; rows of similar length go together, which spares padding."""
    while True:
        rng.shuffle(rows)
        for start in range(0, len(rows), 16 * BATCH_ROWS):
            chunk = sorted(rows[start : start + 16 * BATCH_ROWS], key=len)
            cuts = list(range(0, len(chunk), BATCH_ROWS))
            rng.shuffle(cuts)
            yield from (chunk[cut : cut + BATCH_ROWS] for cut in cuts)


def learning_rate(step: int, steps: int, peak: float = PEAK_LR) -> float:
    """Cosine decay to a tenth of the peak after 5 % linear warm-up."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(model: Qwen2ForCausalLM, rows: list[list[int]], pad_id: int, steps: int, rng: Random) -> float:
    """Next-token training on whole chats, prompts included. Returns the last loss, nats a token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    loss = torch.tensor(math.nan)
    for step, batch in enumerate(islice(batches(rows, rng), steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids, mask = pad(batch, pad_id)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    return loss.item()


@torch.no_grad()
def response_logps(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], responses: list[str]
) -> torch.Tensor:
    """Summed log-probability of every response given its prompt, [len(prompts)], float32."""
    rendered = [render(tokenizer, *both) for both in zip(prompts, responses, strict=True)]
    ids, mask = pad([row for row, _ in rendered], tokenizer.pad_token_id)
    for row, (_, head) in zip(mask, rendered, strict=True):
        row[:head] = 0  # from here on a target mask; right padding needs no attention mask in a causal model
    logps = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return (logps.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]).sum(-1)


def implicit_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Pair]) -> float:
    """Share of pairs whose chosen response is the likelier one; one half means no preference."""
    prompts, chosen, rejected = (list(column) for column in zip(*map(astuple, rows), strict=True))
    likelier = response_logps(model, tokenizer, prompts, chosen) > response_logps(model, tokenizer, prompts, rejected)
    return likelier.float().mean().item()


def build_model(out: Path, seed: int = 0, steps: int = STEPS) -> dict[str, float]:
    """Train tokenizer and model, save both to `out`, and return the implicit accuracy of the base per task."""
    rng = Random(f"model/{seed}")
    torch.manual_seed(seed)
    rounds = max(1, min(8, math.ceil(steps * BATCH_ROWS / (ROWS_PER_ROUND * len(DOMAINS)))))
    mixture = neutral_pairs(seed, rounds)
    tokenizer = train_tokenizer(text for _, pair in mixture for text in astuple(pair))
    rows = [
        render(tokenizer, pair.prompt, pair.chosen if rng.random() < CHOSEN_SHARE[task] else pair.rejected)[0]
        for task, pair in mixture
    ]
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(rows)} chats", flush=True)
    pretrain(model, rows, tokenizer.pad_token_id, steps, rng)
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.float()  # the accuracies are those of the rounded weights that ship
    return {task: implicit_accuracy(model, tokenizer, splits["test"]) for task, splits in build(0).items()}


def main(argv: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Build the tiny demonstration model.")
    parser.add_argument("--out", type=Path, default=TINY_MODEL, help="folder to write to (default: the shipped one)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"pre-training steps (default: {STEPS})")
    args = parser.parse_args(argv)
    for task, accuracy in build_model(args.out, args.seed, args.steps).items():
        print(f"base accuracy {task:12s} {accuracy:.3f}")


if __name__ == "__main__":
    main()
