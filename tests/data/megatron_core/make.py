"""Make ckpt/ and live.safetensors beside this file: `torchrun --nproc-per-node 2 make.py`, on a CPU.

It needs megatron-core 0.16.1 (`pip install --no-deps megatron-core==0.16.1 psutil`) beside torch 2.13. A small GPTModel
on two tensor-parallel ranks is saved by Megatron's own dist_checkpointing; only the calls that wait for a GPU are
replaced. live.safetensors has what each rank held in memory, as RANK/NAME. The main guard is needed: Megatron starts
processes that import this file again.
"""

from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    here = Path(__file__).parent
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.device_count = lambda: 1
    dist.init_process_group("gloo")
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import TransformerConfig
    from safetensors.torch import save_file

    parallel.initialize_model_parallel(2, 1)
    random.initialize_rng_tracker()
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=24,
        use_cpu_initialization=True, tensor_model_parallel_size=2, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, normalization="RMSNorm",
        bias_activation_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=32, max_sequence_length=16,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip
    rank = parallel.get_tensor_model_parallel_rank()
    for number, (_, weight) in enumerate(model.named_parameters()):
        torch.manual_seed(10 * number + (rank if getattr(weight, "tensor_model_parallel", False) else 0))
        torch.nn.init.normal_(weight)
    folder = here / "ckpt" / "iter_0000010"
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {"model": model.sharded_state_dict(), "iteration": 10, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(folder))
    live: list = [None, None]
    dist.all_gather_object(live, {name: weight.detach() for name, weight in model.named_parameters()})
    if rank == 0:
        (here / "ckpt" / "latest_checkpointed_iteration.txt").write_text("10")
        ranked = {f"{r}/{name}": value.contiguous() for r, held in enumerate(live) for name, value in held.items()}
        save_file(ranked, here / "live.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
