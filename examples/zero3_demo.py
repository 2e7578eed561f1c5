"""Train a small Llama with DeepSpeed ZeRO-3 on two CPU processes, merge its checkpoint, load it and generate.

    python examples/zero3_demo.py FOLDER

``engine.save_checkpoint`` writes FOLDER/checkpoints, and dsconv merges it into FOLDER/merged.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

TEXT = (
    "Training leaves the weights in pieces, one piece a rank. Merged, they are one model again, and it still knows its"
    " text."
)
PROMPT = "Training leaves"
STEPS = 60
WORLD = 2


def train(folder: Path) -> None:
    """Train one rank with DeepSpeed's own engine, without a trainer."""
    import deepspeed
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # use gloo for every collective; the native op would have to be compiled
    )
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    pieces = pre_tokenizers.Whitespace()
    vocabulary = sorted({word for word, _ in pieces.pre_tokenize_str(TEXT)})
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *vocabulary])}, unk_token="<unk>"))
    base.pre_tokenizer = pieces
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    rank = torch.distributed.get_rank()
    for step in range(STEPS):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        if rank == 0 and (step % 20 == 0 or step == STEPS - 1):
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    engine.save_checkpoint(str(folder))
    if rank == 0:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads are still alive: exit without running their destructors


def main(folder: Path) -> None:
    checkpoints, merged = folder / "checkpoints", folder / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.mkdir(parents=True)
    print(f"Training a Llama with ZeRO-3 on {WORLD} processes …", flush=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "PYTHONWARNINGS": "ignore",
    }
    log = folder / "training.log"
    with log.open("w") as errors:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", str(checkpoints)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=errors,
                stdout=None if rank == 0 else errors,
            )
            for rank in range(WORLD)
        ]
        codes = [process.wait() for process in ranks]
    if any(codes):
        sys.exit(f"training failed with exit codes {codes}:\n{log.read_text()[-4000:]}")
    for path in sorted(checkpoints.rglob("*.pt")):
        print(f"  {path.relative_to(folder)}")

    for arguments in (["zero-to-fp32", str(checkpoints), str(merged)], ["verify", str(checkpoints), str(merged)]):
        print(f"\n$ dsconv {' '.join(arguments)}", flush=True)
        subprocess.run(["dsconv", *arguments], check=True)

    print("\nLoading it with transformers …", flush=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    rest = len(tokenizer(TEXT)["input_ids"]) - prompt["input_ids"].shape[1]
    output = model.generate(
        input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=rest, do_sample=False
    )
    print(f"> {tokenizer.decode(output[0])}")


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        train(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
