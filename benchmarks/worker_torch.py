"""A worker that trains a Hugging Face transformers model: arguments SIZE_JSON FAMILY[:EXPERTS[:compiled]].

EXPERTS is an implementation of transformers, eager or grouped_mm; "compiled" is torch.compile.

Random weights, fused AdamW, clipping by the global norm. The models' auxiliary losses are off, their default.
"""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import sizes
import torch
import transformers
from serve import Action, serve

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()


def build(size: sizes.Size, family: str, experts: str) -> torch.nn.Module:
    """`experts` is eager (a loop over experts) or grouped_mm (sorted tokens, one grouped product)."""
    common = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.dim,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.time,
        "tie_word_embeddings": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    width, active = size.expert_dim, size.top_k * size.expert_dim
    routed = {"num_experts": size.experts, "num_experts_per_tok": size.top_k}
    mixtral = {"num_local_experts": size.experts, "num_experts_per_tok": size.top_k}
    config = {
        "llama": lambda: transformers.LlamaConfig(**common, intermediate_size=active),
        "mixtral": lambda: transformers.MixtralConfig(**common, **mixtral, intermediate_size=width),
        "olmoe": lambda: transformers.OlmoeConfig(**common, **routed, intermediate_size=width),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **common, **routed, intermediate_size=active, moe_intermediate_size=width
        ),
    }[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    if experts:
        model.set_experts_implementation(experts)
    return model.train()


def main() -> None:
    size, model_name = sizes.from_arguments()
    family, experts, compiled = (*model_name.split(":"), "", "")[:3]
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    model = build(size, family, experts)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=sizes.LEARNING_RATE,
        betas=sizes.BETAS,
        eps=sizes.EPS,
        weight_decay=sizes.WEIGHT_DECAY,
        fused=True,
    )

    def batch() -> torch.Tensor:
        return torch.randint(0, size.vocabulary, (size.sequences, size.time))

    def step(tokens: torch.Tensor) -> dict[str, float]:
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        update(None)
        return {"loss": float(loss.detach())}

    def gradients() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)

    def update(_: None) -> dict[str, float]:
        torch.nn.utils.clip_grad_norm_(model.parameters(), sizes.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {}

    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    serve(about, {"step": Action(batch, step), "update": Action(gradients, update)})


if __name__ == "__main__":
    main()
