"""The loop over blocks: what a method is shown on two paths, against running the model twice by hand."""

from typing import Any

import torch
from torch import Tensor

from compress.block import BlockResult, LoadedBlock
from compress.blocks import Reshaping, install, stream
from compress.linear import linears, weight_OI
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme
from compress.quantize.awq_block import AwqOptions, awq_block
from compress.scheme import Scheme
from compress.statistics import Wanted

SIZES = {"intermediate_size": 128}  # of the model that `build_model` makes
IDS = torch.randint(0, 4096, (40, 64), generator=torch.Generator().manual_seed(1))  # two batches


class Kept:
    """A store in memory, which may begin with blocks of an earlier run."""

    def __init__(self, blocks: dict[int, BlockResult] | None = None) -> None:
        self.blocks = dict(blocks or {})

    def load(self, index: int) -> BlockResult | None:
        return self.blocks.get(index)

    def save(self, index: int, prefix: str, result: BlockResult) -> None:
        self.blocks[index] = result


def run(folder: Any, store: Kept, paths: int = 2) -> dict[int, dict[str, Any]]:
    """Stream the model with error feedback; what each block's method was shown, copied before the method used it."""
    model = StreamedModel.open(folder)
    options = AwqOptions(scheme=Scheme(group_size=32), effort="balanced" if paths == 2 else "fast")
    seen: dict[int, dict[str, Any]] = {}

    def method(loaded: LoadedBlock) -> BlockResult:
        seen[loaded.index] = {
            "groups": loaded.groups,
            "gram": [s.gram_II.clone() for s in loaded.statistics],
            "cross": [None if s.cross is None else s.cross.clone() for s in loaded.statistics],
            "by_output": [s.by_output for s in loaded.statistics],
            "inputs": [h.clone() for h in loaded.inputs],
            "targets": [h.clone() for h in loaded.targets],
            "check": (loaded.check_input.clone(), loaded.check_output.clone()),
        }
        plan = {loaded.prefix + name: LayerScheme(weight=options.scheme) for name in linears(loaded.module)}
        return awq_block(loaded, LayerPlan(plan), options)

    for _ in stream(model, IDS, method, store, paths=paths):
        pass
    return seen


