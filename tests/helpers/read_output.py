"""Read an output folder with the installed transformers: a script for other environments, and a module.

It must run with transformers 4 and without torch.
"""

import json
import sys
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig


def read_tokenizer(folder: str, texts: list[str]) -> dict[str, Any]:
    """Return the behaviour of the folder's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [tokenizer(text) for text in texts]
    messages = [{"role": "user", "content": "Hi"}]
    return {
        "inputs": sorted(encoded[0]),
        "ids": [one["input_ids"] for one in encoded],
        "pair": tokenizer("one", "two")["input_ids"],
        "plain_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
        "decoded": [tokenizer.decode(one["input_ids"]) for one in encoded],
        "decoded_text": [tokenizer.decode(one["input_ids"], skip_special_tokens=True) for one in encoded],
        "special": sorted(tokenizer.all_special_tokens),
        "image_token": getattr(tokenizer, "image_token", None),
        "roles": {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")},
        "added": {token.content: [id_, token.special] for id_, token in tokenizer.added_tokens_decoder.items()},
        "tokens": len(tokenizer),
        "chat": tokenizer.apply_chat_template(messages, tokenize=False) if tokenizer.chat_template else None,
    }


def read_config(folder: str, keys: list[str]) -> dict[str, Any]:
    """Return the value of each key ("text_config.rope_theta" for a nested one), and of generation_config.json."""
    config = AutoConfig.from_pretrained(folder).to_dict()
    found: dict[str, Any] = {}
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part, "absent")
        found[key] = value
    generation = GenerationConfig.from_pretrained(folder)
    return {"config": found, "stops": generation.eos_token_id, "bos": generation.bos_token_id}


if __name__ == "__main__":
    print(json.dumps([globals()[name](*arguments) for name, arguments in json.load(sys.stdin)]))
