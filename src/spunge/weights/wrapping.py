"""Names that what runs a model has written into its checkpoint: torch.compile, DDP, DeepSpeed, FSDP."""

from collections.abc import Collection

# The name that each gives to the module that it wraps -> who does.
INSIDE = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
FIRST = {"module": "DDP or DeepSpeed"}  # before every name, and nowhere else: a model may have a module of that name


def unwrapped(names: Collection[str]) -> dict[str, str]:
    """Each name -> the one that the model itself has for it. Where two would become one, all stay as they are."""
    parts = {name: [part for part in name.split(".") if part not in INSIDE] for name in names}
    while parts and all(len(each) > 1 and each[0] in FIRST for each in parts.values()):
        parts = {name: each[1:] for name, each in parts.items()}
    plain = {name: ".".join(each) for name, each in parts.items()}
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in names}


def wrappers(names: Collection[str]) -> str:
    """What the names bear, in a few words; empty where they bear nothing of the kind."""
    if all(name == plain for name, plain in unwrapped(names).items()):
        return ""
    there = {part for name in names for part in name.split(".")}
    first = {next((part for part in name.split(".") if part not in INSIDE), "") for name in names}
    marks = [mark for mark in INSIDE if mark in there] + [mark for mark in FIRST if first == {mark}]
    return " and ".join(f"{mark}. of {(INSIDE | FIRST)[mark]}" for mark in marks)
