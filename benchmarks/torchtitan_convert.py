"""What torchtitan's ``scripts/checkpoint_conversion/convert_to_hf.py`` does, for a llama3 of any size.

    python torchtitan_convert.py CHECKPOINT OUT '{"dim": 1024, "n_layers": 8, …}'

It needs torchtitan 0.3 beside torch, in an environment of its own (see tests/data/names/make_torchtitan.py). It imports
nothing of dsconv.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torchtitan.models import llama3
from torchtitan.models.common.rope import ComplexRoPE


def main(source: Path, target: Path, sizes: dict[str, int]) -> None:
    dim, vocabulary = sizes["dim"], sizes["vocabulary"]
    layers = llama3._build_llama3_layers(
        n_layers=sizes["n_layers"], dim=dim, n_heads=sizes["n_heads"], n_kv_heads=sizes["n_kv_heads"],
        hidden_dim=sizes["hidden_dim"], attn_backend="flex",
        rope=ComplexRoPE.Config(dim=dim // sizes["n_heads"], max_seq_len=64, theta=10000.0),
    )  # fmt: skip
    config = llama3.Llama3Model.Config(
        layers=layers,
        vocab_size=vocabulary,
        dim=dim,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=vocabulary, embedding_dim=dim, param_init=llama3._EMBEDDING_INIT
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=dim, param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=dim, out_features=vocabulary, param_init=llama3._output_linear_init(dim)
        ),
    )
    with torch.device("cpu"):
        model = config.build().to(torch.bfloat16)
    state = dict(model.state_dict())
    dcp.load(state, checkpoint_id=source, no_dist=True)
    adapter = llama3.Llama3StateDictAdapter(config, None)
    writer = HuggingFaceStorageWriter(
        path=target, save_distributed=True, enable_consolidation=True, thread_count_consolidation=5
    )
    dcp.save(adapter.to_hf(state), storage_writer=writer, no_dist=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
