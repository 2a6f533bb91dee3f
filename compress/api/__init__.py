"""The toolkit from Python: the same stages as the command line, each one call, with progress in a notebook or terminal.

    import compress

    made = compress.quantize_awq("meta-llama/Llama-3.2-1B", "out/awq", calib="notes.txt")
    report = compress.evaluate(made.out, data="held_out.txt", gate=0.98)
    print(report.outcome, {m.name: m.value for m in report.metrics})
    compress.export(made.out, target="orin")

Every error is a `compress.errors.CompressError` with one sentence. Pass `tell=compress.tell.SILENT` for silence, or a
`Tell` of your own to listen.
"""

from compress.api.judging import evaluate, export
from compress.api.loading import load_model
from compress.api.recipes import RecipeOutcome, run_recipe
from compress.api.stages import auto, distill_model, prune_model, quantize_awq, quantize_int8

__all__ = [
    "RecipeOutcome", "auto", "distill_model", "evaluate", "export", "load_model", "prune_model", "quantize_awq",
    "quantize_int8", "run_recipe",
]  # fmt: skip
