"""Small data for classifiers as files that a user would have, and encoders to make classifiers of."""

import gzip

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from classifier_runs import images

GOOD, BAD = ("good", "great", "fine"), ("bad", "poor", "dull")
WORDS = (*GOOD, *BAD, "a", "film", "plot", "very", "the", "and")


def write_idx(folder, *, train=240, test=60):
    """Three classes of 8 x 8 images in MNIST's format: a lying bar, a standing bar, a spot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", train, 0), ("t10k", test, 1)):
        data = images(count, seed=seed)
        for kind, values in (("images-idx3", data.inputs[..., 0]), ("labels-idx1", data.labels.numpy())):
            sizes = b"".join(int(size).to_bytes(4, "big") for size in values.shape)
            content = bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content, mtime=0))
    return folder


def write_texts(path, count=240, *, seed=0, header=False, apart=None):
    """Sentences of few words: positive if there are more good words than bad ones, tab, label.

    No sentence comes twice, nor stands in the file `apart`.
    """
    random = np.random.default_rng(seed)
    lines = ["text\tlabel"] if header else []
    known = set() if apart is None else set(apart.read_text(encoding="utf-8").splitlines())
    while len(lines) < count + header:
        words = random.choice(WORDS, size=random.integers(2, 12)).tolist()
        score = sum(word in GOOD for word in words) - sum(word in BAD for word in words)
        line = f"{' '.join(words)}\t{int(score > 0)}"
        if score and line not in known:
            known.add(line)
            lines.append(line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_resnet(folder):
    """A tiny ResNet for grey images, with random weights."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "layer_type": "basic"}
    hf.ResNetModel(hf.ResNetConfig(num_channels=1, **sizes)).save_pretrained(folder)
    return folder


def save_bert(folder):
    """A tiny BERT with a tokenizer of the few words, with random weights."""
    torch.manual_seed(0)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    hf.BertModel(hf.BertConfig(vocab_size=len(names), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder
