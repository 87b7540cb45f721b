"""llama.cpp through its Python binding: a file as it is, or decoded to fp32 first, and its tokenizers.

Its kernels round what meets rounded weights to 8 bits. So a file is run exactly by having llama.cpp decode all of it to
fp32 first, by its own code, and running that with everything else in fp32 too.
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
from gyroquant.export.folder import check_room
from gyroquant.export.gguf import FILE
from gyroquant.export.gguf_header import stored_tensors
from gyroquant.export.llama_cpp import binding, complained, rewrite, tokenize
from gyroquant.runtimes.base import Runtime
from gyroquant.runtimes.gguf import GgufRuntime

_BATCH = 512


class LlamaModel:
    """A GGUF file opened by llama.cpp, with its text so far.

    Raises InputError where llama.cpp is not installed, or does not open the file.
    """

    def __init__(self, path: Path, exact: bool = False):
        self.library, self._exact = binding(), exact
        settings = self.library.llama_model_default_params()
        if exact:  # on the CPU, weights as they are stored, and in memory: the file does not stay
            settings.n_gpu_layers, settings.use_extra_bufts = 0, False
            settings.load_mode = self.library.LLAMA_LOAD_MODE_NONE
        complained()
        self._model = self.library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise InputError(f"llama.cpp does not open {path}: {complained()}")
        self.vocab = self.library.llama_model_get_vocab(self._model)
        self.words = int(self.library.llama_vocab_n_tokens(self.vocab))
        self._contexts: list[Any] = []  # none or one
        self._room, self._ids = 0, list[int]()
        weakref.finalize(self, _free, self.library, self._model, self._contexts)

    def forget(self) -> None:
        """Forgets all text."""
        self._ids = []
        for context in self._contexts:
            self.library.llama_memory_clear(self.library.llama_get_memory(context), True)

    def feed(self, ids: Sequence[int]) -> Tensor:
        """Reads on; returns the logits behind each token, (length, words)."""
        if len(self._ids) + len(ids) > self._room:
            self._make_room(len(self._ids) + len(ids))
        return self._read(ids)

    def chat_template(self) -> str | None:
        """How the model was taught to read a conversation, where the file says it."""
        found = self.library.llama_model_chat_template(self._model, None)
        return found.decode() if found else None

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
            raise InputError(f"llama.cpp does not read on after {start} tokens (it says {failed}): {complained()}")
        rows = [self.library.llama_get_logits_ith(context, i) for i in range(count)]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(row, (self.words,)) for row in rows]))

    def _make_room(self, length: int) -> None:
        """A context for at least so many tokens and the double of what there was, which reads the text again."""
        library, past = self.library, self._ids
        settings = library.llama_context_default_params()
        settings.n_ctx = max(_BATCH, 2 * self._room, length)
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
            raise InputError(f"llama.cpp has no room for a text of {settings.n_ctx} tokens: {complained()}")
        self._contexts.append(context)
        self._room, self._ids = int(settings.n_ctx), []
        if past:
            self._read(past)


def _free(library: Any, model: Any, contexts: Sequence[Any]) -> None:
    for context in contexts:
        library.llama_free(context)
    library.llama_model_free(model)


def open_exactly(path: Path) -> LlamaModel:
    """A GGUF file with its weights decoded to fp32 by llama.cpp, all of which is then run in fp32."""
    with TemporaryDirectory(prefix="gyroquant-") as place:
        plain = Path(place) / path.name
        check_room(plain, sum(4 * one.numbers for one in stored_tensors(path).values()))
        rewrite(path, plain, "F32")
        return LlamaModel(plain, exact=True)


class LlamaTokenizer:
    """The tokenizer of a GGUF file as llama.cpp runs it, with the methods by which transformers' are called.

    Raises InputError for a file that has none.
    """

    def __init__(self, model: LlamaModel):
        self._model, self._library = model, model.library
        if self._library.llama_vocab_type(model.vocab) == self._library.LLAMA_VOCAB_TYPE_NONE:
            raise InputError("the GGUF file has none that llama.cpp knows")
        self.chat_template = model.chat_template()
        self.ends = [i for i in range(model.words) if self._library.llama_vocab_is_eog(model.vocab, i)]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The tokens of a text; special ones are known by their names."""
        return {"input_ids": tokenize(self._library, self._model.vocab, text, add_special_tokens)}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of some tokens; a character that is not complete comes out as U+FFFD."""
        given = (self._library.llama_token * len(ids))(*ids)
        room = 16
        while True:
            text = ctypes.create_string_buffer(room)
            arguments = (given, len(ids), text, room, False, not skip_special_tokens)
            length = self._library.llama_detokenize(self._model.vocab, *arguments)
            if length >= 0:
                return text.raw[:length].decode(errors="replace")
            room = -length

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> str:
        """A conversation as text, as the model was taught to read it."""
        settings.pop("tokenize", None)
        special = {f"{kind}_token": self._special(kind) for kind in ("bos", "eos")}
        found = render_jinja_template([list(messages)], chat_template=self.chat_template, **settings, **special)
        return str(found[0][0])

    def _special(self, kind: str) -> str:
        token = getattr(self._library, f"llama_vocab_{kind}")(self._model.vocab)
        return self._library.llama_vocab_get_text(self._model.vocab, token).decode() if token >= 0 else ""


class LlamaCppRuntime(Runtime):
    """llama.cpp, on the CPU where it runs exactly. Its kernels for rounded weights round what these meet to 8 bits; it
    runs exactly with weights that it has itself decoded to fp32. Where it is not installed, our own reader opens the
    file.
    """

    formats = ("gguf",)
    title = "llama.cpp"
    package = "llama_cpp"
    instead = GgufRuntime
    unpadded = "it reads texts of different length side by side, without padding"

    def __init__(self, folder: Path, exact: bool):
        super().__init__(folder, exact)
        self._model = open_exactly(folder / FILE) if exact else LlamaModel(folder / FILE)

    def tokenizer(self) -> Any:
        return LlamaTokenizer(self._model)

    def start(self) -> None:
        self._model.forget()

    def feed(self, ids: Tensor) -> Tensor:
        return self._model.feed(ids[0].tolist())
