"""Writes the checkpoints of this folder with real, older DeepSpeed releases (see README.md).

    python make.py --ds FOLDER --out OUT [--release 0.14.5 ...] [--variant zero3_bf16 ...]

FOLDER holds `ds-<release>/` as written by `pip install --no-deps --target`, and `pyd1/` (pydantic 1, for releases before
0.11). Each (release, variant) pair trains a tiny model for two steps on two gloo ranks on the CPU, calls the release's own
`save_checkpoint`, and writes the truth from the live engine (never from the files). Only imports are shimmed (`shim`), and
the CPU's answers to a few hardware questions; no code that writes a checkpoint is touched.
"""
import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ZERO = {"stage": 0, "reduce_bucket_size": 64, "allgather_bucket_size": 64, "overlap_comm": False}
BF16 = {"enabled": True}
VARIANTS = {
    "stage0_fp32": {},
    "stage0_bf16": {"bf16": BF16},
    "zero1_bf16": {"bf16": BF16, "zero_optimization": {**ZERO, "stage": 1}},
    "zero1_bf16_fp32accum": {"bf16": BF16, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {**ZERO, "stage": 1}},
    "zero2_fp32": {"zero_optimization": {**ZERO, "stage": 2}},
    "zero2_fp16": {"fp16": {"enabled": True, "initial_scale_power": 4}, "zero_optimization": {**ZERO, "stage": 2}},
    "zero3_bf16": {"bf16": BF16, "zero_optimization": {
        **ZERO, "stage": 3, "sub_group_size": 50, "stage3_param_persistence_threshold": 10,
        "stage3_prefetch_bucket_size": 32, "stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 1000}},
}
KEEP = ("*.pt", "latest")


# ---------------------------------------------------------------- one rank
def release():
    return tuple(map(int, importlib.metadata.version("deepspeed").split("+")[0].split(".")[:2]))


def shim():
    """What torch 2.13 on a machine without Intel's extensions lacks for the older releases."""
    import importlib.machinery
    import types

    import torch

    def module(name, **attributes):
        if name not in sys.modules:
            made = types.ModuleType(name)
            made.__spec__ = importlib.machinery.ModuleSpec(name, None)
            made.__dict__.update(attributes)
            sys.modules[name] = made

    gather = torch.distributed.all_gather_into_tensor

    def gather_without_graph(*arguments, **options):  # torch 2.13's gloo writes into views, which autograd forbids where 0.18 calls it
        with torch.no_grad():
            return gather(*arguments, **options)

    torch.distributed.all_gather_into_tensor = gather_without_graph
    if release() < (0, 13):  # these pick the CPU only where Intel's two extensions import
        module("intel_extension_for_pytorch")
        module("oneccl_bindings_for_pytorch")
    if release() < (0, 14):
        import logging

        import numpy
        import torch.distributed.elastic.agent.server.api as api
        api.log = logging.getLogger("elastic")
        api._get_socket_with_port = None
        numpy.BUFSIZE = 8192
    original = torch.load
    torch.load = lambda *a, **k: original(*a, **{"weights_only": False, **k})


def build(torch):
    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            nn = torch.nn
            self.embed = nn.Embedding(13, 7)
            self.frozen = nn.Linear(7, 5)
            self.mid = nn.Linear(5, 9)
            self.norm = nn.LayerNorm(9)
            self.gain = nn.Parameter(torch.tensor(1.25))
            self.out = nn.Linear(9, 7)
            self.head = nn.Linear(7, 13)
            self.head.weight = self.embed.weight
            self.frozen.requires_grad_(False)
            self.register_buffer("running", torch.linspace(-1, 1, 11))
            self.register_buffer("counter", torch.tensor([3, 2**40 + 1]))
            self.register_buffer("scratch", torch.arange(3.0), persistent=False)

        def forward(self, ids):
            h = self.embed(ids)
            h = self.norm(self.mid(self.frozen(h)).tanh()) * self.gain
            return self.head(self.out(h))

    torch.manual_seed(1234)
    return Tiny()


def worker(variant, out):
    shim()
    import torch
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from safetensors.torch import save_file

    rank = int(os.environ["RANK"])
    accelerator = get_accelerator()
    accelerator._communication_backend_name = "gloo"  # "ccl" in old releases: Intel's library
    assert accelerator.device_name() == "cpu"
    if release() < (0, 10):  # ZeRO calls Stream() and Event() on every accelerator

        class Nothing:
            def __init__(self, *arguments, **options):
                pass

            def __getattr__(self, name):
                return lambda *arguments, **options: None

        type(accelerator).Stream = type(accelerator).Event = Nothing
        type(accelerator).current_stream = type(accelerator).default_stream = lambda self, index=None: Nothing()
        type(accelerator).memory_stats = lambda self, index=None: None
        type(accelerator).stream = lambda self, stream: contextlib.nullcontext()
    import deepspeed.runtime.engine as engine_module
    if release() < (0, 13):  # wants type names such as torch.cpu.FloatTensor, which no CPU tensor has
        engine_module.split_half_float_double_sparse = lambda tensors: [
            (kind, [t for t in tensors if t.type() == kind]) for kind in sorted({t.type() for t in tensors})]
    if variant.endswith("fp16"):
        type(accelerator).is_fp16_supported = lambda self: True  # torch 2.13 does compute fp16 on a CPU
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = build(torch)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.1, "lr": 1e-2},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-2}])
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True,
              "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 1.0, "steps_per_print": 100, **VARIANTS[variant]}
    if variant == "stage0_fp32":  # clipping without ZeRO trips over the 0-d `gain` in most releases
        del config["gradient_clipping"]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        ids = torch.randint(0, 13, (2, 6), generator=generator)
        logits = engine(ids)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out), client_state={"epoch": 1})

    tensors, frozen, tied = truth(engine, torch)
    if rank == 0:
        save_file(tensors, str(out / "truth.safetensors"), metadata={"format": "pt"})
        facts = {"tied": tied, "frozen": frozen, "deepspeed": deepspeed.__version__.split("+")[0], "torch": torch.__version__.split("+")[0],
                 "variant": variant, "world_size": 2, "optimizer_class": type(engine.optimizer).__name__}
        (out / "truth.json").write_text(json.dumps(facts, indent=1) + "\n")
    torch.distributed.barrier()


