"""The runtime llama.cpp and its tokenizers. A file runs as it is, or decoded to fp32.

llama.cpp's kernels round the inputs of rounded weights to 8 bits. For an exact run, llama.cpp therefore decodes the
whole file to fp32 first, with its own code, and runs the decoded file with everything else in fp32 too.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from gyroquant.errors import InputError
from gyroquant.formats.gguf.decode import write_decoded
from gyroquant.formats.gguf.header import GGUF_FILE, stored_tensors, why_not_llama_cpp
from gyroquant.formats.gguf.llama_cpp import binding, complained, installed, tokenize
from gyroquant.formats.gguf.runtime import GgufRuntime
from gyroquant.formats.output_folder import check_room
from gyroquant.formats.runtime import Runtime

_BATCH = 512


class LlamaModel:
    """A GGUF file opened by llama.cpp, and the text that it has read so far.

    Raises InputError if llama.cpp is not installed or cannot open the file.
    """

    def __init__(self, path: Path, exact: bool = False):
        if reason := why_not_llama_cpp(path):
            raise InputError(f"{path}: {reason}")
        self.library, self._exact = binding(), exact
        settings = self.library.llama_model_default_params()
        if exact:  # on the CPU, without repacked weights, and all in memory, because the file is deleted
            settings.n_gpu_layers, settings.use_extra_bufts = 0, False
            settings.load_mode = self.library.LLAMA_LOAD_MODE_NONE
        complained()
        self._model = self.library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise InputError(f"llama.cpp cannot open {path}: {complained()}")
        self.vocab = self.library.llama_model_get_vocab(self._model)
        self.words = int(self.library.llama_vocab_n_tokens(self.vocab))
        self._contexts: list[Any] = []  # at most one
        self._capacity, self._ids = 0, list[int]()
        weakref.finalize(self, _free, self.library, self._model, self._contexts)

    def forget(self) -> None:
        """Clears the text and the KV cache."""
        self._ids = []
        for context in self._contexts:
            self.library.llama_memory_clear(self.library.llama_get_memory(context), True)

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Appends tokens to the text. Returns the logits after each, (length, words)."""
        if len(self._ids) + len(ids) > self._capacity:
            self._grow(len(self._ids) + len(ids))
        return self._read(ids)

    def chat_template(self) -> str | None:
        """The chat template in the file, or None."""
        template = self.library.llama_model_chat_template(self._model, None)
        return template.decode() if template else None

    def _read(self, ids: Sequence[int]) -> Tensor:
        rows = []
        for at in range(0, len(ids), _BATCH):
            rows.append(self._decode(ids[at : at + _BATCH]))
            self._ids += ids[at : at + _BATCH]
        return torch.cat(rows)

    def _decode(self, ids: Sequence[int]) -> Tensor:
        count, start, (context,) = len(ids), len(self._ids), self._contexts
        batch = self.library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            complained()
            failed = self.library.llama_decode(context, batch)
        finally:
            self.library.llama_batch_free(batch)
        if failed:
            raise InputError(f"llama.cpp fails after {start} tokens (llama_decode returns {failed}): {complained()}")
        rows = [self.library.llama_get_logits_ith(context, i) for i in range(count)]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.words,)) for row in rows]))

    def _grow(self, length: int) -> None:
        """A new context for at least `length` tokens and twice the old capacity. It reads the text again."""
        library, past = self.library, self._ids
        settings = library.llama_context_default_params()
        settings.n_ctx = max(_BATCH, 2 * self._capacity, length)
        settings.n_batch = settings.n_ubatch = settings.n_outputs_max = settings.n_outputs_max_per_seq = _BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        if self._exact:
            settings.type_k = settings.type_v = library.GGML_TYPE_F32
            settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
            settings.offload_kqv = settings.op_offload = False
        while self._contexts:
            library.llama_free(self._contexts.pop())
        complained()
        context = library.llama_init_from_model(self._model, settings)
        if not context:
            raise InputError(f"llama.cpp cannot make a context of {settings.n_ctx} tokens: {complained()}")
        self._contexts.append(context)
        self._capacity, self._ids = int(settings.n_ctx), []
        if past:
            self._read(past)


def _free(library: Any, model: Any, contexts: Sequence[Any]) -> None:
    for context in contexts:
        library.llama_free(context)
    library.llama_model_free(model)


def open_exactly(path: Path) -> LlamaModel:
    """Opens a GGUF file whose weights llama.cpp has decoded to fp32. Everything runs in fp32."""
    with TemporaryDirectory(prefix="gyroquant-") as folder:
        plain = Path(folder) / path.name
        check_room(plain, sum(4 * tensor.numbers for tensor in stored_tensors(path).values()))
        write_decoded(path, plain)
        return LlamaModel(plain, exact=True)


class LlamaTokenizer:
    """The tokenizer of a GGUF file as llama.cpp runs it, with the interface of transformers.

    Raises InputError if the file does not have a tokenizer.
    """

    def __init__(self, model: LlamaModel):
        self._model, self._library = model, model.library
        if self._library.llama_vocab_type(model.vocab) == self._library.LLAMA_VOCAB_TYPE_NONE:
            raise InputError("the GGUF file has none that llama.cpp supports")
        self.chat_template = model.chat_template()
        self.ends = [i for i in range(model.words) if self._library.llama_vocab_is_eog(model.vocab, i)]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The tokens of a text. Names of special tokens in the text become these tokens."""
        return {"input_ids": tokenize(self._library, self._model.vocab, text, add_special_tokens)}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of some tokens. An incomplete character becomes U+FFFD."""
        tokens = (self._library.llama_token * len(ids))(*ids)
        capacity = 16
        while True:
            text = ctypes.create_string_buffer(capacity)
            arguments = (tokens, len(ids), text, capacity, False, not skip_special_tokens)
            length = self._library.llama_detokenize(self._model.vocab, *arguments)
            if length >= 0:
                return text.raw[:length].decode(errors="replace")
            capacity = -length

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> str:
        """A conversation as text, by the model's chat template."""
        settings.pop("tokenize", None)
        special = {f"{kind}_token": self._special(kind) for kind in ("bos", "eos")}
        rendered = render_jinja_template([list(messages)], chat_template=self.chat_template, **settings, **special)
        return str(rendered[0][0])

    def _special(self, kind: str) -> str:
        token = getattr(self._library, f"llama_vocab_{kind}")(self._model.vocab)
        return self._library.llama_vocab_get_text(self._model.vocab, token).decode() if token >= 0 else ""


class LlamaCppRuntime(Runtime):
    """llama.cpp, on the CPU where it runs exactly. Its kernels for rounded weights round what these meet to 8 bits; it
    runs exactly with weights that it has itself decoded to fp32. Where it is not installed, our own reader opens the
    file; also where the file has types of ik_llama.cpp, which llama.cpp does not read.
    """

    title = "llama.cpp"
    instead = GgufRuntime
    unpadded = "it reads texts of different lengths in parallel, without padding"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        self._model = open_exactly(folder / GGUF_FILE) if exact else LlamaModel(folder / GGUF_FILE)

    @classmethod
    def installed(cls) -> bool:
        return installed()

    @classmethod
    def refuses(cls, folder: Path) -> str:
        return why_not_llama_cpp(folder / GGUF_FILE)

    def tokenizer(self) -> Any:
        return LlamaTokenizer(self._model)

    def start(self) -> None:
        self._model.forget()

    def feed(self, ids: Tensor) -> Tensor:
        return self._model.feed(ids[0].tolist())
