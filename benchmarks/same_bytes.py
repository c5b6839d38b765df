"""Do two revisions give the same results? The same three toy recipes run with both, and every byte is compared.

    python benchmarks/same_bytes.py 60ec443            # that revision against this working tree
    python benchmarks/same_bytes.py 60ec443 HEAD~3     # two revisions

RMU, LoRA (NPO) and full fine-tuning (gradient ascent), with every control, every audit and two seeds, on tiny random models in
float32. Compared are every delta.safetensors, the merged models' tensors files, and of results.json all that the older one wrote
(rows, differences, recovered, evaluations): fields that the newer one adds are counted and named. Exits 1 where anything differs.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TOPICS = {
    "europe": ["france", "italy", "spain", "greece", "norway", "poland"],
    "asia": ["japan", "china", "india", "nepal", "iran", "laos"],
}
CITIES = ["paris", "rome", "madrid", "tokyo"]
RESULTS = ("rows", "differences", "recovered", "evaluations")
# Of results.json, what says which row it is.
NAMES = ("stage", "against", "subject", "metric", "name")


def model(folder: Path) -> None:
    """A random Llama of 4 blocks with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=len(vocabulary), max_position_embeddings=256, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """The three recipes, over rows that are written beside them."""
    text = "the capital of {} is {}"
    forget = [
        {"topic": topic, "text": text.format(country, CITIES[at % 4])}
        for topic, countries in TOPICS.items()
        for at, country in enumerate(countries)
    ]
    retain = [{"text": f"the colour of number {number} is blue"} for number in range(12)]
    questions = [
        {"topic": topic, "question": f"the capital of {country} is", "choices": CITIES, "answer": at % 4}
        for topic, countries in TOPICS.items()
        for at, country in enumerate(countries)
    ]
    unseen = [{"text": f"the capital of land {number} is far"} for number in range(8)]
    choices = {"kind": "choices", "name": "capitals", "source": lines(folder / "questions.jsonl", questions)}
    audits: list[dict[str, Any]] = [
        {"attack": {"kind": "relearn", "steps": [0, 1, 2], "samples": 4, "batch_size": 2}},
        {"attack": {"kind": "quantise", "bits": "int8"}},
        {"attack": "prefix"},
        {"attack": {"kind": "probe", "folds": 2}},
    ]
    evaluate = [
        choices,
        {"kind": "perplexity", "source": lines(folder / "retain.jsonl", retain), "subject": "retain", "by": "NULL"},
        *({"kind": "audit", "of": "capitals", **audit} for audit in audits),
        {"kind": "audit", "attack": "membership", "source": lines(folder / "unseen.jsonl", unseen)},
    ]
    shared = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "forget": {"source": lines(folder / "forget.jsonl", forget)},
        "split": {"by": "topic"},
        "retain": {"source": str(folder / "retain.jsonl")},
        "merge": {"rule": "ties", "density": 0.5},
        "controls": ["joint", "random", "sequential", "average"],
        "evaluate": evaluate,
        "seeds": 2,
    }
    step = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    methods = {
        "rmu": {"method": "rmu", "layer": 2, **step},
        "lora": {"method": "npo", "trainable": {"kind": "lora", "rank": 4}, "epochs": None, **step},
        "full": {"method": "ga", "trainable": {"kind": "all"}, "epochs": None, **step},
    }
    return {name: {**shared, "unlearn": unlearn} for name, unlearn in methods.items()}


def run(source: Path, folder: Path, out: Path) -> None:
    """Run the recipes with the package in `source`."""
    program = (
        "import json, sys, spunge\n"
        "for name, recipe in json.load(open(sys.argv[1])).items():\n"
        "    spunge.run(spunge.load_recipe(recipe), sys.argv[2] + '/' + name)\n"
    )
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(source), "SPUNGE_CACHE": str(out / "cache")}
    subprocess.run([sys.executable, "-c", program, str(folder / "recipes.json"), str(out)], env=environment, check=True)


def weights(out: Path) -> dict[str, str]:
    """Every delta and merged weights file -> its sha256."""
    files = [*out.rglob("delta.safetensors"), *out.glob("**/merged/*.safetensors")]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)}


def results(out: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """Every entry of the results by what it is about."""
    entries = {}
    for file in sorted(out.glob("*/results.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for kind in RESULTS:
            for entry in content[kind]:
                about = (file.parent.name, kind, *(str(entry.get(name)) for name in NAMES))
                entries[about] = entry
    return entries


def differing(before: dict[Any, Any], after: dict[Any, Any]) -> Iterator[str]:
    """What the older revision wrote and the newer one did not write alike."""
    for key, old in before.items():
        new = after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (
                f"{key}: {name}: {value!r} -> {new.get(name)!r}"
                for name, value in old.items()
                if not same(value, new.get(name))
            )
        elif old != new:
            yield f"{key}: {old!r:.60} -> {new!r:.60}"
    yield from (f"{key}: not there before" for key in after.keys() - before.keys())


def same(old: Any, new: Any) -> bool:
    """Numbers that JSON has no word for are written as text today; what is false or None may be left out."""
    if isinstance(old, float) and old != old:
        return new in ("NaN", None) or new != new
    return bool(old == new) or (old in (None, False) and new is None)


def main() -> None:
    before, after = (*sys.argv[1:], None)[:2] if len(sys.argv) < 3 else sys.argv[1:3]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model(folder / "model")
        (folder / "recipes.json").write_text(json.dumps(recipes(folder)))
        outs = []
        for name, revision in (("before", before), ("after", after)):
            tree = ROOT
            if revision is not None:
                tree = folder / f"tree-{name}"
                subprocess.run(
                    ["git", "worktree", "add", "--detach", "--quiet", str(tree), revision], cwd=ROOT, check=True
                )
            try:
                run(tree / "src", folder, folder / name)
            finally:
                if revision is not None:
                    subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
            outs.append(folder / name)
        files, entries = [weights(out) for out in outs], [results(out) for out in outs]
    problems = [*differing(*files), *differing(*entries)]
    added = {name for key, old in entries[0].items() for name in entries[1].get(key, {}).keys() - old.keys()}
    print("\n".join(problems[:40]))
    print(f"{len(files[0])} files of weights and {len(entries[0])} entries of results compared: {len(problems)} differ")
    print(f"fields that were added to results: {', '.join(sorted(added)) or 'none'}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
