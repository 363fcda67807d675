"""The verb `plan`: what a run will need and whether it fits, before anything starts."""

import argparse
import json

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cluster.config.file import load_config
from cluster.config.project import UserError
from cluster.config.schema import RunConfig
from cluster.run.plan import PartPlan, Plan, plan_run
from lm.memory import device_memory_bytes
from lm.model import device_of

# Memory of the devices that people name, GB.
DEVICES_GB = {
    **{"T4": 16, "V100": 16, "L4": 24, "A10G": 24, "RTX4090": 24, "A40": 48, "L40S": 48},
    **{"A100-40GB": 40, "A100": 80, "H100": 80, "H200": 141, "B200": 180},
}


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 where something does not fit the device that was named."""
    config = load_config(arguments.config, arguments.overrides)
    device = "this machine" if arguments.gpu is None else arguments.gpu
    plan = plan_run(config, on_gpu=arguments.gpu is not None)
    misfits = plan.misfits(
        device_memory_bytes(torch.device("cpu")) / 2**20
        if arguments.gpu is None
        else device_memory_mb(arguments.gpu)
    )
    if arguments.json:
        print(json.dumps(as_object(plan, misfits)))
    else:
        show(plan, misfits, device)
    return 1 if misfits else 0


def show_fit(config: RunConfig) -> bool:
    """Show what a run will hold of this machine's memory; whether it fits."""
    device = device_of(config.lm)
    plan = plan_run(config, on_gpu=device.type == "cuda")
    misfits = plan.misfits(device_memory_bytes(device) / 2**20)
    show(plan, misfits, f"this machine ({device.type})")
    return not misfits


def device_memory_mb(name: str) -> float:
    """MB of a device by its name or size, `L4` or `24GB`; raises UserError for another."""
    size = name.upper().removesuffix("B").removesuffix("G")
    if size.isdecimal() and int(size) > 0:
        return int(size) * 1024.0
    for device, gb in DEVICES_GB.items():
        if device.upper() == name.upper():
            return gb * 1024.0
    raise UserError(f"--gpu {name!r}: give a size such as 24GB, or one of {', '.join(DEVICES_GB)}")


def as_object(plan: Plan, misfits: list[str]) -> dict[str, object]:
    """The plan as JSON has it; megabytes are of 2^20 bytes."""
    return {
        "model": plan.model,
        "parameters": plan.parameters,
        "device": "gpu" if plan.on_gpu else "cpu",
        "parts": [_part(part) for part in plan.parts],
        "fits": not misfits,
        "misfits": misfits,
    }


def show(plan: Plan, misfits: list[str], device: str) -> None:
    console = Console()
    where = "a GPU" if plan.on_gpu else "the host"
    console.print(f"{escape(plan.model)}: {plan.parameters / 1e6:,.1f}M parameters")
    for part in plan.parts:
        console.print(f"\n{part.number} x {part.part}: {part.total_mb:,.0f} MB of {where}")
        table = Table.grid(padding=(0, 2))
        for cause, mb in part.memory_mb.items():
            table.add_row(f"    {cause}", Text(f"{mb:,.0f}", justify="right"))
        console.print(table)
        console.print(
            f"    {part.host_mb:,.0f} MB of host besides; sends and receives "
            f"{part.sent_mb:,.1f} MB a step"
        )
    for misfit in misfits:
        console.print(f"\ndoes not fit: {escape(misfit)}")
    if not misfits:
        console.print(f"\nfits {escape(device)}")


def _part(part: PartPlan) -> dict[str, object]:
    return {
        "part": part.part,
        "processes": part.number,
        "gpus": part.placement.gpus,
        "memory_mb": {cause: round(mb, 1) for cause, mb in part.memory_mb.items()},
        "total_mb": round(part.total_mb, 1),
        "host_mb": round(part.host_mb, 1),
        "sent_mb_per_step": round(part.sent_mb, 2),
    }
