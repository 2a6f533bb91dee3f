"""AutoRound 0.16: SignRound (learned rounding and clipping), AWQ, and both.

Its own save of fake-quantized weights is not used: for a float32 model 0.16.1 restores the original values there.
The quantized weights are taken from memory. Mixed precision is off, as no bfloat16 unit is assumed.
"""

from __future__ import annotations

import importlib.metadata

import dense


def main() -> None:
    parser = dense.parser(__doc__, ("sign", "rtn", "awq", "awq+clip", "awq+sign"))
    parser.add_argument("--iters", type=int, default=200, help="steps of SignRound in each block")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()

    import torch
    from auto_round import AutoRound, AWQConfig, RTNConfig, SignRoundConfig
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    model = dense.load(options.model, torch.float32)
    rows = [torch.tensor(row) for row in dense.rows(options.ids)]
    configs = {
        "sign": lambda: SignRoundConfig(iters=options.iters),
        "rtn": lambda: RTNConfig(disable_opt_rtn=True),
        "awq": lambda: AWQConfig(),
        "awq+clip": lambda: AWQConfig(apply_clip=True),
        "awq+sign": lambda: [AWQConfig(), SignRoundConfig(iters=options.iters)],
    }
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    clock = dense.Clock()
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        scheme="W4A16",
        alg_configs=configs[options.method](),
        dataset=torch.utils.data.DataLoader(samples, batch_size=options.batch),
        seqlen=len(rows[0]),
        nsamples=len(rows),
        batch_size=options.batch,
        device_map=options.device,
        enable_torch_compile=False,
        amp=False,
        disable_model_free=True,
        bits=options.bits,
        group_size=options.group_size,
        sym=options.sym,
    )
    quantized, _ = rounder.quantize()
    cost = clock.stop()
    change = dense.write(options.model, options.out, dict(quantized.state_dict()))
    dense.report(tool="auto-round", version=importlib.metadata.version("auto-round"), **cost, **change)


if __name__ == "__main__":
    main()
