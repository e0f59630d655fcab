"""Saves and restores a learner at the end of a round, so that a run goes on as if nothing had happened.

A checkpoint is one safetensors file with the student, the optimizer and the random stream, a shard of the replay for
every round, and `checkpoint.json`, written last, which says which files belong together by their sha256. Until it is
replaced the checkpoint before it is whole. Nothing in it is a pickle.
"""

import hashlib
import io
import json
from collections.abc import Collection, Mapping
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
KEYS = ("round", "num_updates", "num_states", "envs", "starts")


def save_checkpoint(learner: Learner, folder: Path) -> None:
    """Writes the learner's last round into `folder`: its new states as a shard, the rest whole.

    Raises:
        OSError: no room or no permission; the checkpoint before stays valid.
    """
    manifest: dict[str, Any] = {"round": 0, "files": {}, "num_states": 0}
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder, KEYS)
    if manifest["num_states"] > len(learner.replay):
        raise ValueError(f"{folder}: holds the checkpoints of another run; give another folder")
    first_new = max(manifest["num_states"], learner.replay.num_given)
    files = {}
    if first_new < len(learner.replay):
        files[f"replay-{learner.round:04d}.npz"] = compressed(learner.replay.arrays(first_new))
    tensors: dict[str, Tensor] = {f"student.{k}": v for k, v in learner.student.state_dict().items()}
    tensors |= optimizer_tensors(learner.optimizer)
    tensors["generator"] = learner.generator.get_state()
    commit(
        folder,
        {**files, f"learner-{learner.round:04d}.safetensors": packed(tensors)},
        kept={k: v for k, v in manifest["files"].items() if k.startswith("replay-")},
        about={
            "round": learner.round,
            "num_updates": learner.num_updates,
            "num_states": len(learner.replay),
            "envs": learner.envs.state(),
            "starts": learner.starts_B.tolist(),
        },
    )


def restore_checkpoint(learner: Learner, folder: Path) -> None:
    """Brings a fresh learner to where `save_checkpoint` saw one: weights, optimizer, replay, games, random stream.

    Raises:
        ValueError: no checkpoint, or one whose files are not those that were saved.
    """
    manifest = read_manifest(folder, KEYS)
    for name in sorted(n for n in manifest["files"] if n.startswith("replay-")):
        learner.replay.extend(read_shard(folder, name, manifest))
    tensors = load_tensors(read_file(folder, f"learner-{manifest['round']:04d}.safetensors", manifest))
    learner.student.load_state_dict(
        {k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")}
    )
    restore_optimizer(learner.optimizer, tensors)
    learner.obs = learner.envs.restore(manifest["envs"])
    learner.starts_B = torch.tensor(manifest["starts"])
    learner.round, learner.num_updates = manifest["round"], manifest["num_updates"]
    learner.generator.set_state(tensors["generator"])


def commit(folder: Path, files: Mapping[str, bytes], *, kept: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Writes `files`, then the manifest that makes them the checkpoint, then removes what it does not name.

    Args:
        folder: where the checkpoint lives; made if it is missing.
        files: name -> content of what is new.
        kept: name -> sha256 of the files of the checkpoint before that belong to this one too.
        about: what else the manifest says, JSON.

    Raises:
        OSError: no room or no permission; the checkpoint before stays valid.
    """
    hashes = dict(kept)
    for name, content in files.items():
        write_atomically(folder / name, content)
        hashes[name] = hashlib.sha256(content).hexdigest()
    write_atomically(folder / MANIFEST, json.dumps({"format": FORMAT, **about, "files": hashes}).encode())
    for stale in set(folder.iterdir()) - {folder / name for name in [*hashes, MANIFEST]}:
        if stale.is_file():
            stale.unlink()


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns tensors as the content of a safetensors file."""
    return save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def compressed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns arrays as the content of a compressed .npz file."""
    shard = io.BytesIO()
    np.savez_compressed(shard, **arrays)  # type: ignore[arg-type]
    return shard.getvalue()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state under names `optimizer.<parameter>.<slot>`."""
    slots = optimizer.state_dict()["state"].items()
    return {f"optimizer.{index}.{key}": torch.as_tensor(v) for index, slot in slots for key, v in slot.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_tensors` returned."""
    state = optimizer.state_dict()
    state["state"] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            weights = parameters[int(index)]
            if tensor.shape == weights.shape:  # in the weights' memory format: fused Adam pairs them as they lie
                tensor = torch.empty_like(weights).copy_(tensor)
            state["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(state)


def read_manifest(folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """Returns a checkpoint's manifest, which has all of `keys`.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: no checkpoint to resume from; start the run without --resume")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"{folder}: checkpoint of format {manifest['format']}, this policykd reads {FORMAT}; update it"
            )
        if missing := {*keys, "files"} - manifest.keys():
            raise KeyError(", ".join(sorted(missing)))
    except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST}: cannot be read ({error}); start a new run") from error
    return manifest


def read_shard(folder: Path, name: str, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of one of a checkpoint's .npz files."""
    with np.load(io.BytesIO(read_file(folder, name, manifest)), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def read_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """Returns one of a checkpoint's files.

    Raises:
        ValueError: missing, or not what was saved.
    """
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder / name}: {error.strerror}; the checkpoint is incomplete, start a new run") from error
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
        raise ValueError(
            f"{folder / name}: not what was saved (sha256 differs); the checkpoint is damaged, start a new run"
        )
    return content
