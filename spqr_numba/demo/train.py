"""Train the bundled model: ``python -m spqr_numba.demo.train --out DIR``.

A byte-level BPE tokenizer and then a Llama of 5.5 million parameters learn from ``corpus``, on
the GPU where there is one. The seed fixes the initial weights and the order of the windows.
``--minutes`` bounds the time: the learning rate then falls with the clock, and how many steps
fit depends on the machine. DIR always holds the latest checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..evaluate.perplexity import perplexity
from ..model.calibration import consecutive_windows
from .corpus import held_out_text, training_documents

__all__ = ["build_model", "main", "train", "train_tokenizer"]

SEED = 0
VOCABULARY = 4096
CONTEXT = 512  # tokens, of the model and of each window it learns from
BEGIN, END = "<s>", "</s>"

BATCH = 16
PASSES = 30  # over the training text
PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE = 1e-4
WARM_UP = 0.03  # share of the run
WEIGHT_DECAY = 0.5
DROPOUT = 0.2
LARGEST_GRADIENT_NORM = 1.0
CHECKPOINTS = 10


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that opens a text with BEGIN and keeps every byte."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    begin = (BEGIN, bpe.token_to_id(BEGIN))
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained fp32 model; every linear takes a multiple of 32 inputs."""
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def train(out: Path, minutes: float = math.inf) -> float:
    """Train for PASSES or the given minutes, whichever ends first; return held-out perplexity.

    The model folder is left in out: fp16 safetensors, configuration, tokenizer.
    """
    documents = training_documents()
    tokenizer = train_tokenizer(documents)
    model = build_model(tokenizer)
    tokens = _tokenize(tokenizer, documents).to(model.device)
    held_out = consecutive_windows(_tokenize(tokenizer, [held_out_text()]), CONTEXT)
    tqdm.write(
        f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokens)} training tokens, "
        f"{len(held_out)} held-out windows of {CONTEXT}"
    )
    for done in _steps(model, tokens, minutes * 60):
        _save(model, tokenizer, out)
        reached = perplexity(model.eval(), held_out)
        tqdm.write(f"{done:4.0%} held-out perplexity {reached:.2f}")
    return reached


def _tokenize(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """Return all documents as one [N] int64 tensor, each between BEGIN and END."""
    encoded = tokenizer(documents, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def _steps(model: LlamaForCausalLM, tokens: Tensor, seconds: float) -> Iterator[float]:
    """Train; yield the share that is done whenever a checkpoint is due, 1.0 at the end."""
    _add_dropout(model)
    optimizer = _optimizer(model)
    sampler = torch.Generator().manual_seed(SEED)
    steps = PASSES * len(tokens) // (BATCH * CONTEXT)
    start, next_checkpoint = time.monotonic(), 0.0
    with tqdm(total=steps, unit="step") as bar:
        while (done := max(bar.n / steps, (time.monotonic() - start) / seconds)) < 1:
            if done >= next_checkpoint:
                yield done
                next_checkpoint += 1 / CHECKPOINTS
            loss = _step(model, optimizer, _learning_rate(done), _sample_windows(tokens, sampler))
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    yield 1.0


def _add_dropout(model: LlamaForCausalLM) -> None:
    """While training, drop a share of what the embedding and each sublayer hand on.

    Llama has no such dropout; without it the model learns the text by heart in ten passes.
    """
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(
                lambda module, _, output: F.dropout(output, DROPOUT, module.training)
            )


def _optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and spares the norms."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def _learning_rate(done: float) -> float:
    """Return the rate after a share of the run: a linear warm-up, then half a cosine."""
    if done < WARM_UP:
        return PEAK_LEARNING_RATE * done / WARM_UP
    cosine = 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))
    return FINAL_LEARNING_RATE + (PEAK_LEARNING_RATE - FINAL_LEARNING_RATE) * cosine


def _sample_windows(tokens: Tensor, sampler: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=sampler)
    return tokens[(starts + torch.arange(CONTEXT)).to(tokens.device)]


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rate: float, batch: Tensor
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model.train()(input_ids=batch, labels=batch).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT_NORM)
    optimizer.step()
    return loss.item()


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    copy.deepcopy(model).half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Parse the command line, train, and print the held-out perplexity."""
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes is {arguments.minutes}; it must be above 0")
    print(f"held-out perplexity {train(arguments.out, arguments.minutes):.2f}")


if __name__ == "__main__":
    main()
