"""The block loop: how one checkpoint becomes another.

    (with token weights: find out what the loss feels of each token; see gradients.py)
    (with a number of bits to come to: find out what each layer makes of how many; see survey.py)
    embed the calibration windows
    for each decoder block:
        read its weights
        pass 1: run all windows, accumulate H for each input that linears share
        quantize the linears, and put what was stored into them
        (with tuning: train what is no code; see tuning.py)
        pass 2: run all windows again: what the next block gets
        write the block
    (with tuning of the model: train what is no code in all blocks together; see model_tuning.py)
    write the rest as it is

Only the hidden states and one block are in memory; for a GPU, the next block is read and the one
before is written meanwhile. Pass 1 stops at the last linear, whose output nobody needs; the last
block has no pass 2; rounding to nearest has no pass at all. Asymmetric calibration carries the
dense model's hidden states along: in pass 1 each batch runs behind its dense twin.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..config import DEFAULT_BITS, DEFAULT_PRESET, PRESETS, SpqrConfig
from ..errors import ConfigError, DataError
from ..format.layout import FORMAT_VERSION
from ..quantize.solver import QuantizedWeight
from .activations import Activations
from .blocks import Blocks, check_causal, check_dense, find_blocks, find_norms, plan
from .budget import Curves, Ration, Target, curves_to_csv, layers_of, reach, read_curves
from .calibration import (
    Dataset,
    load_texts,
    sample_windows,
    sample_windows_apart,
    window_length,
)
from .checkpoint import CheckpointWriter, WriteBehind, amended, check_free
from .gradients import TokenWeights, token_sensitivities
from .model_tuning import ModelTuner, model_tuning
from .placement import log_paths, states_crowd
from .progress import Progress, Silent, begin
from .quantize_block import BlockQuantizer
from .report import (
    LAYERS_FILE,
    MODEL_TUNING_FILE,
    TUNING_FILE,
    Clock,
    CompressionReport,
    LayerRow,
    TunedRow,
    formula_bits,
    read_rows,
    rows_to_csv,
)
from .skeleton import Parts, ReadAhead, build_skeleton, load, move_buffers, release, stored_names
from .source import Source, open_source
from .survey import check_target, survey
from .training import Tuning
from .tuning import BlockTuner

__all__ = ["COMPRESSING", "CURVES_FILE", "compress"]

BATCH_TOKENS = 4096
CURVES_FILE = "curves.csv"
TUNED_MODEL = "tuned"
TOKENS = "tokens"
COMPRESSING = "compressing"  # the stage that finishes blocks

logger = logging.getLogger(__name__)


def compress(
    model: str | Source | None,
    out: Path | str,
    config: SpqrConfig | None = None,
    *,
    dataset: Dataset | Sequence[Dataset] = None,
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    tune: int = 0,
    tune_model: int = 0,
    tune_codes: bool = False,
    overwrite: bool = False,
    batch_size: int | None = None,
    target_bits: float | None = None,
    per_layer: bool = True,
    curves: Curves | None = None,
    device: torch.device | str = "cpu",
    offload_activations: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress a model into the folder `out`, and say how it went.

    model        folder, .gguf file, hub name, an open Source, or None for the bundled model
    config       settings, the same for all layers where no target_bits are given; None for those of
                 the preset "balanced" with 3.9 bits a weight, if no others, to aim at
    dataset      calibration text (calibration.py), or its tokens, int64 [n]; None for Python's
                 manual; given several, windows are taken from each in turn
    nsamples     windows of calibration text
    seqlen       tokens a window; None is the model's context, 2048 at most
    seed         of the choice of windows, and of their order where they are trained on
    tune         steps of training each block once it is quantized (tuning.py); 0 for none
    tune_model   steps of training all blocks together behind that (model_tuning.py); 0 for none
    tune_codes   with tune_model, train codes too
    overwrite    replace `out` if it is a compressed model, or empty
    batch_size   windows run at once; None makes batches of about 4096 tokens
    target_bits  choose bits, group_size, the bits of scales and zeros and outlier_threshold of the
                 linears of each input so that the whole comes to so many bits a weight, spent where
                 the model's loss falls most for each (budget.py, survey.py)
    per_layer    False: choose thresholds alone
    curves       with target_bits, what a compression that differed in these bits alone found the
                 options of each layer to be worth; spares the walk over the dense model
    device       where blocks are run and quantized: "cpu" or "cuda"
    offload_activations  keep the hidden states in main memory, batch by batch on the device; of
                 themselves they go there where beside them a GPU had too little for a block
    progress     a bar: a tqdm, say (progress.py)

    A run that is killed leaves `<out>.partial`, and the same call continues it behind the last
    block that was written. Raises CheckpointError, ModelError, DataError, ConfigError or
    NumericsError for what their names say.
    """
    out = Path(out).expanduser()
    check_free(out, overwrite, Path(model).expanduser() if isinstance(model, str) else None)
    clock = Clock(device)
    if config is None:
        config = PRESETS[DEFAULT_PRESET]
        target_bits = DEFAULT_BITS if target_bits is None else target_bits
    if tune_codes and not tune_model:
        raise ConfigError("tune_codes trains codes with a whole model; give tune_model")
    target = None if target_bits is None else Target(target_bits, per_layer)
    progress = Silent() if progress is None else progress
    with clock("prepare"), torch.no_grad():
        progress.set_postfix_str("reading the model")
        source = open_source(model)
        check_dense(source.config)
        check_causal(source.config)
        tuning = Tuning(tune, nsamples, seed) if tune else None
        job = Compression(
            source,
            config,
            torch.device(device),
            clock,
            tuning,
            target,
            curves,
            tune_model,
            tune_codes,
        )
        progress.set_postfix_str("reading its tokenizer")
        tokenizer = source.tokenizer()
        if job.calibrates:
            progress.set_postfix_str("reading text")
            job.calibrate_on(load_texts(dataset, tokenizer), nsamples, seqlen, seed, batch_size)
            job.offload = offload_activations or job.activations_crowd()
        job.open(out, overwrite)
    with torch.no_grad(), closing(job.weights), closing(job.behind):
        return job.run(progress)