def truth(engine, torch):
    """Full masters, frozen parameters and persistent buffers, from the live engine; a collective, so every rank calls it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    model, first, tensors, frozen, tied = engine.module, {}, {}, [], {}
    inner = {}  # stage 0 with 16-bit weights: FP16_(Unfused)Optimizer, which has no safe_get
    if not engine.zero_optimization() and hasattr(engine.optimizer, "fp32_groups"):  # unfused: a master per parameter
        for lows, highs in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups):
            inner.update({id(low): high for low, high in zip(lows, highs)})
    elif not engine.zero_optimization() and hasattr(engine.optimizer, "fp32_groups_flat"):  # fused: a flat master per group
        for lows, flat in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups_flat):
            offset = 0
            for low in lows:
                inner[id(low)] = flat[offset:offset + low.numel()].view(low.shape)
                offset += low.numel()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
            continue
        first[id(parameter)] = name
        with_master = parameter.requires_grad
        if not with_master:
            frozen.append(name)
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    value = parameter.data.clone()
            else:
                value = parameter.data
        elif id(parameter) in inner:
            value = inner[id(parameter)].data
        else:
            value = safe_get_full_fp32_param(parameter)
            if value is None:
                assert parameter.dtype == torch.float32, (name, parameter.dtype, type(engine.optimizer))
                value = parameter.data
        assert not with_master or value.dtype == torch.float32
        if hasattr(parameter, "ds_shape"):
            value = value.view(parameter.ds_shape)
        tensors[name] = value.detach().clone().contiguous()
        if with_master:  # the low-precision weight must be the master, rounded
            low = parameter.data
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    low = parameter.data.clone()
            assert torch.equal(low.to(torch.float32), tensors[name].to(low.dtype).to(torch.float32)), name
    state = set(model._non_persistent_buffers_set)
    for name, value in model.named_buffers():
        if name not in state:
            tensors[name] = value.detach().clone().contiguous()
    return tensors, frozen, tied


# ---------------------------------------------------------------- the launcher
def one(folder, release, variant, out):
    target = out / release / variant
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = [str(folder / f"ds-{release}")]
    if tuple(map(int, release.split(".")[:2])) < (0, 11):
        path.append(str(folder / "pyd1"))
    running = []
    for rank in range(2):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                       "DS_BUILD_OPS": "0", "TORCH_EXTENSIONS_DIR": str(folder / "ext" / release), "DS_IGNORE_CUDA_DETECTION": "1"}
        log = open(folder / f"log-{release}-{variant}-{rank}.txt", "w")
        running.append(subprocess.Popen([sys.executable, __file__, "--worker", variant, "--out", str(target)], env=environment,
                                        stdout=log, stderr=subprocess.STDOUT, cwd=str(folder)))
    try:
        codes = [process.wait(timeout=240) for process in running]
    except subprocess.TimeoutExpired:
        codes = ["timeout"]
    for process in running:
        process.kill()
    for file in sorted(target.rglob("*")):
        if file.is_file() and not any(file.match(p) for p in (*KEEP, "truth.*")):
            file.unlink()
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(release, variant, "ok" if codes == [0, 0] else f"FAILED {codes}", size, flush=True)
    if codes != [0, 0]:
        shutil.rmtree(target)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ds", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--release", nargs="*", default=["0.9.5", "0.10.3", "0.12.6", "0.14.5", "0.16.9", "0.18.9"])
    parser.add_argument("--variant", nargs="*", default=list(VARIANTS))
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.out)
        return
    for release in arguments.release:
        for variant in arguments.variant:
            one(arguments.ds.resolve(), release, variant, arguments.out.resolve())


if __name__ == "__main__":
    main()
