"""Make the checkpoints of this folder with TRL's present trainers: see README.md.

    python make.py [CASE ...]

Each case takes two steps at 1e-4 on one process. What is kept is the Trainer's ``checkpoint-2`` without its optimizer.
The truth is the live model's.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

here = Path(__file__).parent
KEPT = ("model.safetensors", "config.json", "adapter_model.safetensors", "adapter_config.json")


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=2, num_labels=1,
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w2")


def data(kind: str) -> Dataset:
    first, second = "w4 w5 w6 w7", "w8 w9 w10"
    if kind == "sft":
        return Dataset.from_dict({"text": [f"{first} {second}"] * 4})
    return Dataset.from_dict({"prompt": [first] * 4, "chosen": [second] * 4, "rejected": ["w11 w12 w13"] * 4})


def main(case: str) -> None:
    kind = case.partition("-")[0]
    folder = here / case
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "ckpt").mkdir(parents=True)
    torch.manual_seed(3)
    model = (LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM)(config())
    if "lora" in case:
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.save_pretrained(folder / "base")
    peft = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments, trainer_of = {
        "sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer), "reward": (RewardConfig, RewardTrainer),
    }[kind]  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        args = arguments(
            output_dir=out, max_steps=2, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-4, report_to=[],
            use_cpu=True, gradient_checkpointing=False, bf16=False,
        )  # fmt: skip
        trainer = trainer_of(
            model=model, args=args, train_dataset=data(kind), processing_class=tokenizer(),
            peft_config=peft if "lora" in case else None,
        )  # fmt: skip
        trainer.train()
        for name in KEPT:
            if (Path(out) / "checkpoint-2" / name).exists():
                shutil.copy(Path(out) / "checkpoint-2" / name, folder / "ckpt" / name)
        live = trainer.accelerator.unwrap_model(trainer.model)
    state = get_peft_model_state_dict(live) if "lora" in case else live.state_dict()
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "truth.safetensors")
    (folder / "truth.json").write_text(json.dumps({"tied": {}}) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["sft", "sft-lora", "dpo-lora", "reward"]:
        main(name)