class Compression:
    """One model on its way from `source` to a folder."""

    def __init__(
        self,
        source: Source,
        config: SpqrConfig,
        device: torch.device,
        clock: Clock,
        tuning: Tuning | None = None,
        target: Target | None = None,
        curves: Curves | None = None,
        tune_model: int = 0,
        tune_codes: bool = False,
    ) -> None:
        """Raises ModelError for a model, ConfigError for patterns that cannot be handled."""
        self.source, self.config, self.device, self.clock = source, config, device, clock
        self.dtype = torch.float32 if device.type == "cpu" else source.config.dtype
        self.model: Any = build_skeleton(source.config, self.dtype)
        move_buffers(self.model, device)
        self.blocks: Blocks = find_blocks(self.model)
        self.settings = plan(self.blocks, config)
        self.target, self.curves = target, curves
        if target is not None:
            check_target(target, config, self.settings, self.model)
        if curves is not None and layers_of(curves) != set(self.settings):
            raise ConfigError("the curves are not of the layers that these settings compress")
        if device.type == "cuda":
            log_paths(self.model, self.settings, device)
        self.tuning, self.tune_model, self.tune_codes = tuning, tune_model, tune_codes
        self.norms = find_norms(self.model, self.blocks)
        hessians = any(chosen.use_hessian for chosen in self.settings.values())
        self.calibrates = hessians or tuning is not None or tune_model > 0
        self.weights = ReadAhead(source.weights(self.model), ahead=device.type == "cuda")
        self.names = stored_names(self.model)
        self.windows: torch.Tensor | None = None
        self.batch_size = 0
        self.offload = False
        self.model_tuning: Tuning | None = None
        self.model_windows: torch.Tensor | None = None

    def _weights(self) -> int:
        """Number of weights to compress."""
        return sum(self.model.get_submodule(name).weight.numel() for name in self.settings)

    def calibrate_on(
        self,
        texts: list[torch.Tensor],
        nsamples: int,
        seqlen: int | None,
        seed: int,
        batch_size: int | None,
    ) -> None:
        """Draw the calibration windows out of texts, int64 [n] each.

        Raises ConfigError for a seqlen beyond the model's context or a batch of none, DataError for
        too few tokens or tokens that the model does not have.
        """
        length = window_length(self.source.config, seqlen)
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; at least one window runs at once")
        vocabulary = self.source.config.get_text_config().vocab_size
        for tokens in texts:
            if len(tokens) and tokens.max() >= vocabulary:
                raise DataError(
                    f"the text has token {tokens.max().item()}, and the model knows 0 ..."
                    f" {vocabulary - 1}; tokenizer and model do not belong together"
                )
        self.windows = self._draw_windows(texts, nsamples, length, seed)
        self.batch_size = batch_size or max(1, BATCH_TOKENS // length)
        if self.tune_model:
            self._draw_model_windows(texts, length, seed)

    def _draw_model_windows(self, texts: list[torch.Tensor], length: int, seed: int) -> None:
        """What the whole model is tuned on: the more text the better, and so new windows."""
        self.model_tuning = model_tuning(
            self.tune_model,
            self.batch_size,
            seed,
            codes=self.tune_codes,
            text=len(texts) * min(map(len, texts)) // length,
            length=length,
        )
        trained, held_back = self.model_tuning.trained, self.model_tuning.held_back
        self.model_windows = sample_windows_apart(texts, trained, held_back, length, seed)

    def _draw_windows(
        self, texts: list[torch.Tensor], nsamples: int, length: int, seed: int
    ) -> torch.Tensor:
        """int64 [nsamples, length]; those that tuning holds back share no token with others."""
        if self.tuning is None:
            return sample_windows(texts, nsamples, length, seed)
        trained, held_back = self.tuning.trained, self.tuning.held_back
        return sample_windows_apart(texts, trained, held_back, length, seed)

    def activations_crowd(self) -> bool:
        """Whether all hidden states would leave a GPU too little memory for the work on a block."""
        # Beside them those of the dense model, or what a block gave while it was dense.
        paths = 2 if self.config.asymmetric or self.tuning is not None else 1
        return self._states_crowd(self.windows, paths)

    def _states_crowd(self, windows: torch.Tensor | None, paths: int) -> bool:
        """Whether so many hidden states of each token of `windows` would."""
        if self.device.type != "cuda" or windows is None:
            return False
        width = self.source.config.get_text_config().hidden_size
        linears = [self.model.get_submodule(name) for name in self.settings]
        return states_crowd(
            states=paths * windows.numel() * width * self.dtype.itemsize,
            largest=max(i * (i + o) for i, o in ((x.in_features, x.out_features) for x in linears)),
            block=sum(tensor.nbytes for tensor in self.blocks.modules[0].parameters()),
            free=torch.cuda.mem_get_info(self.device)[0],
        )

    def open(self, out: Path, overwrite: bool) -> None:
        """Start writing `out`, or go on with what an earlier run of the same job left."""
        self.writer = CheckpointWriter(
            out, len(self.blocks), *self.fingerprints(), overwrite=overwrite
        )
        self.behind = WriteBehind(self.writer)
        self.rows = read_rows(self.writer.read_text(LAYERS_FILE), LayerRow)
        self.tuned = read_rows(self.writer.read_text(TUNING_FILE), TunedRow)

    def fingerprints(self) -> tuple[str, str]:
        """Hashes of everything that shapes the result, and of all but the bits that it is to come
        to, of which nothing depends before a block is finished."""
        windows = b"" if self.windows is None else self.windows.numpy().tobytes()
        target = None if self.target is None else asdict(self.target)
        parts = {
            "version": __version__,
            "format_version": FORMAT_VERSION,
            "source": self.source.fingerprint,
            "config": self.config.to_dict(),
            "windows": sha256(windows).hexdigest(),
            "batch_size": self.batch_size,
            "device": self.device.type,
            "tuning": None if self.tuning is None else asdict(self.tuning),
            "model_tuning": None if self.model_tuning is None else asdict(self.model_tuning),
            "tune_codes": self.tune_codes,
            "target": target,
        }
        without_bits = parts | {"target": target and target | {"bits": None}}
        whole, found_out = (
            sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()
            for each in (parts, without_bits)
        )
        return whole, found_out

    def run(self, progress: Progress) -> CompressionReport:
        """Compress every unfinished block, write the rest, and give the folder its name."""
        start = self.writer.finished_blocks
        finished = [self.blocks.name(index) + "." for index in range(start)]
        self.rows = [row for row in self.rows if row.layer.startswith(tuple(finished))]
        self.tuned = self.tuned[:start]
        self.token_weights = self._weigh_tokens(progress) if start < len(self.blocks) else None
        self.ration = self._start_ration(progress)
        activations = self._start_activations() if start < len(self.blocks) else None
        begin(progress, COMPRESSING, len(self.blocks))
        progress.update(start)
        for index in range(start, len(self.blocks)):
            progress.set_postfix_str(self.blocks.name(index))
            self._compress_block(index, activations, progress)
            progress.update(1)
        with self.clock("write"):
            self.behind.wait()
        tuned = self._tune_model(progress)
        with self.clock("write"):
            self._write_rest(tuned)
        return self._report()

    def _tune_model(self, progress: Progress) -> dict[str, torch.Tensor]:
        """Tune all blocks together, and their shards get what came of it.

        Full name -> tensor, of what was tuned. It is written before the shards are, so that a run
        that is killed among them knows what the others are to get.
        """
        if self.model_tuning is None or self.model_windows is None:
            return {}
        if not self.writer.holds(TUNED_MODEL):
            with self.clock("tune"):
                tensors, row = self._model_tuner(progress).tune(self.writer.read_block)
            self.writer.write_text(MODEL_TUNING_FILE, rows_to_csv([row]))
            self.writer.write_tensors(TUNED_MODEL, tensors)
        tuned = self.writer.read_tensors(TUNED_MODEL)
        with self.clock("write"):
            for index in range(len(self.blocks)):
                self.writer.amend_block(index, tuned)
        return tuned

    def _model_tuner(self, progress: Progress) -> ModelTuner:
        assert self.model_tuning is not None
        assert self.model_windows is not None
        return ModelTuner(
            self._parts(),
            self.settings,
            self.model_windows,
            self.batch_size,
            self.model_tuning,
            progress,
            codes=self.tune_codes,
            offload=self.offload or self._states_crowd(self.model_windows, paths=1),
        )

    def _parts(self) -> Parts:
        """The dense model."""
        return Parts(self.model, self.blocks, self.weights, self.device, self.dtype)

    def _weigh_tokens(self, progress: Progress) -> TokenWeights | None:
        """What tokens count for; None where they count alike."""
        if not self.config.token_weights or self.windows is None:
            return None
        if not self.writer.holds(TOKENS):
            with self.clock("gradients"):
                squares = token_sensitivities(
                    self._parts(),
                    [name for name, config in self.settings.items() if config.use_hessian],
                    self.windows.to(self.device),
                    self.batch_size,
                    progress,
                )
            squares = {name: each.to(torch.bfloat16) for name, each in squares.items()}
            self.writer.write_tensors(TOKENS, squares)
        return TokenWeights(self.writer.read_tensors(TOKENS), self.device)

    def _start_ration(self, progress: Progress) -> Ration | None:
        """What the unfinished layers share; None where there is no target."""
        if self.target is None:
            return None
        curves = read_curves(self.writer.read_text(CURVES_FILE))
        if layers_of(curves) != set(self.settings):
            curves = self.curves or self._survey(progress, curves)
            self._keep_curves(curves)
        self.target.check_reach(*reach(curves), self._weights())
        ration = Ration(curves, self.settings, self.target.bits * self._weights() / 8)
        for row in self.rows:
            ration.spend(row.layer, row.nbytes)
            self.settings[row.layer] = row.settings(self.settings[row.layer])
        return ration

    def _keep_curves(self, curves: Curves) -> None:
        self.writer.write_text(CURVES_FILE, curves_to_csv(curves))

    def _survey(self, progress: Progress, known: Curves) -> Curves:
        """The options of every layer; those of some blocks may be known."""
        assert self.windows is not None  # Target.check_hessians: something calibrates
        with self.clock("survey"):
            return survey(
                self._parts(),
                self.settings,
                self.windows.to(self.device),
                self.batch_size,
                per_layer=self.target is not None and self.target.per_layer,
                clock=self.clock,
                progress=progress,
                weights=self.token_weights,
                known=known,
                keep=self._keep_curves,
            )

    def _start_activations(self) -> Activations | None:
        """What the first unfinished block gets; None where nothing calibrates."""
        if self.windows is None:
            return None
        names = [name for name in self._rest() if not self._is_head(name)]
        states = self.writer.read_hidden() if self.writer.finished_blocks else None
        with self.clock("forward"):
            self._load(names)
            activations = Activations.start(
                self.model,
                self.blocks.modules,
                self.windows.to(self.device),
                self.batch_size,
                states,
                offload=self.offload,
                dense=self.config.asymmetric,
            )
            release(self.model, names)
        return activations

    def _compress_block(
        self, index: int, activations: Activations | None, progress: Progress
    ) -> None:
        name, block = self.blocks.name(index), self.blocks.modules[index]
        stored = self._stored(index)
        with self.clock("read"):
            self._load(stored)
        last = index + 1 == len(self.blocks)
        if not last:
            self.weights.expect(self._stored(index + 1))
        tuner = self._tuner(index, activations, progress)
        if self.config.asymmetric:
            self._await_states(activations)
        quantizer = BlockQuantizer(
            block, name, index, self.settings, self.clock, self.ration, self.token_weights
        )
        results = quantizer.quantize(activations, self.config.true_sequential)
        self.settings |= quantizer.settings
        norms: dict[str, torch.Tensor] = {}
        if tuner is not None:
            with self.clock("tune"):
                results, norms, row = tuner.tune(results, self.settings)
            self.tuned.append(row)
        if activations is not None and not last:
            self._await_states(activations)
            with self.clock("forward"):
                activations.advance(block, index)
        release(self.model, stored)
        with self.clock("write"):
            self.rows += [self._row(layer, result) for layer, result in results.items()]
            tensors = self._block_tensors(stored, results) | norms
            self.behind.wait()
            self.writer.write_text(LAYERS_FILE, rows_to_csv(self.rows))
            if self.tuned:
                self.writer.write_text(TUNING_FILE, rows_to_csv(self.tuned))
            hidden = None if activations is None or last else activations.in_main_memory()
            self.behind.write_block(index, tensors, hidden)
            if self.device.type == "cpu":  # where a block takes longer than its file
                self.behind.wait()

    def _await_states(self, activations: Activations | None) -> None:
        """Until the states may be replaced: in main memory, the writer still reads these very."""
        if activations is not None and not activations.on_gpu:
            with self.clock("write"):
                self.behind.wait()

    def _tuner(
        self, index: int, activations: Activations | None, progress: Progress
    ) -> BlockTuner | None:
        """What is to tune block `index`, while it is still dense; None where nothing does."""
        if self.tuning is None or activations is None:
            return None
        name = self.blocks.name(index)
        norms = self._read(norm for norm in self.norms if norm.startswith(f"{name}."))
        with self.clock("tune"):
            return BlockTuner(
                self.blocks.modules[index],
                name,
                index,
                activations,
                norms,
                self.tuning,
                progress.set_postfix_str,
            )

    def _stored(self, index: int) -> list[str]:
        """Names of everything in block `index`."""
        return [name for name in self.names if name.startswith(f"{self.blocks.name(index)}.")]

    def _block_tensors(
        self, stored: Iterable[str], results: Mapping[str, QuantizedWeight]
    ) -> dict[str, torch.Tensor]:
        """What the shard of a block holds: compressed weights, and all else as it was."""
        tensors = {
            f"{layer}.{buffer}": tensor.cpu()
            for layer, result in results.items()
            for buffer, tensor in result.matrix.tensors.items()
        }
        compressed = {f"{layer}.weight" for layer in results}
        return tensors | self._read(name for name in stored if name not in compressed)

    def _write_rest(self, tuned: Mapping[str, torch.Tensor]) -> None:
        """What is outside the blocks, some of it `tuned`."""
        from .quantizer import SpqrQuantizationConfig

        self.writer.write_rest(amended(self._read(self._rest()), tuned))
        self.source.write_companions(self.writer.partial)
        config = deepcopy(self.source.config)
        config.architectures = [type(self.model).__name__]
        chosen = self.config if self.ration is None else self.config.with_modules(self.settings)
        config.quantization_config = SpqrQuantizationConfig(chosen)
        self.writer.finish(config.to_json_string())

    def _read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors as they are stored; only buffers may be missing in the checkpoint."""
        parameters = {name for name, _ in self.model.named_parameters()}
        wanted = (name for name in names if name in self.weights or name in parameters)
        return {name: self.weights.read(name) for name in wanted}

    def _load(self, names: Iterable[str]) -> None:
        load(self.model, names, self.weights, self.device, self.dtype)

    def _rest(self) -> list[str]:
        """Names of everything outside the blocks."""
        return [name for name in self.names if not name.startswith(f"{self.blocks.path}.")]

    def _is_head(self, name: str) -> bool:
        head: nn.Module | None = self.model.get_output_embeddings()
        return head is not None and self.model.get_submodule(name.rpartition(".")[0]) is head

    def _row(self, layer: str, result: QuantizedWeight) -> LayerRow:
        report, matrix = result.report, result.matrix
        config = self.settings[layer]
        return LayerRow(
            layer=layer,
            rows=matrix.spec.out_features,
            columns=matrix.spec.in_features,
            code_bits=config.bits,
            group_size=config.group_size,
            scale_bits=config.scale_bits,
            zero_bits=config.zero_bits,
            outlier_threshold=config.outlier_threshold,
            loss=report.loss,
            relative_loss=report.relative_loss,
            outlier_share=report.outlier_share,
            threshold=report.threshold,
            damping=report.damping,
            error_before=report.error_before,
            error_after=report.error_after,
            bits=matrix.bits_per_weight,
            formula_bits=formula_bits(config, matrix.spec, matrix.outlier_share),
            rounded=report.rounded_to_nearest,
            seconds=report.seconds,
        )

    def _report(self) -> CompressionReport:
        out = self.writer.out
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        seconds = dict(self.clock.seconds)
        path = out / MODEL_TUNING_FILE
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        model = next(iter(read_rows(text, TunedRow)), None)
        return CompressionReport(out, self.rows, seconds, size, self.tuned, model)
