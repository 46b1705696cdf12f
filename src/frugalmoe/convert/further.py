"""Modules of multi-token prediction in published models: layers behind the last one, as in DeepSeek-V3."""

from frugalmoe.convert.contract import Row

_MODULE = "model.layers.{mtp}."
FURTHER = (
    Row(_MODULE + "enorm.weight", "embedding_norm/scale"),
    Row(_MODULE + "hnorm.weight", "hidden_norm/scale"),
    Row(_MODULE + "eh_proj.weight", "project_ID"),
    Row(_MODULE + "shared_head.norm.weight", "norm/scale"),
)
# Embedding and head are the network's; released files hold them again.
COPIES = {
    r"model\.layers\.\d+\.embed_tokens\.weight": "model.embed_tokens.weight",
    r"model\.layers\.\d+\.shared_head\.head\.weight": "lm_head.weight",
}
