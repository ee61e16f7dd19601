"""Records what the newest transformers says of the folders that `published.py` builds, into `published.json`.

In an environment of its own: pip install torch transformers==5.24.0 sentencepiece jinja2; python tests/record_published.py
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from published import CONFIGS, IDS, TEXTS, TOKENIZERS, TURNS, write_model

ROLES = ("user", "assistant", "user")


def logits(folder: Path) -> list[list[float]]:
    """The first logits of every sixth position."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits[0, ::6, :8]
    return [[round(value, 4) for value in row] for row in found.tolist()]


def greedy(folder: Path) -> list[int]:
    """Tokens of plain greedy generation over a cache, across the end of the training's context."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([IDS[:12]])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, 12:].tolist()


def main() -> None:
    """Build, ask, write."""
    record = {
        "transformers": transformers.__version__,
        "logits": {},
        "greedy": {},
        "texts": {},
        "decoded": {},
        "chats": {},
    }
    with tempfile.TemporaryDirectory() as root:
        for name in CONFIGS:
            folder = write_model(Path(root) / name, name)
            record["logits"][name] = logits(folder)
            record["greedy"][name] = greedy(folder)
        for name, (_, entries) in TOKENIZERS.items():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                write_model(Path(root) / f"t-{name}", tokenizer=name)
            )
            record["texts"][name] = [tokenizer(text).input_ids for text in TEXTS]
            record["decoded"][name] = [
                tokenizer.decode(ids, skip_special_tokens=True) for ids in record["texts"][name]
            ]
            if "chat_template" in entries or tokenizer.chat_template:
                messages = [{"role": role, "content": turn} for role, turn in zip(ROLES, TURNS, strict=True)]
                chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                record["chats"][name] = chat
    Path(__file__).with_name("published.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
