"""Make the checkpoints of this folder with TRL's own PPOTrainer: see README.md.

    python make.py [CASE ...]

TRL 0.11 is the last release whose PPOTrainer trains AutoModelForCausalLMWithValueHead. Each case takes a PPO step at
1e-4 on one process, and saves the model as TRL does. The truth is the live model's.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

here = Path(__file__).parent


def base() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, eos_token_id=1, pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def train(model: AutoModelForCausalLMWithValueHead) -> PPOTrainer:
    config = PPOConfig(learning_rate=1e-4, batch_size=4, mini_batch_size=2, seed=5)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer())
    queries = [torch.randint(3, 61, (6,)) for _ in range(4)]
    replies = [torch.randint(3, 61, (5,)) for _ in range(4)]
    trainer.step(queries, replies, [torch.tensor(float(n)) for n in range(4)])
    return trainer


def main(case: str) -> None:
    folder = here / case
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "base").mkdir(parents=True)
    base().save_pretrained(folder / "base")
    peft = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    options = {"peft_config": peft} if "lora" in case else {}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "base"), **options)
    trainer = train(model)
    live = model.pretrained_model
    if case.endswith("accelerate"):  # what save_state writes: the wrapper's own state dict
        trainer.accelerator.save_state(str(folder / "ckpt"))
        (folder / "ckpt" / "random_states_0.pkl").unlink()  # 15 kB
    elif case.endswith("torch"):  # scripts that save nn.Module's state dict, as DeepSpeed and FSDP do
        (folder / "ckpt").mkdir()
        live.config.save_pretrained(folder / "ckpt")
        torch.save(torch.nn.Module.state_dict(model), folder / "ckpt" / "pytorch_model.bin")
    else:
        trainer.save_pretrained(str(folder / "ckpt"))
    head = {f"v_head.{name}": tensor for name, tensor in model.v_head.state_dict().items()}
    state = get_peft_model_state_dict(live) if "lora" in case else live.state_dict()
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "truth.safetensors")
    save_file(head, folder / "head.safetensors")
    (folder / "truth.json").write_text(json.dumps({"tied": {}}) + "\n")
    if "lora" not in case:
        shutil.rmtree(folder / "base")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["plain", "plain-torch", "plain-accelerate", "lora"]:
        main(name)
