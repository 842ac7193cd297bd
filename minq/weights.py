"""A published checkpoint's files: config.json and its tensors, taken one by one, so that nothing is forgotten.

    tensors, sha256 = read_weights(folder)
    source = Source(folder, read_json(folder / "config.json"), tensors)
    source.take("embeddings.word_embeddings.weight"), ..., source.require_nothing_left()

Whatever is broken or foreign raises UserError in one line that names the file, the tensor or the setting.
"""
import hashlib
import json
import re
import warnings
from pathlib import Path

import torch

from minq.errors import UserError


def read_json(path):
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is no JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected an object")
    return content


def read_weights(folder):
    """({name: tensor}, SHA-256 of the files) of model.safetensors, its shards, or pytorch_model.bin."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
                raise UserError(f"{index}: names no shards in its weight_map")
            paths = [folder / shard for shard in sorted(set(shards.values()))]
        elif (folder / name).exists():
            paths = [folder / name]
        else:
            continue
        tensors, digest = {}, hashlib.sha256()
        for path in paths:
            tensors |= read_tensors(path)
            digest.update(path.read_bytes())
        return tensors, digest.hexdigest()
    raise UserError(f"{folder}: no weights; expected model.safetensors (or its shards) or pytorch_model.bin")


def read_tensors(path):
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            tensors = load_file(path)
        else:
            with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in tensors.items()):
            raise TypeError
    except ImportError:
        raise UserError(f"{path}: needs safetensors: pip install -e '.[pretrained]'") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, but its index names it") from None
    except Exception:  # bytes that are no checkpoint raise anything
        raise UserError(f"{path}: truncated, or not a file of weights") from None
    return tensors


class Source:
    """The tensors of a checkpoint, taken one by one; what is left in the end has no place in minq's model."""

    def __init__(self, name, config, tensors):
        self.name, self.config, self.origin = name, config, {}
        # prefixes by which a model with a head differs from one without, and names of the TensorFlow age
        clean = lambda key: re.sub(r"^(bert|vit|model)\.|^decoder\.", "", re.sub(r"^model\.decoder\.", "", key))
        self.tensors = {clean(key).replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"):
                        tensor for key, tensor in tensors.items()}
        if len(self.tensors) < len(tensors):
            raise UserError(f"{name}: has a tensor twice, with and without its model's prefix, or under its old name, too")

    def setting(self, key, kind=int, default=None):
        value = self.config.get(key, default)
        if type(value) is int and kind is float:
            value = float(value)
        if type(value) is not kind or kind in (int, float) and not 0 < value < 1e6:
            raise UserError(f"{self.name}: config.json: {key} is {value!r}; expected a {kind.__name__}")
        return value

    def require(self, key, *allowed, default=None):
        value = self.config.get(key, allowed[0] if default is None else default)
        if value not in allowed:
            raise UserError(f"{self.name}: config.json: {key} is {value!r}; expected {' or '.join(map(repr, allowed))}")
        return value

    def length(self, seq_len, default):
        """T: as --seq-len asks, or the default, or all that there are."""
        most = self.setting("max_position_embeddings")
        if seq_len and seq_len > most:
            raise UserError(f"--seq-len {seq_len}: the model has {most} positions")
        return seq_len or min(default, most)

    def take(self, *keys, into=None):
        """The tensors of these names, stacked, in float32."""
        missing = [key for key in keys if key not in self.tensors]
        if missing:
            raise UserError(f"{self.name}: has no tensor {missing[0]}")
        taken = [self.tensors.pop(key) for key in keys]
        for key, tensor in zip(keys, taken):
            if not tensor.is_floating_point():
                raise UserError(f"{self.name}: {key} is {tensor.dtype}; expected floating point")
            if not tensor.isfinite().all():
                raise UserError(f"{self.name}: {key} holds values that are not finite; expected a trained model")
            if tensor.shape[1:] != taken[0].shape[1:] or tensor.dim() == 0:
                raise UserError(f"{self.name}: {key} has shape {tuple(tensor.shape)}, {keys[0]} {tuple(taken[0].shape)}")
        self.origin[into] = keys[0]
        return torch.cat([tensor.float() for tensor in taken])

    def table(self, key, into):
        """A tensor (1, n, width), without its first dimension."""
        tensor = self.take(key, into=into)
        if tensor.dim() != 3 or len(tensor) != 1:
            raise UserError(f"{self.name}: {key} has shape {tuple(tensor.shape)}; expected (1, n, width)")
        return tensor[0]

    def modules(self, names, ours="", theirs=""):
        """A state dict of weights and biases. names: ours -> theirs, or a tuple of theirs to be stacked."""
        state = {}
        for name, others in names.items():
            others = (others,) if isinstance(others, str) else others
            for part in ("weight", "bias"):
                into = f"{ours}{name}.{part}"
                state[into] = self.take(*(f"{theirs}{other}.{part}" for other in others), into=into)
        return state

    def layers(self, names, prefix, n):
        found = {int(match[1]) for key in self.tensors if (match := re.match(re.escape(prefix) + r"(\d{1,4})\.", key))}
        if found != set(range(n)):
            raise UserError(f"{self.name}: has {len(found)} layers; config.json says {n}")
        state = {}
        for i in range(n):
            state |= self.modules(names, f"layers.{i}.", f"{prefix}{i}.")
        return state

    def drop(self, pattern):
        self.tensors = {key: tensor for key, tensor in self.tensors.items() if not re.match(pattern, key)}

    def require_nothing_left(self):
        if self.tensors:
            what = self.config.get("architectures") or self.config.get("architecture")
            what = " ".join(map(str, what)) if isinstance(what, list) else what
            raise UserError(f"{self.name}: {what} has {min(self.tensors)}, for which minq's model has no place; expected "
                            "BERT with its masked-LM head or without any, OPT for causal language modelling, or a ViT classifier")
