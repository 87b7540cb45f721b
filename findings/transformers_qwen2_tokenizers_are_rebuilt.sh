#!/usr/bin/env bash
# transformers 5.23.0 (tokenizers 0.23.3), AutoTokenizer.from_pretrained on a folder with a tokenizer.json.
#
# One would guess: tokenizer.json is the whole tokenizer (normalizer, way to cut words, vocabulary, merges), so AutoTokenizer
# gives its tokens, at the very least where tokenizer_config.json names the generic class that takes the file as it is
# (PreTrainedTokenizerFast, or TokenizersBackend, which is what save_pretrained of this version writes).
#
# Really: for some model types the class that is written does not count. Beside a config.json of model_type qwen2 it
# becomes Qwen2Tokenizer, which takes vocabulary and merges out of tokenizer.json and drops its normalizer and
# pre-tokenizer for its own (NFC, Qwen's regular expression). The tokens are others, nothing warns, and save_pretrained
# writes a tokenizer.json of this other tokenizer. The same folder with model_type llama or qwen3 is right.
#
# Who meets it: models of the Qwen2 architecture with a tokenizer of their own (trained from scratch, for another language or
# for code): perplexity, calibration and generation are on tokens that the model was not trained on, and whatever loads and
# saves such a folder (a quantizer, a merge) passes the other tokenizer on. PreTrainedTokenizerFast.from_pretrained is right.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

transformers.logging.set_verbosity_warning()
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
text = "In 2024 we sold 12345 units, in 2025 123450.\n" * 9
raw = Tokenizer(models.BPE())
raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # as GPT-2 cuts words: numbers stay whole
raw.train_from_iterator(
    [text],
    trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
)
wanted = raw.encode(text).ids
right = {}
for model_type in ("llama", "qwen2", "qwen3"):
    for written in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        folder = Path(f"{model_type}-{written}")
        PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": written}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"] == wanted
        found = AutoTokenizer.from_pretrained(folder)
        ids = found(text)["input_ids"]
        right[model_type, written] = ids == wanted
        print(f"{model_type}, {written}: {type(found).__name__}, {len(ids)} tokens for {len(wanted)}, equal: {ids == wanted}")
        found.save_pretrained(folder / "again")
        saved = Tokenizer.from_file(str(folder / "again" / "tokenizer.json")).encode(text).ids
        assert (saved == wanted) == (ids == wanted), "what is saved is another tokenizer again"
expected = {key: key[0] != "qwen2" for key in right}
if right != expected:
    raise SystemExit(f"this changed: {right}")
PYTHON
