"""Downloads that attack what shows them: pages for the browser, the model card, JSON, and the log of ``watch``."""

from __future__ import annotations

import json
from pathlib import Path

from attacks.downloads import ESCAPES, Download, folder, model_states, safetensors, weights

MARKUP = (
    "</script><img src=x onerror=alert(1)></title></style>--><a href='javascript:alert(1)'>x</a>"
    '"><svg onload=alert(1)>%{x}${x}`![y](//evil.example/t.png)|[z](javascript:alert(1))\u2028'
)
PAGES = ("inspect ckpt --html page.html", "diff ckpt outside --html page.html")


def odd_names(box: Path) -> None:
    names = (MARKUP, f"layers.0.{MARKUP}", f"{MARKUP}.1.weight", "².3.weight", "a", "a.b", "a..b", ".", "layers.٣.w")
    folder(box, model_safetensors=safetensors(dict.fromkeys(names, 1.0), {"format": MARKUP}))
    (box / "outside" / "model.safetensors").write_bytes(safetensors(dict.fromkeys(names, 666.0)))


def odd_values(box: Path) -> None:
    made = weights(box)
    odd = {"architectures": [MARKUP], "model_type": MARKUP, "torch_dtype": MARKUP, "auto_map": {MARKUP: MARKUP}}
    (made / "config.json").write_text(json.dumps(odd))
    (made / "adapter_config.json").write_text(json.dumps({"peft_type": MARKUP}))
    (made / "README.md").write_text(f"---\nlicense: {MARKUP}\n---\n{MARKUP}")


def odd_files(box: Path) -> None:
    name = MARKUP.replace("/", "∕")
    index = {"weight_map": {"a": f"{name}-1.safetensors", "b": f"{name}-2.safetensors"}}
    made = folder(box)
    for tensor, file in index["weight_map"].items():
        (made / file).write_bytes(safetensors({tensor: 1.0}))
    (made / "model.safetensors.index.json").write_text(json.dumps(index))


def odd_tag(box: Path) -> None:
    model_states()(box)
    tag = f"step{MARKUP}{ESCAPES}".replace("/", "∕")
    (box / "ckpt" / "step").rename(box / "ckpt" / tag[:60])
    (box / "ckpt" / "latest").write_text(tag[:60])


def deep(depth: int, name: str, inner: str = '"a":') -> str:
    """Return a JSON object of ``depth`` objects in each other under ``name``."""
    return f'{{"{name}": ' + f"{{{inner}" * depth + "1" + "}" * depth


def deep_config(box: Path) -> None:
    """Nest as deep as the parser just allows, but nobody who walks the value afterwards."""
    made = weights(box)
    (made / "config.json").write_text(deep(960, "model_type") + ', "architectures": ["LlamaForCausalLM"]}')
    (made / "adapter_config.json").write_text(deep(940, "x") + ', "peft_type": "LORA", "inference_mode": false}')


def dotted(box: Path) -> None:
    """Name 40 tensors with 2,000 dots each, and 40 with 4,000 digits."""
    names = [f"{at}" + ".a" * 2000 for at in range(40)] + [f"{at:02}" + "1" * 4000 for at in range(40)]
    folder(box, model_safetensors=safetensors(dict.fromkeys(names, 1.0)))
    (box / "outside" / "model.safetensors").write_bytes(safetensors(dict.fromkeys(names, 666.0)))


def crossed(box: Path) -> None:
    """Give each of 3,000 tensors a layer and a kind of its own, so that a map of all of them has 9 million cells."""
    names = [f"layer.{at}.kind{at}" for at in range(3000)]
    folder(box, model_safetensors=safetensors(dict.fromkeys(names, 1.0)))
    (box / "outside" / "model.safetensors").write_bytes(safetensors(dict.fromkeys(names, 666.0)))


DISPLAYS = [
    Download(
        "names of tensors are markup", odd_names, (*PAGES, "inspect ckpt --json --values", "merge ckpt out --json")
    ),
    Download("values of configurations are markup", odd_values, ("inspect ckpt --html page.html", "merge ckpt out")),
    Download(
        "names of files are markup", odd_files, ("inspect ckpt --html page.html", "push ckpt org/x --dry-run --json")
    ),
    Download(
        "a tag is markup and escapes",
        odd_tag,
        ("inspect ckpt --html page.html", "watch ckpt --push-to-hub org/x --once"),
    ),
    Download(
        "configurations nested 940 and 960 deep",
        deep_config,
        ("merge ckpt out --adapter", "merge ckpt out2 --names hf"),
    ),
    Download("names of 2,000 dots and of 4,000 digits", dotted, PAGES),
    Download("each tensor has a layer and a kind of its own", crossed, PAGES),
]
