"""What answers are about, as far as it can be seen without weights: data, models and devices."""

import os
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig

from mmkd.data.source_description import describe
from mmkd.errors import UserError, first_line
from mmkd.preflight.costs import device_memory
from mmkd.preflight.doctor import quiet
from mmkd.preflight.hardware import DEVICES, GIB, HERE, Device, choose_device

from .init_tasks import Task

NONE = "none"
OPEN_CLIP = "open_clip:"
"""Names of teachers that another library loads begin so."""


class DeviceChoice:
    """Devices by what a user says of them."""

    @property
    def here(self) -> str:
        """The answer that names the device of this machine."""
        return f"{device_memory()[1] / GIB:.0f}" if torch.cuda.is_available() else NONE

    def check(self, text: str) -> str:
        """The answer itself. Raises UserError for one that names no device."""
        self.device(text)
        return text

    def device(self, text: str) -> Device:
        """The device that an answer names, for an estimate of memory."""
        word = text.strip()
        if word.lower() in (NONE, "cpu", "0"):
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return Device(f"a CPU with {memory / GIB:.0f} GiB", memory, 1e11, 1e9, 0.4, "cpu", "fp32")
        number = word.lower().removesuffix("gib").removesuffix("gb").strip()
        if number.replace(".", "", 1).isdecimal():
            return replace(choose_device(None, float(number), None), name=f"a GPU of {number} GiB")
        if word == HERE:
            return self.device(self.here)
        name = next((name for name in DEVICES if name.lower() == word.lower()), None)
        if name is None:
            raise UserError(
                f"{text!r} is no device: give its memory in GiB, such as 24, one of {', '.join(DEVICES)}, or {NONE}."
            )
        return replace(DEVICES[name], name=f"one {name}")


def config_of(name: str, role: str) -> Any:
    """The config of a model. Raises UserError when it cannot be loaded."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise UserError(
            f"The {role} {name!r} cannot be loaded: it is neither a folder here nor a Hub id that can be reached. "
            f"Check the spelling, the network and your login ({reason})"
        ) from error


def check_model(name: str, role: str, task: Task) -> str:
    """The name itself. Raises UserError for a model that cannot be loaded or is of no use for the task."""
    if name.startswith(OPEN_CLIP) and task.name == "classify":
        return name
    config = config_of(name, role)
    if task.images == "needed" and not hasattr(config, "vision_config"):
        raise UserError(
            f"The {role} {name} reads text only. Name a vision-language model; `mmkd recipes show "
            "llava_kd/qwen1.5_4b_to_0.5b` shows how one is made of a vision tower and a language model."
        )
    return name


def layers_of(name: str) -> int:
    """How many layers the language model of a teacher has."""
    return int(config_of(name, "teacher").get_text_config().num_hidden_layers)


def look_at_data(source: str) -> tuple[str, str]:
    """The task that data are for, and what they are in a sentence. Raises UserError for data that cannot be read."""
    with quiet():
        described = describe(source)
    rows = ", ".join(f"{count:,} {split}" for split, count in described.rows.items())
    classes = f", {len(described.class_names)} classes" if described.class_names else ""
    sentence = f"{source}: {described.spoken} ({rows} rows{classes})."
    if described.kind in ("class_folders", "classes"):
        return "classify", sentence
    if described.has_images:
        return "vlm", sentence
    return "on-policy" if described.kind == "prompts_only" else "text", sentence
