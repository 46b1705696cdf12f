"""A worker that decodes with a Hugging Face transformers model: arguments SIZE_JSON DTYPE:THREADS:MODEL_DIR.

The directory is filled with random weights if it is not there.
"""

import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sizes
import torch
import transformers
from serve import Action, serve
from worker_torch import build

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def main() -> None:
    size, name = sizes.from_arguments()
    dtype, threads, directory = name.split(":", 2)
    torch.manual_seed(0)
    torch.set_num_threads(int(threads))
    if not Path(directory).is_dir():
        build(size, "qwen3_moe", "").save_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.set_experts_implementation("grouped_mm")
    model = model.eval()

    def prompts() -> torch.Tensor:
        return torch.randint(0, size.vocabulary, (size.sequences, size.time))

    @torch.no_grad()
    def prefill(tokens: torch.Tensor):
        out = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1), out.past_key_values

    @torch.no_grad()
    def decode(state) -> dict[str, float]:
        token, cache = state
        for _ in range(sizes.NEW):
            out = model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1)
            token.tolist()  # a caller looks at each
        return {}

    def texts() -> torch.Tensor:
        return torch.randint(0, size.vocabulary, (size.sequences, size.time + 1))

    @torch.no_grad()
    def score(ids: torch.Tensor) -> dict[str, float]:
        logits, targets = model(input_ids=ids[:, :-1], use_cache=False).logits.float(), ids[:, 1:]
        greedy = (logits.argmax(-1) == targets).all(-1)
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nats = nats.view(targets.shape).sum(-1)
        return {"nats": float(nats.sum()), "greedy": float(greedy.sum())}

    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    prefilled = lambda tokens: {"token": float(prefill(tokens)[0][0])}
    decoding = Action(lambda: prefill(prompts()), decode)
    serve(about, {"prefill": Action(prompts, prefilled), "decode": decoding, "score": Action(texts, score)})


if __name__ == "__main__":
    main()
