"""Saves and restores a learner at the end of a round, so that a run goes on as if nothing had happened.

A checkpoint is one safetensors file with the student, the optimizer and the random stream, a shard of the replay for
every round, and `checkpoint.json`, written last, which says which files belong together by their sha256. Until it is
replaced the checkpoint before it is whole. Nothing in it is a pickle.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from policykd.agents.files import write_atomically
from policykd.distill import Learner

FORMAT = 1
MANIFEST = "checkpoint.json"


def save_checkpoint(learner: Learner, folder: Path) -> None:
    """Writes the learner's last round into `folder`: its new states as a shard, the rest whole.

    Raises:
        OSError: no room or no permission; the checkpoint before stays valid.
    """
    manifest: dict[str, Any] = {"round": 0, "files": {}, "num_states": 0}
    if (folder / MANIFEST).is_file():
        manifest = _manifest(folder)
    if manifest["num_states"] > len(learner.replay):
        raise ValueError(f"{folder}: holds the checkpoints of another run; give another folder")
    files: dict[str, str] = {k: v for k, v in manifest["files"].items() if k.startswith("replay-")}
    shard = io.BytesIO()
    np.savez_compressed(shard, **learner.replay.arrays(manifest["num_states"]))  # type: ignore[arg-type]
    contents = {
        f"replay-{learner.round:04d}.npz": shard.getvalue(),
        f"learner-{learner.round:04d}.safetensors": _tensors(learner),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
        files[name] = hashlib.sha256(content).hexdigest()
    new = {
        "format": FORMAT,
        "round": learner.round,
        "num_updates": learner.num_updates,
        "num_states": len(learner.replay),
        "envs": learner.envs.state(),
        "starts": learner.starts_B.tolist(),
        "files": files,
    }
    write_atomically(folder / MANIFEST, json.dumps(new).encode())
    for stale in set(folder.iterdir()) - {folder / name for name in [*files, MANIFEST]}:
        if stale.is_file():
            stale.unlink()


def restore_checkpoint(learner: Learner, folder: Path) -> None:
    """Brings a fresh learner to where `save_checkpoint` saw one: weights, optimizer, replay, games, random stream.

    Raises:
        ValueError: no checkpoint, or one whose files are not those that were saved.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: no checkpoint to resume from; start the run without --resume")
    manifest = _manifest(folder)
    for name in sorted(n for n in manifest["files"] if n.startswith("replay-")):
        with np.load(io.BytesIO(_read(folder, name, manifest)), allow_pickle=False) as arrays:
            learner.replay.extend({key: arrays[key] for key in ("frames", "pasts", "scores")})
    tensors = load_tensors(_read(folder, f"learner-{manifest['round']:04d}.safetensors", manifest))
    learner.student.load_state_dict(
        {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
    )
    state = learner.optimizer.state_dict()
    state["state"] = {}
    parameters = [p for group in learner.optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            weights = parameters[int(index)]
            if tensor.shape == weights.shape:  # in the weights' memory format: fused Adam pairs them as they lie
                tensor = torch.empty_like(weights).copy_(tensor)
            state["state"].setdefault(int(index), {})[key] = tensor
    learner.optimizer.load_state_dict(state)
    learner.obs = learner.envs.restore(manifest["envs"])
    learner.starts_B = torch.tensor(manifest["starts"])
    learner.round, learner.num_updates = manifest["round"], manifest["num_updates"]
    learner.generator.set_state(tensors["generator"])


def _tensors(learner: Learner) -> bytes:
    tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in learner.student.state_dict().items()}
    for index, slots in learner.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items()}
    tensors["generator"] = learner.generator.get_state()
    return save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"{folder}: checkpoint of format {manifest['format']}, this policykd reads {FORMAT}; update it"
            )
        if missing := {"round", "num_updates", "num_states", "envs", "starts", "files"} - manifest.keys():
            raise KeyError(", ".join(sorted(missing)))
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST}: cannot be read ({error}); start a new run") from error
    return manifest


def _read(folder: Path, name: str, manifest: dict[str, Any]) -> bytes:
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder / name}: {error.strerror}; the checkpoint is incomplete, start a new run") from error
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
        raise ValueError(
            f"{folder / name}: not what was saved (sha256 differs); the checkpoint is damaged, start a new run"
        )
    return content
