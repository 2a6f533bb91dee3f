"""AutoAWQ 0.2.9: scale search, and range search with `--clip 1`.

As released it destroys weights on a CPU: its search keeps a copy of each weight by `.cpu()`, which there is no
copy, and restores from it. That line is changed to clone; without `--fix 0` no figure here is of the tool as
released.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import dense


def clone_on_cpu(quantizer: Any) -> None:
    """Make the scale search of `awq.quantize.quantizer` keep real copies of the weights."""
    source = textwrap.dedent(inspect.getsource(quantizer.AwqQuantizer._compute_best_scale))
    if "v.cpu()" not in source:
        raise SystemExit("this AutoAWQ does not hold the line that is to be patched; pass --fix 0")
    exec(source.replace("v.cpu()", "v.detach().cpu().clone()"), quantizer.__dict__)
    quantizer.AwqQuantizer._compute_best_scale = quantizer.__dict__["_compute_best_scale"]


def keep_dense(quantizer: Any) -> dict[str, Any]:
    """Replace the packing step by one that fills the dictionary returned with the dequantized weights."""
    weights: dict[str, Any] = {}

    def keep(self: Any, module: Any, named_linears: dict[str, Any]) -> None:
        block = next(name for name, m in self.model.named_modules() if m is module)
        for name, linear in named_linears.items():
            weight, _, _ = self.pseudo_quantize_tensor(linear.weight.data.clone())
            weights[f"{block}.{name}.weight"] = weight.cpu().float()

    quantizer.AwqQuantizer._apply_quant = keep
    return weights


def for_transformers4(model: Path, out: Path) -> Path:
    """Copy a model folder so that transformers 4 reads it as transformers 5 does.

    4.51 knows neither `rope_parameters` nor `dtype`: it would silently use rope_theta 10000 and float32.
    """
    shutil.copytree(model, out, copy_function=shutil.copyfile)
    out.chmod(0o755)  # copytree copies the mode of a folder that may be read-only
    config = json.loads((out / "config.json").read_text())
    rope = dict(config.pop("rope_parameters", {}))
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    (out / "config.json").write_text(json.dumps(config, indent=1))
    path = out / "tokenizer_config.json"
    if path.exists():
        tokenizer = json.loads(path.read_text())
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for it
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(tokenizer, indent=1))
    return out


def main() -> None:
    parser = dense.parser(__doc__, ("awq",))
    parser.add_argument("--clip", type=int, choices=(0, 1), default=1)
    parser.add_argument("--fix", type=int, choices=(0, 1), default=1)
    options = parser.parse_args()

    import awq.quantize.quantizer as quantizer
    import torch
    import transformers
    from awq import AutoAWQForCausalLM

    torch.manual_seed(0)
    rows = dense.rows(options.ids)
    quantizer.get_calib_dataset = lambda **_: [torch.tensor([row]) for row in rows]
    if options.fix:
        clone_on_cpu(quantizer)
    weights = keep_dense(quantizer)
    with tempfile.TemporaryDirectory() as temporary:
        source = options.model
        if transformers.__version__.startswith("4."):
            source = for_transformers4(options.model, Path(temporary) / "model")
        model = AutoAWQForCausalLM.from_pretrained(
            str(source), device_map="cpu", torch_dtype=torch.float32, safetensors=True
        )
        encode = transformers.AutoTokenizer.from_pretrained(source)
        clock = dense.Clock()
        model.quantize(
            encode,
            quant_config={
                "zero_point": not options.sym,
                "q_group_size": options.group_size,
                "w_bit": options.bits,
                "version": "GEMM",
            },
            calib_data="replaced above",
            max_calib_samples=len(rows),
            max_calib_seq_len=len(rows[0]),
            apply_clip=bool(options.clip),
            n_parallel_calib_samples=None,
            max_chunk_memory=2**30,
        )
        cost = clock.stop()
    tensors = dict(model.model.named_parameters()) | weights
    change = dense.write(options.model, options.out, tensors)
    dense.report(tool="autoawq", version=importlib.metadata.version("autoawq"), **cost, **change)


if __name__ == "__main__":
    main()
