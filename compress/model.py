"""A causal language model whose decoder blocks are on the meta device until each is needed.

Any decoder-only architecture of transformers works without code of its own: the blocks are those that the model's own
forward runs, and what each is called with (masks, rotary tables) is recorded by running that forward with the blocks
replaced by recorders. Peak memory is the loaded block, not the model.

Shapes: B batch, T tokens, H hidden size, V vocabulary, O out_features, I in_features
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import activations
from compress.checkpoint import Checkpoint, checked_config
from compress.decoder import base_of, find_decoder, input_embedding
from compress.dense import read_dense
from compress.errors import ArtifactError, ConfigError, UnsupportedError, explained
from compress.folders import check_folder
from compress.formats import stored
from compress.kv_cache import Int8Cache, cache_of, with_cache
from compress.linear import is_linear, linears
from compress.names import check_all_read, source_names
from compress.plan import KvScheme
from compress.skeleton import meta_model
from compress.weights import holds_safetensors


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states, for one shape `[B, T]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_CPU = torch.device("cpu")


class _Stop(BaseException):
    """Ends the model's forward once the last block's call is recorded."""


def configure_allocator() -> None:
    """To be called before the first allocation on a GPU; what the user has set stays.

    Matrices of many sizes come and go, and fixed segments reserve half as much again as is in use.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


