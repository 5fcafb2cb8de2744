"""Parameters and forward images/s of every backbone, and what is predicted of its training.

Published rates to hold them against (one V100, batch 128, evaluation): DINO's Table 2 gives
ResNet-50 23 M parameters and 1,237 images/s, EsViT's gives Swin-T 28 M and 808. Rates of another
machine say little; their ratio more. `--predicted` prints the table of predicted training instead
and measures nothing.
"""

import argparse
import json

import torch
from compare import claim, interleaved
from torch.utils.flop_counter import FlopCounterMode

from scale_smog.config import Recipe
from scale_smog.models import build_backbone
from scale_smog.profiling.hardware import load_hardware
from scale_smog.profiling.scaling_model import predict

BACKBONES = (("resnet50", 1), ("resnet50", 2), ("resnet50", 4), ("swin_tiny", 1))
PUBLISHED = {"resnet50": 1237, "swin_tiny": 808}
GPUS, IMAGES_A_GPU = (8, 64, 256, 1024), 64


def main() -> None:
    """Prints one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="images of 64 px, x1 and Swin-T only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--predicted", action="store_true", help="predict training; no timing")
    parser.add_argument("--hardware", default="h200", help="machine to predict for")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.predicted:
        print_predictions(arguments.hardware)
    else:
        measure(arguments.quick, 2 if arguments.quick else arguments.repeats)


def measure(quick: bool, repeats: int) -> None:
    """Forward passes in float32 on a CPU, in bf16 on a GPU; channels_last."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    batch, px = (2, 64) if quick else (128 if device.type == "cuda" else 8, 224)
    sides, rows = {}, {}
    for name, width in BACKBONES:
        if quick and width > 1:
            continue
        net = build_backbone(name, width).to(device).eval()
        num = max(1, batch // width**2)
        images = torch.randn(num, 3, px, px, device=device)
        images = images.contiguous(memory_format=torch.channels_last)

        def run(net: torch.nn.Module = net, images: torch.Tensor = images) -> None:
            on_gpu = device.type == "cuda"
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                net(images)
            if on_gpu:
                torch.cuda.synchronize()

        sides[f"{name} x{width}"] = run
        with torch.device("meta"):
            meta, image = build_backbone(name, width), torch.empty(2, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            meta(image)
        flops = counter.get_total_flops() / len(image)
        rows[f"{name} x{width}"] = (num, sum(p.numel() for p in net.parameters()), flops)
    seconds = interleaved(sides, repeats)
    print(
        "| backbone | parameters, M | GFLOP forward, 224 px | forward images/s |\n|---|---|---|---|"
    )
    rates = {}
    for name, (num, parameters, flops) in rows.items():
        rates[name] = num / seconds[name]
        print(f"| {name} | {parameters / 1e6:.2f} | {flops / 1e9:.1f} | {rates[name]:.1f} |")
    text = f"Swin-T's forward images/s over ResNet-50's, {device.type}, against one V100's"
    ours = rates["swin_tiny x1"] / rates["resnet50 x1"]
    published = PUBLISHED["swin_tiny"] / PUBLISHED["resnet50"]
    claim(text, ours, published, higher_is_better=True)


def print_predictions(hardware: str) -> None:
    """Images/s and efficiency on many GPUs, as Markdown."""
    machine = load_hardware(hardware)
    print(f"PREDICTED for {machine.name}, {IMAGES_A_GPU} images of 2 x 224 px a GPU, ddp, bf16:")
    print("thousand images/s (low to high) and efficiency; batch norm over a node | all GPUs\n")
    print("| backbone | " + " | ".join(f"{gpus} GPUs" for gpus in GPUS) + " |")
    print("|---" * (len(GPUS) + 1) + "|")
    efficiency = {}
    for name, width in BACKBONES:
        recipe = Recipe.model_validate(
            {
                "run": {"epochs": 1},
                "data": {"path": ""},
                "model": {"backbone": name, "width": width, "dim": 256 if "swin" in name else 128},
            }
        )
        cells = []
        for gpus in GPUS:
            at_node, at_all = (
                predict(recipe, machine, gpus, "ddp", scope, IMAGES_A_GPU)
                for scope in ("node", "global")
            )
            low, nominal, high = (x / 1000 for x in at_node.images_per_s)
            cells.append(
                f"{nominal:,.0f} ({low:,.0f}–{high:,.0f}) {at_node.efficiency:.0%}; "
                f"{at_all.images_per_s[1] / 1000:,.0f} {at_all.efficiency:.0%}"
            )
            efficiency[name, width, gpus] = at_node.efficiency, at_all.efficiency
        print(f"| {name} x{width} | " + " | ".join(cells) + " |")
    ours, peer = efficiency["resnet50", 1, 64]
    text = "predicted efficiency of ResNet-50 x1 on 64 GPUs, batch norm over a node against all"
    print(json.dumps({"claim": text, "ours": ours, "peer": peer, "ratio": round(ours / peer, 3)}))


if __name__ == "__main__":
    main()
