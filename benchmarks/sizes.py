"""What is trained in a benchmark. Standard library only: workers of other frameworks import it too."""

import dataclasses
import json
import sys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A decoder-only transformer and its batch. Embedding and head are not tied; everything is float32."""

    experts: int = 8
    top_k: int = 2
    expert_dim: int = 512
    layers: int = 4
    dim: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    sequences: int = 16
    time: int = 256
    vocabulary: int = 4096

    @property
    def tokens(self) -> int:
        return self.sequences * self.time

    @property
    def name(self) -> str:
        return f"{self.experts} experts, top-{self.top_k}, F={self.expert_dim}"

    def smaller(self) -> "Size":
        """For a quick look at whether everything runs."""
        return dataclasses.replace(self, layers=2, sequences=4, time=128, vocabulary=512)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


NEW = 16  # tokens that are decoded after a prompt of `time` tokens, where generation is measured

# The same training recipe on every side.
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.95)
EPS = 1e-8
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0


def from_arguments() -> tuple[Size, str]:
    """A worker's arguments: the size as JSON, and which model."""
    return Size(**json.loads(sys.argv[1])), sys.argv[2]
