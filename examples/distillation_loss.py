"""Token-level distillation between models of different tokenizers: a teacher that was given the student's.

    python examples/distillation_loss.py --student small/ --teacher big/

Both read the same ids, so that KL(teacher ‖ student) is a sum over one vocabulary. It is printed for the transplanted
teacher, and for one that has zeros for the rows of new tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import one_vocabulary
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mergekit_omp.evaluation.bits_per_byte import WINDOW_BYTES, builtin_texts, windows


def distillation_loss(teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor, n_tokens: int) -> Tensor:
    """KL(teacher ‖ student) of the next token in nats, the mean over the positions of ``ids``.

    Args:
        teacher: gets no gradient.
        student: gets one, unless that is switched off.
        ids: int64 [B, T] of the vocabulary that both have.
        n_tokens: size of that vocabulary; rows beyond it are padding, and the two may have unequally many.

    Returns:
        A scalar, at least 0.
    """
    with torch.no_grad():
        wanted = teacher(ids).logits[..., :n_tokens].float().log_softmax(dim=-1)  # [B, T, V]
    given = student(ids).logits[..., :n_tokens].float().log_softmax(dim=-1)
    return functional.kl_div(given.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the loss for two teachers, and the size of the gradient that reaches the student."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_vocabulary.add_arguments(parser, keeps="student", changes="teacher")
    parser.add_argument("--text", type=Path, help="what both read the beginning of (default: four built-in texts)")
    options = parser.parse_args(arguments)
    student_folder, teacher_folder = one_vocabulary.folders(options)
    zeros = options.out.with_name(options.out.name + "-zeros")
    one_vocabulary.transplant(one_vocabulary.changes(options), student_folder, zeros, {"approximation": "zero"})

    student, tokenizer = one_vocabulary.load(student_folder)
    texts = {options.text.name: options.text.read_text(encoding="utf-8")} if options.text else builtin_texts()
    ids = [one_vocabulary.with_start(tokenizer, windows(text, WINDOW_BYTES)[0]) for text in texts.values()]
    print(f"\n{'nats a token':<24}" + "".join(f"{name:>14}" for name in texts))
    for name, folder in (("transplanted teacher", teacher_folder), ("zeros for new rows", str(zeros))):
        teacher, _ = one_vocabulary.load(folder)
        student.zero_grad()
        losses = []
        for each in ids:
            loss = distillation_loss(teacher, student, each, len(tokenizer))
            loss.backward()
            losses.append(loss.item())
        gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        print(f"{name:<24}" + "".join(f"{loss:>14.4f}" for loss in losses))
        print(f"  gradient of norm {norm:.4f} in {len(gradients)} of {len(list(student.parameters()))} tensors")


if __name__ == "__main__":
    main()
