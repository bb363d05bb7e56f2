"""Where in a checkpoint's file a network's tensors are: training loops save them beside others, wrapped in modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bdtool.models.checkpoint_formats import BLOCKDROP, detect_format

POLICY_ENTRIES = ("agent", "net")  # "net" is what the authors' older files call the policy network
_WRAPPERS = ("model_state_dict", "model", "net")  # entries that training loops put a state_dict in, beside others
_N_AVERAGED = "n_averaged"  # a counter that torch.optim.swa_utils.AveragedModel (EMA, SWA) has beside its `module`
_DEEPEST = 8  # dicts within dicts, or names in a key, that a network is looked for in
# Of DataParallel, of torch.compile, of Lightning and the like, and of transformers around timm's models:
_PREFIXES = ("module.", "_orig_mod.", "model.", "timm_model.")


def flat_entries(content: Mapping[str, Any]) -> dict[str, Any]:
    """Unwrap the state_dict, put BlockDrop's networks side by side as "resnet.conv1.weight", and drop "module."."""
    networks = {name: content[name] for name in ("resnet", *POLICY_ENTRIES) if isinstance(content.get(name), Mapping)}
    if isinstance(content.get("state_dict"), Mapping):
        flat = _bare(content["state_dict"])
    elif wrapped := _only_wrapper(content):
        flat = wrapped
    elif networks:  # beside them lie the authors' epoch, reward and accuracy
        flat = {f"{name}.{key}": value for name, network in networks.items() for key, value in _bare(network).items()}
    else:
        flat = _bare(content)
    return {re.sub(r"^((?:resnet|agent|net)\.)?(?:module\.)+", r"\1", key): value for key, value in flat.items()}


def _only_wrapper(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the network of a known layout in the wrappers of a checkpoint, where there is one, and not BlockDrop's."""
    states = [_bare(content[name]) for name in _WRAPPERS if isinstance(content.get(name), Mapping)]
    networks = [state for state in states if detect_format(state)]
    return networks[0] if len(networks) == 1 and not {"resnet", "agent"} & content.keys() else None


def _bare(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Drop from the keys what all of them begin with, where that says how the network was wrapped."""
    bare = {str(key): value for key, value in state.items()}
    if all(key.startswith("module.") for key in bare.keys() - {_N_AVERAGED}):
        bare.pop(_N_AVERAGED, None)
    while prefix := next((one for one in _PREFIXES if bare and all(key.startswith(one) for key in bare)), None):
        bare = {key.removeprefix(prefix): value for key, value in bare.items()}
    return _network_named_net(bare) or bare


def _network_named_net(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the network of a known layout that a module holds as `net`, as Lightning's often do.

    BlockDrop's older files have a policy network under that name, which is none.
    """
    if not state or not all(key.startswith("net.") for key in state):
        return None
    network = _bare({key.removeprefix("net."): value for key, value in state.items()})
    return network if detect_format(network) not in (None, BLOCKDROP) else None


def entries_below(content: Mapping[str, Any], entry: str) -> dict[str, Any]:
    """Return what lies in `entry` ("model_ema", "state_dict.model"), by dicts or by keys; {} where nothing does."""
    for key, value in content.items():
        if isinstance(value, Mapping) and f"{entry}.".startswith(f"{key}."):
            rest = entry[len(key) + 1 :]
            return entries_below(value, rest) if rest else dict(value)
    start = f"{entry}."
    return {key.removeprefix(start): value for key, value in content.items() if key.startswith(start)}


def entries_with_networks(content: Mapping[str, Any]) -> list[str]:
    """Return the entries below which lie networks of known layouts, without those that lie within another of them."""
    within: dict[str, set[str]] = {}
    for key, _ in _dotted(content):
        names = key.split(".")[: _DEEPEST + 1]
        for n in range(1, len(names)):
            within.setdefault(".".join(names[:n]), set()).add(names[n])
    found = [entry for entry, names_there in within.items() if detect_format(names_there)]
    return [entry for entry in found if not any(entry.startswith(f"{outer}.") for outer in found)]


def _dotted(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _dotted(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value