def inputs_of(model: StreamedModel, index: int, layer: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's inputs, one row a token, and the block's output."""
    found: list[Tensor] = []
    handle = model.blocks[index].get_submodule(layer).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    out = model.run_block(index, hidden)
    handle.remove()
    return found[0].reshape(-1, found[0].shape[-1]), out


@torch.no_grad()
def test_two_paths_show_the_compressed_inputs_and_their_difference(build_model: Any) -> None:
    folder = build_model()
    store = Kept()
    seen = run(folder, store)
    model = StreamedModel.open(folder)
    original = model.embed(IDS)
    assert torch.equal(torch.cat(seen[0]["inputs"]), original)
    assert seen[0]["cross"] == [None] * len(seen[0]["groups"])  # nothing differs yet
    model.load_block(0)
    after = model.run_block(0, original)
    torch.testing.assert_close(torch.cat(seen[0]["targets"]), after)
    install(model.blocks[0], store.blocks[0])
    compressed = model.run_block(0, original)
    assert not torch.allclose(after, compressed)
    torch.testing.assert_close(torch.cat(seen[1]["inputs"]), compressed)
    model.load_block(1)
    assert seen[1]["by_output"] == [g.layers == ("mlp.down_proj",) for g in seen[1]["groups"]]
    for group, gram, cross, by_output in zip(*(seen[1][k] for k in ("groups", "gram", "cross", "by_output"))):  # noqa: B905
        was, target = inputs_of(model, 1, group.layers[0], after)
        now, _ = inputs_of(model, 1, group.layers[0], compressed)
        torch.testing.assert_close(gram, now.t() @ now / len(now), rtol=1e-4, atol=1e-4)
        shift = was - now
        if by_output:
            shift = shift @ weight_OI(model.blocks[1].get_submodule(group.layers[0])).t()
        torch.testing.assert_close(cross, shift.t() @ now / len(now), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.cat(seen[1]["targets"]), target)
    check_input, check_output = seen[1]["check"]
    torch.testing.assert_close(check_output, model.run_block(1, check_input))


@torch.no_grad()
def test_one_path_shows_the_original_inputs_only(build_model: Any) -> None:
    folder = build_model()
    seen = run(folder, Kept(), paths=1)
    model = StreamedModel.open(folder)
    model.load_block(0)
    hidden = model.run_block(0, model.embed(IDS))
    model.load_block(1)
    for group, gram, cross in zip(seen[1]["groups"], seen[1]["gram"], seen[1]["cross"], strict=True):
        x, _ = inputs_of(model, 1, group.layers[0], hidden)
        torch.testing.assert_close(gram, x.t() @ x / len(x), rtol=1e-4, atol=1e-4)
        assert cross is None
    assert seen[1]["inputs"] == seen[1]["targets"] == []


def test_a_block_read_back_leads_to_the_same_next_one(build_model: Any) -> None:
    folder = build_model()
    whole = Kept()
    first = run(folder, whole)
    resumed = Kept({0: whole.blocks[0]})
    again = run(folder, resumed)
    assert list(again) == [1]
    for key in ("gram", "cross", "inputs", "targets"):
        assert all(torch.equal(a, b) for a, b in zip(first[1][key], again[1][key], strict=True))
    for name, q in whole.blocks[1].quantized.items():
        assert torch.equal(q.codes_OI, resumed.blocks[1].quantized[name].codes_OI)


def measured(folder: Any, *, paths: int, blocks: list[int] | None = None) -> dict[int, dict[str, Any]]:
    """A pass that changes nothing and stores nothing; what it was shown of each block, and what it left behind."""
    model = StreamedModel.open(folder)
    seen: dict[int, dict[str, Any]] = {}

    def method(loaded: LoadedBlock) -> None:
        seen[loaded.index] = {"check": loaded.check_input.clone(), "out": loaded.check_output.clone()}
        seen[loaded.index]["targets"] = [h.clone() for h in loaded.targets]

    for done in stream(model, IDS, method, paths=paths, blocks=blocks, wanted=Wanted(gram=False)):
        assert done.report == {} and done.source in seen
    return seen


@torch.no_grad()
def test_a_pass_that_only_measures_needs_no_store(build_model: Any) -> None:
    folder = build_model()
    plain = measured(folder, paths=1)
    twice = measured(folder, paths=2)
    assert plain.keys() == twice.keys() == {0, 1}
    for index in plain:
        assert torch.equal(plain[index]["check"], twice[index]["check"])
        assert torch.equal(plain[index]["out"], twice[index]["targets"][0][: len(plain[index]["out"])])


@torch.no_grad()
def test_blocks_that_do_not_go_on_are_bypassed(build_model: Any) -> None:
    """On the only path; with two, the original model still runs them, and its outputs are the targets."""
    folder = build_model(num_hidden_layers=3)
    whole, short, both = (
        measured(folder, paths=paths, blocks=blocks) for paths, blocks in ((1, None), (1, [0, 2]), (2, [0, 2]))
    )
    assert short.keys() == both.keys() == {0, 2}
    assert torch.equal(short[2]["check"], whole[0]["out"]) and torch.equal(both[2]["check"], whole[0]["out"])
    assert torch.equal(both[2]["targets"][0][: len(whole[2]["out"])], whole[2]["out"])
    assert not torch.equal(both[2]["out"], whole[2]["out"])


def test_blocks_that_go_on_are_stored_under_their_new_number(build_model: Any) -> None:
    model = StreamedModel.open(build_model(num_hidden_layers=3))
    names: dict[int, str] = {}

    class Store(Kept):
        def save(self, index: int, prefix: str, result: BlockResult) -> None:
            names[index] = prefix

    def method(loaded: LoadedBlock) -> BlockResult:
        return BlockResult(quantized={}, dense=dict(loaded.module.state_dict()), report={"was": loaded.prefix})

    done = list(stream(model, IDS[:2], method, Store(), blocks=[0, 2]))
    assert [(d.index, d.source, d.total, d.report["was"]) for d in done] == [
        (0, 0, 2, "model.layers.0."),
        (1, 2, 2, "model.layers.2."),
    ]
    assert names == {0: "model.layers.0.", 1: "model.layers.1."}


def test_the_callers_grad_mode_is_its_own(build_model: Any) -> None:
    model = StreamedModel.open(build_model())
    for _ in stream(model, IDS[:2], lambda loaded: None):
        assert torch.is_grad_enabled()
        (torch.ones(2, requires_grad=True) * 2).sum().backward()
    with torch.no_grad():
        for _ in stream(model, IDS[:2], lambda loaded: None):
            assert not torch.is_grad_enabled()


@torch.no_grad()
def test_targets_lie_where_the_next_block_begins_and_sources_are_the_originals_inputs(build_model: Any) -> None:
    folder = build_model(num_hidden_layers=4)
    model = StreamedModel.open(folder)
    states = [model.embed(IDS[:2])]
    for index in range(4):
        model.load_block(index)
        states.append(model.run_block(index, states[-1]))
        model.release_block(index)
    for kept, ends in (([1, 3], {1: 3, 3: 4}), ([0, 2], {0: 2, 2: 4})):
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def method(loaded: LoadedBlock, seen: dict[int, tuple[Tensor, Tensor]] = seen) -> None:
            seen[loaded.index] = (loaded.sources[0].clone(), loaded.targets[0].clone())

        wanted = Wanted(gram=False, sources=True)
        list(stream(model, IDS[:2], method, paths=2, blocks=kept, wanted=wanted))
        for index, end in ends.items():
            assert torch.equal(seen[index][0], states[index]) and torch.equal(seen[index][1], states[end])


@torch.no_grad()
def test_a_path_of_another_width_with_attributes_of_its_own(build_model: Any) -> None:
    """What enters is scaled, and half of the query heads go: the group's size follows, and is put back behind."""
    model = StreamedModel.open(build_model())
    seen: dict[int, Tensor] = {}

    def method(loaded: LoadedBlock) -> BlockResult:
        seen[loaded.index] = loaded.inputs[0].clone()
        assert loaded.module.get_submodule("self_attn").num_key_value_groups == 2
        dense = {name: value.clone() for name, value in loaded.module.state_dict().items()}
        rows = torch.cat([torch.arange(16), torch.arange(32, 48)])  # heads 0 and 2, of two groups of two
        dense["self_attn.q_proj.weight"] = dense["self_attn.q_proj.weight"][rows]
        dense["self_attn.o_proj.weight"] = dense["self_attn.o_proj.weight"][:, rows]
        return BlockResult(quantized={}, dense=dense)

    reshaping = Reshaping(enter=lambda h: 2 * h, attributes={"self_attn": {"num_key_value_groups": 1}})
    list(stream(model, IDS[:2], method, Kept(), paths=2, wanted=Wanted(gram=False), reshaping=reshaping))
    assert torch.equal(seen[0], 2 * model.embed(IDS[:2]))
    module = model.load_block(0)
    out = weight_OI(module.get_submodule("self_attn.o_proj"))
    out[:, 16:32] = out[:, 48:] = 0
    torch.testing.assert_close(seen[1], model.run_block(0, seen[0]))


@torch.no_grad()
def test_a_block_of_another_shape_runs_and_the_model_can_be_read_again(build_model: Any) -> None:
    """Half of the MLP's neurons, as width pruning leaves them: the path of the compressed model goes through them."""
    folder = build_model()
    model = StreamedModel.open(folder)
    half = SIZES["intermediate_size"] // 2
    shown: dict[int, Tensor] = {}

    def method(loaded: LoadedBlock) -> BlockResult:
        shown[loaded.index] = loaded.check_input.clone()
        dense = dict(loaded.module.state_dict())
        for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
            dense[name] = dense[name][:half]
        dense["mlp.down_proj.weight"] = dense["mlp.down_proj.weight"][:, :half]
        return BlockResult(quantized={}, dense={name: value.clone() for name, value in dense.items()})

    list(stream(model, IDS[:2], method, Kept(), paths=2))
    module = model.load_block(0)
    hidden = model.embed(IDS[:2])
    down = module.get_submodule("mlp.down_proj")
    assert weight_OI(down).shape[1] == 2 * half
    weight_OI(down)[:, half:] = 0  # the other half adds nothing
    torch.testing.assert_close(shown[1], model.run_block(0, hidden)[: len(shown[1])])