class StreamedModel:
    """A checkpoint and its transformers model on the meta device. See `open`."""

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.stored = stored(checkpoint)
        self.model = model
        self.dtype = dtype
        self.device = device
        self.base = base_of(model)
        decoder = find_decoder(model, checkpoint.path)
        self.blocks_name, self.blocks = decoder.name, decoder.blocks
        self.embedding = input_embedding(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._on_meta = [dict(block.named_parameters()) for block in self.blocks]
        self._source = source_names(self.stored, model) if checkpoint.tensors else {n: n for n in model.state_dict()}
        self._returns_tuple = decoder.returns_tuple
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._wide = False
        self._cache: Int8Cache | None = None
        self.kv = self.stored.plan.kv
        self._rows: tuple[Tensor, Tensor] | None = None
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> StreamedModel:
        """Read a model folder's config and headers; no weight is loaded, every tensor's name and shape is checked.

        Weights stored as AutoAWQ gemm or compressed-tensors integers are dequantized when their block is loaded.
        Raises ArtifactError for a damaged folder and UnsupportedError for an architecture that does not fit.
        """
        if torch.device(device).type == "cuda":
            configure_allocator()
        checkpoint = Checkpoint.open(path)
        model = meta_model(checkpoint, trust_remote_code=trust_remote_code)
        opened = cls(checkpoint, model, dtype, torch.device(device))
        opened._check_prefixes()
        check_all_read(opened.stored, model, opened._source, opened.blocks_name, opened.num_blocks)
        return opened

    @classmethod
    def outline(cls, path: Path | str, *, trust_remote_code: bool = False) -> StreamedModel:
        """`open`, also of a folder with config.json alone, of which names and shapes are known and nothing is loaded.

        What a command can say of a model before any work, it says from this.
        """
        folder = Path(path)
        check_folder(folder)
        if holds_safetensors(folder):
            return cls.open(path, trust_remote_code=trust_remote_code)
        config = checked_config(folder)
        if "quantization_config" in config:
            raise ArtifactError(f"{folder}: its config.json says quantized, but it holds no weights; fetch them")
        checkpoint = Checkpoint(path=folder, config=config, tensors={})
        return cls(checkpoint, meta_model(checkpoint, trust_remote_code=trust_remote_code), torch.float32, _CPU)

    @property
    def kv(self) -> KvScheme | None:
        """How keys and values are held while a block runs: as the folder says, until it is set otherwise."""
        return self._kv

    @kv.setter
    def kv(self, scheme: KvScheme | None) -> None:
        self._kv, self._cache = scheme, cache_of(scheme)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding; token ids must be below it."""
        return int(self.embedding.weight.shape[0])

    def block_prefix(self, index: int) -> str:
        """The checkpoint's own name of a block, with a final dot: `model.layers.3.`"""
        prefix = f"{self.blocks_name}.{index}."
        first = next(iter(self.blocks[index].state_dict()))
        return self.source_name(prefix + first, suffix=first)

    def _check_prefixes(self) -> None:
        """What is written of a block is told from the rest by the checkpoint's prefix of its names."""
        for index, block in enumerate(self.blocks):
            prefix = self.block_prefix(index)
            for name in block.state_dict():
                source = self._source[f"{self.blocks_name}.{index}.{name}"]
                if not source.startswith(prefix):
                    raise ArtifactError(
                        f"{self.checkpoint.path}: {source} belongs to the block whose other tensors are called "
                        f"{prefix}*; fetch the model again"
                    )

    def source_name(self, name: str, suffix: str = "") -> str:
        """The checkpoint's prefix for the model's parameter `name` once `suffix` is cut off."""
        source = self._source[name]
        return source[: len(source) - len(suffix)] if suffix else source

    # ---- weights ---------------------------------------------------------------------------------

    def load_block(self, index: int, dtype: torch.dtype | None = None) -> nn.Module:
        """Block `index` with its weights in `dtype` (the model's, unless given) on `device`.

        With weights wider than the model's dtype, `run_block` computes in the model's dtype (autocast) and `run_exact`
        in the weights' own. Refuses NaN and infinite weights.
        """
        block = self.blocks[index]
        values = None
        if self._ahead is not None and self._ahead[0] == index:
            values = self._ahead[1].result()
            self._ahead = None
        self._load(block, f"{self.blocks_name}.{index}.", dtype=dtype, values=values)
        self._wide = dtype is not None and dtype != self.dtype
        return block

    def prefetch_block(self, index: int) -> None:
        """Start reading block `index` from disk in a thread, for the next `load_block(index)`; costs its bytes."""
        names = sorted({self._source[f"{self.blocks_name}.{index}.{n}"] for n in self.blocks[index].state_dict()})
        future: Future[dict[str, Tensor]] = Future()

        def read() -> None:
            try:
                future.set_result(self._read(names))
            except BaseException as e:  # raised where the block is loaded
                future.set_exception(e)

        threading.Thread(target=read, name="prefetch-block", daemon=True).start()
        self._ahead = (index, future)

    def release_block(self, index: int) -> None:
        """Put the block's parameters back on the meta device, in the shapes that config.json says."""
        block = self.blocks[index]
        _to_meta(block)
        for name, p in self._on_meta[index].items():
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner)._parameters[leaf] = p

    def load_whole(self) -> None:
        """Load every block and everything around them, for good: the transformers model then runs by itself.

        An output matrix that is tied to the input embedding is the same tensor.
        """
        whole: Any = self.model
        for index in range(self.num_blocks):
            self.load_block(index)
        for name, module in self.model.named_modules():
            own = [p for p in module._parameters.values() if p is not None]
            if any(p.is_meta for p in own) and not name.startswith(self.blocks_name + "."):
                self._load(module, f"{name}." if name else "")
        embedding, output = self.base.get_input_embeddings(), whole.get_output_embeddings()  # type: ignore[operator]
        if output is not None and self._source[f"{self._names[id(output)]}.weight"] == self._embedding_source():
            output.weight = embedding.weight
        for _, module in self.model.named_modules():
            for key, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.device != self.device:
                    module._buffers[key] = buffer.to(self.device)

    def _load(
        self,
        module: nn.Module,
        prefix: str,
        *,
        dtype: torch.dtype | None = None,
        values: dict[str, Tensor] | None = None,
    ) -> None:
        """Materialise every parameter and persistent buffer of `module` from the checkpoint, or from `values` of it."""
        wanted = {name: self._source[prefix + name] for name in module.state_dict()}
        if values is None:
            values = self._read(sorted(set(wanted.values())))
        if self.device.type != "cpu":  # checked and converted where that is quick
            values = {source: value.to(self.device, non_blocking=True) for source, value in values.items()}
        for source, value in values.items():
            self._check_finite(source, value)
        state = {}
        for name, old in module.state_dict().items():
            value = values[wanted[name]]
            if tuple(value.shape) != tuple(old.shape):
                raise ArtifactError(
                    f"{self.checkpoint.path}: tensor {wanted[name]} has shape {tuple(value.shape)}, but config.json "
                    f"says {tuple(old.shape)}; the config belongs to another model"
                )
            state[name] = value.to(self.device, (dtype or self.dtype) if value.is_floating_point() else value.dtype)
        module.load_state_dict(state, assign=True)
        for p in module.parameters():
            p.requires_grad_(False)
        self._quantize_inputs(module, prefix)
        for name, buffer in module.named_buffers():
            if buffer.device != self.device:
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)

    def _quantize_inputs(self, module: nn.Module, prefix: str) -> None:
        """Let the linears of a loaded module quantize their inputs where the folder's plan says so."""
        if not any(scheme.input is not None for scheme in self.stored.plan.groups()):
            return
        for name, layer in linears(module).items():
            source = self._source[f"{prefix}{name}.weight" if name else f"{prefix}weight"].removesuffix(".weight")
            scheme = self.stored.plan.get(source)
            if scheme is not None and scheme.input is not None:
                activations.install(layer, self.stored.weight(source), scheme.input, self.stored.static(source))

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return read_dense(self.stored, names, pinned=self.device.type == "cuda")

    # ---- running ---------------------------------------------------------------------------------

    def embed_batches(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """`embed` of each of the batches; the embedding is read from the checkpoint once for all of them."""
        with self.embedding_kept(torch.cat([ids_BT.flatten() for ids_BT in batches])):
            return [self.embed(ids_BT) for ids_BT in batches]

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Hidden states `[B, T, H]` that enter block 0; records what every block is called with at this shape."""
        hidden, calls = self._shell(ids_BT)
        self._calls[(ids_BT.shape[0], ids_BT.shape[1])] = calls
        return hidden

    def call(self, index: int, ids_BT: Tensor) -> Call:
        """What block `index` is called with besides hidden states, for rows of this shape, which were embedded."""
        return self._calls[(ids_BT.shape[0], ids_BT.shape[1])][index]

    def run_block(self, index: int, hidden: Tensor) -> Tensor:
        """The loaded block's output `[B, T, H]` in the model's dtype. The shape must have been embedded before."""
        with torch.autocast(self.device.type, self.dtype, enabled=self._wide):
            return self._run(index, hidden, self._call(index, hidden)).to(hidden.dtype)

    def run_exact(self, index: int, hidden: Tensor) -> Tensor:
        """The loaded block's output in the dtype of its weights, for proofs that a coarser one would spoil."""
        if not self._wide:
            return self.run_block(index, hidden)
        call = self._call(index, hidden)
        wide = next(self.blocks[index].parameters()).dtype
        return self._run(
            index, hidden.to(wide), Call(args=_widened(call.args, wide), kwargs=_widened(call.kwargs, wide))
        )

    def run_cached(self, index: int, hidden: Tensor, cache: Int8Cache | None) -> Tensor:
        """`run_exact` with keys and values going through `cache`, whatever the plan says of them."""
        held, self._cache = self._cache, cache
        try:
            return self.run_exact(index, hidden)
        finally:
            self._cache = held

    def run_with(self, index: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """`run_block` with the block's parameters named in `weights` replaced; differentiable with respect to them."""
        call = self._call(index, hidden)
        with torch.autocast(self.device.type, self.dtype, enabled=self._wide):
            out = torch.func.functional_call(
                self.blocks[index], dict(weights), (hidden, *call.args), self._arguments(index, call)
            )
        result = out[0] if isinstance(out, tuple | list) else out
        assert isinstance(result, Tensor)
        return result

    def _explained(self, what: str) -> contextlib.AbstractContextManager[None]:
        """For calls of transformers' modules: what they raise, they raise about the config and the tensors they got."""
        return explained(
            f"{self.checkpoint.path}: {what}", "its config.json does not fit its weights, fetch both again"
        )

    def _run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        held = _sizes(call.kwargs)
        with self._explained(f"block {self.blocks_name}.{index} cannot be run"):
            out = self.blocks[index](hidden, *call.args, **self._arguments(index, call))
        if _sizes(call.kwargs) != held:
            raise UnsupportedError(
                f"{self.checkpoint.path}: block {self.blocks_name}.{index} hands more than hidden states to later "
                f"blocks ({', '.join(held)}); such models are not supported yet"
            )
        self._returns_tuple = isinstance(out, tuple | list)
        result = out[0] if isinstance(out, tuple | list) else out
        assert isinstance(result, Tensor)
        return result

    def head(self, hidden: Tensor, ids: range | None = None) -> Tensor:
        """Logits `[B, T, V]` from the last block's output: final norm, output matrix, soft cap if any.

        With `ids`, those of these consecutive ids only, and no more rows of the output matrix are read than they have.
        """
        zeros = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        with self._output_rows(ids) if ids is not None else contextlib.nullcontext():
            logits, _ = self._shell(zeros, last=hidden)
        return logits

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the output matrix multiplies, `[B, T, H]`, for the last block's output; no logit is computed."""
        output: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        found: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Stop

        hook = output.register_forward_pre_hook(stop)
        try:
            self._shell(torch.zeros(hidden.shape[:2], dtype=torch.int64), last=hidden)
        finally:
            hook.remove()
        return found[0]

    @contextlib.contextmanager
    def head_of(self, weight_VH: Tensor) -> Iterator[None]:
        """The output matrix replaced, for calls of `head` while `head_loaded`."""
        output: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        held = output._parameters["weight"]
        assert held is not None
        output._parameters["weight"] = nn.Parameter(weight_VH.to(held.device, held.dtype), requires_grad=False)
        try:
            yield
        finally:
            output._parameters["weight"] = held

    @contextlib.contextmanager
    def head_loaded(self, *, matrix: bool = True) -> Iterator[None]:
        """Keep the modules around the blocks in memory for several calls of `head`, the output matrix if `matrix`."""
        zero, held = torch.zeros(1, dtype=torch.int64), self._rows
        self._rows = (zero, self._embedding_table(zero))
        try:
            with self._outside_loaded(head=matrix):
                yield
        finally:
            self._rows = held

    @contextlib.contextmanager
    def embedding_kept(self, ids: Tensor) -> Iterator[None]:
        """Keep the embedding's rows of `ids` in memory for several calls of `embed`."""
        unique, held = self._unique_ids(ids), self._rows
        self._rows = (unique, self._embedding_table(unique))
        try:
            with self._outside_loaded(head=False):
                yield
        finally:
            self._rows = held

    def own_head(self) -> str | None:
        """The output matrix's name, in the model and in the checkpoint, where it is a linear with a tensor of its own;
        None where it is the input embedding, or stored under another name than the model's."""
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        if output is None or not is_linear(output):
            return None
        name = self._names[id(output)]
        source = self._source[f"{name}.weight"]
        return name if source == f"{name}.weight" and source != self._embedding_source() else None

    def has_plain_head(self) -> bool:
        """Whether the output matrix is stored as plain numbers, a row an id, so that `head` can take some ids alone."""
        infos = [self.checkpoint.tensors.get(source) for source in self._output_sources().values()]
        return bool(infos) and all(i is not None and i.dtype in ("F16", "BF16", "F32", "F64") for i in infos)

    def _output_sources(self) -> dict[str, str]:
        """The checkpoint's name of each parameter of the output matrix's module."""
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        own = [key for key, p in getattr(output, "_parameters", {}).items() if p is not None]
        return {key: self._source[f"{self._names[id(output)]}.{key}"] for key in own}

    @contextlib.contextmanager
    def _output_rows(self, ids: range) -> Iterator[None]:
        """The output matrix holding the rows of these consecutive ids only."""
        output: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        held = dict(output._parameters)
        for key, source in self._output_sources().items():
            rows = self.checkpoint.slice(source, ids.start, ids.stop)
            self._check_finite(source, rows)
            output._parameters[key] = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
        try:
            yield
        finally:
            output._parameters.update(held)

    def _arguments(self, index: int, call: Call) -> dict[str, Any]:
        """What a block is called with by name, the cache included where keys and values are rounded."""
        if self._cache is None:
            return dict(call.kwargs)
        return with_cache(call.kwargs, self._cache, f"{self.blocks_name}.{index}")

    def _call(self, index: int, hidden: Tensor) -> Call:
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._calls:
            self._shell(torch.zeros(shape, dtype=torch.int64), record=True)
        return self._calls[shape][index]

    def _shell(self, ids_BT: Tensor, last: Tensor | None = None, record: bool = False) -> tuple[Tensor, list[Call]]:
        """Run the model's own forward with every block replaced by a recorder.

        Without `last`: stops at the last block; returns block 0's input. With `last`: the last block "returns" it
        and the forward goes on; returns the logits.
        """
        calls: list[Call] = []
        first: list[Tensor] = []
        final = len(self.blocks) - 1

        def recorder(index: int, as_tuple: bool) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                kwargs = dict(kwargs)
                hidden = args[0] if args else kwargs.pop("hidden_states")
                if index == 0:
                    first.append(hidden)
                calls.append(Call(args=tuple(args[1:]), kwargs=kwargs))
                if index == final and last is None:
                    raise _Stop
                value = last if index == final else first[0]
                return (value,) if as_tuple else value

            return forward

        target = self.model if last is not None else self.base
        unique = self._unique_ids(ids_BT)
        with self._outside_loaded(head=last is not None), self._embedding_rows(unique), torch.no_grad():
            out: Any = None
            try:
                for i, block in enumerate(self.blocks):
                    block.forward = recorder(i, self._returns_tuple)
                with self._explained("it cannot be run"), contextlib.suppress(_Stop):
                    out = target(input_ids=ids_BT.to(self.device), use_cache=False)
            finally:
                for block in self.blocks:
                    del block.forward
        if record or last is None:
            self._calls[(ids_BT.shape[0], ids_BT.shape[1])] = calls
        if last is not None and out is None:  # stopped before the logits
            return last, calls
        return (first[0] if last is None else out.logits), calls

    def _unique_ids(self, ids_BT: Tensor) -> Tensor:
        if int(ids_BT.max()) >= self.vocab_size or int(ids_BT.min()) < 0:
            raise ConfigError(
                f"token id {int(ids_BT.max())} does not exist in the model's vocabulary of {self.vocab_size}; "
                "the tokenizer belongs to another model"
            )
        unique: Tensor = torch.unique(ids_BT.cpu())
        return unique

    def _embedding_source(self) -> str:
        return self._source[f"{self._names[id(self.embedding)]}.weight"]

    @contextlib.contextmanager
    def _embedding_rows(self, unique: Tensor) -> Iterator[None]:
        """The input embedding with the rows of the ids `unique` only: a vocabulary of 128k costs gigabytes otherwise.

        The model is given the ids as they are, and its embedding looks them up among the rows that are there: whatever
        else a model does with ids, it does with the right ones.
        """
        embedding = self.embedding
        if self._rows is None or not bool(torch.isin(unique, self._rows[0]).all()):
            stored = self._embedding_table(unique)
        else:
            stored = self._rows[1][torch.searchsorted(self._rows[0], unique)]
        rows, there = stored.to(self.device, self.dtype), unique.to(self.device)
        held, padding, forward = embedding._parameters["weight"], embedding.padding_idx, embedding.forward

        def by_id(ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            place = torch.searchsorted(there, ids).clamp(max=len(there) - 1)
            if not bool((there[place] == ids).all()):
                raise UnsupportedError(
                    f"{self.checkpoint.path}: {type(self.model).__name__} replaces token ids before it looks them up; "
                    "such models are not supported yet"
                )
            return forward(place, *args, **kwargs)

        embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        embedding.padding_idx = None
        embedding.forward = by_id  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            embedding._parameters["weight"], embedding.padding_idx = held, padding
            del embedding.forward

    def _embedding_table(self, unique: Tensor) -> Tensor:
        """Rows of the input embedding as stored; ArtifactError when one is not finite."""
        name = self._embedding_source()
        rows = self.checkpoint.rows(name, unique)
        self._check_finite(name, rows)
        return rows

    def _check_finite(self, source: str, value: Tensor) -> None:
        if not value.is_floating_point():
            return
        finite = torch.isfinite(value.float() if value.element_size() == 1 else value)
        if not bool(finite.all()):
            raise ArtifactError(
                f"{self.checkpoint.path}: tensor {source} has {int((~finite).sum())} NaN or infinite values; "
                "the model is damaged, fetch it again"
            )

    @contextlib.contextmanager
    def _outside_loaded(self, head: bool) -> Iterator[None]:
        """Load the modules outside the blocks, except the input embedding; the output matrix only for `head`."""
        embedding = self.embedding
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        loaded: list[nn.Module] = []
        for name, module in self.model.named_modules():
            inside = name.startswith(self.blocks_name + ".")
            own = [p for p in module._parameters.values() if p is not None]
            if inside or module is embedding or (module is output and not head):
                continue
            for key, buffer in list(module._buffers.items()):
                if buffer is not None and buffer.device != self.device:
                    module._buffers[key] = buffer.to(self.device)
            if own and any(p.is_meta for p in own):
                self._load(module, f"{name}." if name else "")
                loaded.append(module)
        try:
            yield
        finally:
            for module in loaded:
                _to_meta(module)


def _sizes(kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Entries in each of a block's arguments that a block could write to (keys and values shared between blocks)."""
    return {k: len(v) for k, v in kwargs.items() if isinstance(v, MutableMapping | MutableSequence)}


def _widened(value: Any, dtype: torch.dtype) -> Any:
    """A block's arguments with every floating tensor in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_widened(v, dtype) for v in value)
    if isinstance(value, dict):
        return {key: _widened(v, dtype) for key, v in value.items()}
    return value


def _to_meta(module: nn.Module) -> None:
    for child in module.modules():
        activations.uninstall(child)
        for key, p in child._parameters.items():
            if p is not None and not p.is_meta:
                child._parameters[key] = nn.Parameter(p.to("meta"), requires_grad=False)
