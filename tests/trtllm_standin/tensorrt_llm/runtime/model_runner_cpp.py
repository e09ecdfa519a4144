"""The C++ runtime's Python face. Source: ``tensorrt_llm/runtime/model_runner_cpp.py`` of 1.0.0, 1.1.0 and 1.2.1.

Signatures, checks, messages, shapes and padding are the real ones; tensors are on the CPU. The loop over a stream yields one
piece a step for the whole batch, where the real one yields whatever requests have advanced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tensorrt_llm.builder import EngineConfig
from tensorrt_llm.kv_cache_type import KVCacheType
from tensorrt_llm.play import is_under_mpi, mpi_comm, mpi_rank, mpi_world_size, record
from tensorrt_llm.runtime.decoding import ACCEPTED, SamplingConfig, decode
from tensorrt_llm.runtime.outputs import Asked, fill_outputs
from torch import Tensor

IGNORED = (
    *("max_attention_window_size", "sink_token_length", "medusa_choices", "eagle_choices"),
    *("fail_fast_on_attention_window_too_large", "draft_tokens_list", "draft_logits_list", "skip_cross_attn_blocks"),
)
"""Keywords of ``generate`` that ``examples/run.py`` passes in vain or for other models. The real one ignores any other too."""


class ModelRunnerCpp:
    """One rank of an engine."""

    def __init__(self, config: EngineConfig, max_batch_size: int, max_input_len: int, max_seq_len: int, max_beam_width: int):
        self.config = config
        self.max_batch_size = max_batch_size
        self.max_input_len = max_input_len
        self.max_seq_len = max_seq_len
        self.max_beam_width = max_beam_width
        self.use_kv_cache = config.build_config.kv_cache_type is not KVCacheType.DISABLED

    @classmethod
    def from_dir(
        cls,
        engine_dir: str,
        *,
        lora_dir: str | None = None,
        rank: int = 0,
        max_batch_size: int | None = None,
        max_input_len: int | None = None,
        max_output_len: int | None = None,
        max_beam_width: int | None = None,
        max_attention_window_size: list[int] | None = None,
        sink_token_length: int | None = None,
        kv_cache_free_gpu_memory_fraction: float | None = None,
        cross_kv_cache_fraction: float | None = None,
        medusa_choices: list[list[int]] | None = None,
        eagle_choices: list[list[int]] | None = None,
        eagle_posterior_threshold: float | None = None,
        eagle_use_dynamic_tree: bool = False,
        eagle_dynamic_tree_max_top_k: int | None = None,
        lookahead_config: list[int] | None = None,
        debug_mode: bool = False,
        lora_ckpt_source: str = "hf",
        use_gpu_direct_storage: bool = False,
        gpu_weights_percent: float = 1,
        max_tokens_in_paged_kv_cache: int | None = None,
        kv_cache_enable_block_reuse: bool = False,
        enable_chunked_context: bool = False,
        is_enc_dec: bool = False,
        multi_block_mode: bool = True,
        enable_context_fmha_fp32_acc: bool | None = None,
        cuda_graph_mode: bool | None = None,
        logits_processor_map: dict[str, Any] | None = None,
        device_ids: list[int] | None = None,
        is_orchestrator_mode: bool = False,
        use_runtime_defaults: bool = True,
        gather_generation_logits: bool = False,
        use_variable_beam_width_search: bool = False,
        mm_embedding_offloading: bool = False,
        fail_fast_on_attention_window_too_large: bool = False,
    ) -> ModelRunnerCpp:
        """Load this rank; all ranks of the job call it together."""
        arguments = {name: value for name, value in locals().items() if name != "cls"}
        record("ModelRunnerCpp.from_dir", **arguments)
        config = EngineConfig.from_json_file(f"{engine_dir}/config.json")
        build = config.build_config
        assert cross_kv_cache_fraction is None, "cross_kv_cache_fraction should only be used with enc-dec models."
        if build.kv_cache_type is KVCacheType.DISABLED:
            assert max_output_len in (1, None), "Disabled KV cache is intended for context phase only now."
        _check_world(config)
        assert rank == mpi_rank()
        if mpi_world_size() > 1:
            mpi_comm().bcast(None, root=0)
        assert max_batch_size is None or max_batch_size <= build.max_batch_size
        longest_input = build.max_input_len if max_input_len is None else max_input_len
        max_seq_len = build.max_seq_len if max_output_len is None else longest_input + max_output_len
        assert max_seq_len <= build.max_seq_len
        assert max_beam_width is None or max_beam_width <= build.max_beam_width
        path = os.path.join(engine_dir, f"rank{rank}.engine")
        if not os.path.isfile(path):
            raise RuntimeError(f"[TensorRT-LLM][ERROR] Assertion failed: Error opening engine file: {path}")
        batch, beams = max_batch_size or build.max_batch_size, max_beam_width or build.max_beam_width
        return cls(config, batch, longest_input, max_seq_len, beams)

    @property
    def gather_context_logits(self) -> bool:
        return bool(self.config.build_config.gather_context_logits)

    @property
    def gather_generation_logits(self) -> bool:
        return bool(self.config.build_config.gather_generation_logits)

    @property
    def vocab_size(self) -> int:
        return int(self.config.pretrained_config.fields["vocab_size"])

    @property
    def vocab_size_padded(self) -> int:
        size = int(self.config.pretrained_config.mapping.world_size)
        return -(-self.vocab_size // size) * size

    @property
    def max_sequence_length(self) -> int:
        return self.max_seq_len

    def generate(
        self,
        batch_input_ids: list[Tensor],
        *,
        position_ids: list[Tensor] | None = None,
        encoder_input_ids: list[Tensor] | None = None,
        encoder_input_features: list[Tensor] | None = None,
        encoder_output_lengths: list[int] | None = None,
        cross_attention_masks: list[Tensor] | None = None,
        mrope_params: Any = None,
        sampling_config: SamplingConfig | None = None,
        lora_uids: list[str] | None = None,
        lookahead_config: list[int] | None = None,
        streaming: bool = False,
        stopping_criteria: Any = None,
        logits_processor_names: list[str] | None = None,
        max_new_tokens: int = 1,
        end_id: int | None = None,
        pad_id: int | None = None,
        bad_words_list: list[list[list[int]]] | None = None,
        stop_words_list: list[list[list[int]]] | None = None,
        return_dict: bool = False,
        output_sequence_lengths: bool = False,
        output_generation_logits: bool = False,
        output_log_probs: bool = False,
        output_cum_log_probs: bool = False,
        prompt_table: str | Tensor | None = None,
        prompt_tasks: str | None = None,
        input_token_extra_ids: list[list[int]] | None = None,
        return_all_generated_tokens: bool = False,
        language_adapter_uids: list[int] | None = None,
        mm_embedding_offloading: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Complete a batch: a tensor, a dict, or a generator of either; ``[]`` on every rank but the first."""
        arguments = {name: value for name, value in locals().items() if name not in ("self", "kwargs")}
        record("ModelRunnerCpp.generate", **arguments, **kwargs)
        unknown = sorted(set(kwargs) - set(ACCEPTED) - set(IGNORED))
        if unknown:
            raise TypeError(f"generate() got keywords that TensorRT-LLM would silently ignore: {', '.join(unknown)}")
        if stopping_criteria is not None:
            raise RuntimeError("Stopping criteria is not supported in C++ session.")
        if not self.use_kv_cache and max_new_tokens > 1:
            raise RuntimeError("Disabled KV cache is intended for context phase only now.")
        if mpi_rank() != 0:
            return []
        prompts = [ids.tolist() for ids in batch_input_ids]
        sampling = SamplingConfig.from_keywords(kwargs) if sampling_config is None else sampling_config
        self._check_inputs(prompts, sampling, max_new_tokens)
        asked = Asked(
            return_dict=return_dict,
            sequence_lengths=output_sequence_lengths,
            context_logits=self.gather_context_logits,
            generation_logits=self.gather_generation_logits or output_generation_logits,
            log_probs=output_log_probs,
            cum_log_probs=output_cum_log_probs,
        )
        words = (stop_words_list or [[]] * len(prompts), bad_words_list or [[]] * len(prompts))
        steps = self._steps(prompts, sampling, max_new_tokens, end_id, *words)
        if streaming:
            return (fill_outputs(self, prompts, new, end_id, asked, streaming=True) for new in steps)
        *_, last = steps
        return fill_outputs(self, prompts, last, end_id, asked, streaming=False)

    def _steps(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig,
        max_new_tokens: int,
        end_id: int | None,
        stop_words: list[list[list[int]]],
        bad_words: list[list[list[int]]],
    ) -> Iterator[list[list[list[int]]]]:
        """New tokens so far [batch][sequence][token], after every step until nothing advances."""
        new: list[list[list[int]]] = [[[] for _ in range(sampling.num_sequences)] for _ in prompts]
        sources = [
            [
                decode(prompt, number, sampling, self.vocab_size, max_new_tokens, end_id, stop_words[row], bad_words[row])
                for number in range(sampling.num_sequences)
            ]
            for row, prompt in enumerate(prompts)
        ]
        yielded = False
        while True:
            tokens = [[next(source, None) for source in row] for row in sources]
            if yielded and all(token is None for row in tokens for token in row):
                return
            for row, found in zip(new, tokens, strict=True):
                for sequence, token in zip(row, found, strict=True):
                    sequence.extend([] if token is None else [token])
            yielded = True
            yield [[list(sequence) for sequence in row] for row in new]

    def _check_inputs(self, prompts: list[list[int]], sampling: SamplingConfig, max_new_tokens: int) -> None:
        longest, limit = max(map(len, prompts)), "exceeds the engine or specified limit"
        if len(prompts) > self.max_batch_size:
            raise RuntimeError(f"Input batch size ({len(prompts)}) {limit} ({self.max_batch_size})")
        if longest > self.max_input_len:
            raise RuntimeError(f"Maximum input length ({longest}) {limit} ({self.max_input_len})")
        if longest + max_new_tokens > self.max_seq_len:
            what = f"Maximum input length ({longest}) + maximum new tokens ({max_new_tokens})"
            raise RuntimeError(f"{what} {limit} ({self.max_seq_len})")
        if sampling.beam_width > self.max_beam_width:
            raise RuntimeError(f"Num beams ({sampling.beam_width}) {limit} ({self.max_beam_width})")


def _check_world(config: EngineConfig) -> None:
    """As the C++ ``WorldConfig`` does."""
    mapping = config.pretrained_config.mapping
    size = mpi_world_size() if is_under_mpi() else 1
    if size != mapping.tp_size * mapping.pp_size * mapping.cp_size:
        raise RuntimeError(
            f"[TensorRT-LLM][ERROR] Assertion failed: MPI size {size} != TP size {mapping.tp_size} * "
            f"PP size {mapping.pp_size} * CP Size {mapping.cp_size}"
        )
