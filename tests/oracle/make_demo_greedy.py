"""Write demo_greedy.json: greedy continuations of the demo model by ``transformers`` in float32.

    python tests/oracle/make_demo_greedy.py

Each prompt is a user message under the model's chat template, or bare text; 64 new tokens, no stop at eos.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from riverinfer.demo import demo_model

CHAT = [
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List five things one can do on a rainy day.",
    "Erkläre in zwei Sätzen, warum der Himmel blau ist.",
    "Summarise: The river drafts tokens, the backbone verifies them, and the cache is rewritten exactly.",
]
TEXT = ["Once upon a time", "def quicksort(items):\n", "The three laws of thermodynamics are"]


def main() -> None:
    folder = demo_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cases = []
    for kind, prompts in (("chat", CHAT), ("text", TEXT)):
        for prompt in prompts:
            text = prompt
            if kind == "chat":
                messages = [{"role": "user", "content": prompt}]
                text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            prompt_ids = torch.tensor([ids])
            with torch.no_grad():
                # The mask is given because generate() would take every <|im_end|> of the prompt for padding.
                out = model.generate(
                    prompt_ids,
                    attention_mask=torch.ones_like(prompt_ids),
                    max_new_tokens=64,
                    eos_token_id=-1,
                    do_sample=False,
                )[0, len(ids) :].tolist()
            cases.append({"kind": kind, "prompt": prompt, "prompt_ids": ids, "ids": out, "text": tokenizer.decode(out)})
    result = {
        "command": "python tests/oracle/make_demo_greedy.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dtype": "float32",
        "cases": cases,
    }
    path = Path(__file__).with_name("demo_greedy.json")
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {len(cases)} cases to {path}")


if __name__ == "__main__":
    main()
