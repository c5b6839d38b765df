"""What can be merged, and what is refused before anything is written. PEFT's own merge is the oracle for adapters."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from making import delta_source, noise, read, weights, write_checkpoint
from spunge.errors import RecipeError
from spunge.merging.engine import merge
from spunge.merging.rules import TiesSettings
from spunge.weights.opening import open_source
from spunge.weights.sources import CheckpointSource, DeltaSource

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(kind: str = "llama", **values):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    else:
        config = transformers.AutoConfig.for_model(kind, **TINY, **values)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_every_kind_of_source_is_told_by_its_files(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    delta_source(tmp_path / "d", base, {"a.weight": noise(1, 24, 32)})
    assert isinstance(open_source(tmp_path / "d", base), DeltaSource)
    assert isinstance(open_source(base, base), CheckpointSource)
    with pytest.raises(RecipeError, match="no folder"):
        open_source(tmp_path / "nothing", base)


def test_a_sharded_model_reads_like_a_whole_one(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    other = {name: tensor + noise(7, *tensor.shape, size=0.01).bfloat16() for name, tensor in weights().items()}
    whole, cut = write_checkpoint(tmp_path / "w", other), write_checkpoint(tmp_path / "c", other, shards=3)
    for folder in (whole, cut):
        merge(base, [open_source(folder, base)], TiesSettings(), tmp_path / f"out-{folder.name}")
    assert (tmp_path / "out-w" / "model.safetensors").read_bytes() == (
        tmp_path / "out-c" / "model.safetensors"
    ).read_bytes()


def test_tied_weights_stay_as_the_base_stores_them(tmp_path):
    for name, seed in (("base", 0), ("m", 1)):
        model = tiny(tie_word_embeddings=True)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
    # One that stores the head a second time, as some tools do.
    extra = load_file(tmp_path / "m" / "model.safetensors")
    extra["lm_head.weight"] = extra["model.embed_tokens.weight"].clone()
    save_file(extra, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    merge(tmp_path / "base", [open_source(tmp_path / "m", tmp_path / "base")], TiesSettings(), tmp_path / "out")
    assert "lm_head.weight" not in read(tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def refusal(base, folder) -> str:
    with pytest.raises(RecipeError) as error:
        merge(base, [open_source(folder, base)], TiesSettings(), base.parent / "out")
    assert "\n" not in str(error.value)
    assert not (base.parent / "out").exists()
    return str(error.value)


def test_models_that_do_not_fit_are_refused_by_name(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights(), vocab_size=40)
    fewer = {name: tensor for name, tensor in weights().items() if name != "b.weight"}
    assert "lacks tensor 'b.weight'" in refusal(base, write_checkpoint(tmp_path / "fewer", fewer))
    more = {**weights(), "c.weight": torch.ones(3)}
    assert "has tensor 'c.weight'" in refusal(base, write_checkpoint(tmp_path / "more", more))
    shape = {**weights(), "a.weight": torch.ones(32, 24)}
    assert "'a.weight' of 'shape' has shape [32, 24]" in refusal(base, write_checkpoint(tmp_path / "shape", shape))
    assert "vocabulary size 41" in refusal(base, write_checkpoint(tmp_path / "words", weights(), vocab_size=41))
    family = write_checkpoint(tmp_path / "family", weights())
    (family / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "architecture 'mamba'" in refusal(base, family)


def test_a_delta_of_another_base_is_refused(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    other = write_checkpoint(tmp_path / "other", weights(seed=5))
    delta_source(tmp_path / "d", other, {"a.weight": noise(1, 24, 32)})
    assert "made from a base with fingerprint" in refusal(base, tmp_path / "d")


@pytest.mark.parametrize("damage", ["cut", "header", "sizes", "missing"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage):
    base = write_checkpoint(tmp_path / "base", weights())
    model = write_checkpoint(tmp_path / "m", weights(seed=3), shards=2)
    shard = model / "model-1.safetensors"
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if damage == "cut":
        shard.write_bytes(content[:-10])
    elif damage == "header":
        shard.write_bytes(content[:8] + b"\xff" * 20 + content[28:])
    elif damage == "missing":
        shard.unlink()
    else:
        header = json.loads(content[8 : 8 + length])
        next(value for key, value in header.items() if key != "__metadata__")["shape"][0] += 1
        text = json.dumps(header).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert "model-1.safetensors" in refusal(base, model)


def test_other_tokens_are_noted(tmp_path):
    base = write_checkpoint(tmp_path / "base", weights())
    model = write_checkpoint(tmp_path / "m", weights(seed=3))
    for folder, vocabulary in ((base, {"a": 0}), (model, {"b": 0})):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    report = merge(base, [open_source(model, base)], TiesSettings(), tmp_path / "out")
    assert report.notes == ["the tokens of 'm' differ from the base's, whose tokenizer is kept"]


def test_tensors_that_are_no_floating_point_numbers_are_never_merged(tmp_path):
    base = write_checkpoint(tmp_path / "base", {**weights(), "table": torch.arange(4)})
    for number, dtype in enumerate((torch.bool, torch.int16, torch.int64, torch.uint8)):
        other = {**weights(seed=3), "table": torch.arange(4), "norm.bias": torch.ones(3).to(dtype)}
        folder = write_checkpoint(tmp_path / f"b{number}", {**other, "norm.weight": torch.ones(32).to(dtype)})
        assert "quantised" in refusal(base, folder)
    changed = write_checkpoint(tmp_path / "table", {**weights(seed=3), "table": torch.arange(4) + 1})
    report = merge(base, [open_source(changed, base)], TiesSettings(), tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["table"], torch.arange(4))
    assert "'table' of 'table' differs from the base's, which is kept: it is no floating-point number" in report.notes


@pytest.mark.parametrize("content", ["{", "[]", '{"model": null}'])
def test_a_damaged_tokenizer_is_refused_by_name_or_said(tmp_path, content):
    base, model = write_checkpoint(tmp_path / "base", weights()), write_checkpoint(tmp_path / "m", weights(seed=3))
    for folder, text in ((base, '{"model": {"vocab": {"a": 0}}}'), (model, content)):
        (folder / "tokenizer.json").write_text(text)
    if "model" in content:
        assert "the tokens of 'm' differ" in open_source(model, base).notes[0]
    else:
        assert "tokenizer.json in" in refusal(base, model)
