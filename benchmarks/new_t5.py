"""Make an untrained T5 and its tokenizer for parallel text, so that `offramp train` has something to begin with.

    python benchmarks/new_t5.py FOLDER FILE FILE [--vocabulary 5000] [--width 256] [--layers 6] [--decoder 6] [--seed 0]

The two files hold the same sentences, line by line. The tokenizer is a byte-pair encoding of both languages with T5's
special tokens; the model is T5 1.0 of the given size, without dropout and without the readout's scale. Its first values
differ from transformers', so that it learns to translate from 29,000 sentences: positions look at neighbours, tokens
that occur in the same pairs of sentences have similar embeddings, cross-attention looks for similar tokens and hands on
what it finds, and sublayers begin small. On Multi30k, after 250 steps of 32 sentences, the held-out loss was 4.52 with
transformers' first values, 4.35 with positions alone and 3.60 with all of them at a learning rate of 2e-4.
"""

import argparse
import gzip
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags
from scipy.sparse.linalg import svds
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: TID251 - for its type: first values are set here

PREFIX = "translate English to German:"  # in front of every source, so its words should be tokens
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
NOISE = 0.3  # share of random values in embeddings, so that words that always come together can be told apart
SUBLAYERS = 0.05  # scale of what sublayers add at first: more, and the residual stream loses the tokens


def lines(paths: list[Path]) -> Iterator[str]:
    """The lines of all files, which may be gzipped."""
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file


def new_tokenizer(paths: list[Path], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-pair encoding of the files' text."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PAD, EOS, UNK], show_progress=False)
    texts = chain([PREFIX] * 1000, (line.strip() for line in lines(paths)))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK)


def look_at_neighbours(attention: T5Attention, bidirectional: bool) -> None:
    """First values of a stack's position biases [buckets, heads]: local attention instead of nearly uniform one.

    Half of the heads prefer one place (before or behind, or itself), the others fall off with the distance at rates of
    1/2, 1/4, .. as ALiBi (Press et al., arXiv 2108.12409). Otherwise a T5 first has to learn that places matter.
    """
    farthest = attention.relative_attention_max_distance
    places = torch.arange(-farthest, farthest + 1 if bidirectional else 1)  # of what is looked at
    buckets = attention._relative_position_bucket(
        places, bidirectional, attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    )
    weight = attention.relative_attention_bias.weight
    half = weight.shape[1] // 2
    liked = ([-1, 1, -2, 2, 0, -3, 3, -4] if bidirectional else [0, -1, -2, -3, -4, -5, -6, -7])[:half]
    with torch.no_grad():
        for bucket in buckets.unique().tolist():
            near = places[buckets == bucket].float()
            for head in range(weight.shape[1]):
                if head < half:
                    weight[bucket, head] = 2 - (near - liked[head % 8]).abs().min().clamp(max=6)
                else:
                    weight[bucket, head] = -near.abs().mean() / 2 ** (head - half + 1)


def mean_alike(embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerFast, paths: list[Path]) -> None:
    """First values of embeddings [vocabulary, width]: latent semantics of pairs of sentences (Deerwester et al., 1990).

    A token's row is its place in the best approximation, of rank width, to the table of tokens by pairs of sentences,
    weighted by inverse document frequency: a word and its translation come out side by side. Tokens without a sentence
    keep their random values.
    """
    texts = [[line.strip() for line in lines([path])] for path in paths]
    if len({len(side) for side in texts}) != 1:
        raise SystemExit(f"the files hold {[len(side) for side in texts]} lines; each must be a translation")
    sides = [tokenizer(side, add_special_tokens=False)["input_ids"] for side in texts]
    pairs = [set(chain(*pair)) for pair in zip(*sides, strict=True)]
    token = np.array([token for pair in pairs for token in pair])
    place = np.repeat(np.arange(len(pairs)), [len(pair) for pair in pairs])
    table = csr_matrix((np.ones(len(token)), (token, place)), shape=(len(embeddings), len(pairs)))
    count = np.asarray(table.sum(1)).ravel()
    seen = torch.tensor(count > 0)
    table = diags(np.log(len(pairs) / np.maximum(count, 1))) @ table  # [vocabulary, pairs]
    norm = np.sqrt(np.asarray(table.multiply(table).sum(1)).ravel())
    left, values, _ = svds(diags(1 / np.where(norm > 0, norm, 1)) @ table, k=embeddings.shape[1], random_state=0)
    alike = torch.tensor(left * values**0.5, dtype=embeddings.dtype)
    turn, _ = torch.linalg.qr(torch.randn(embeddings.shape[1], embeddings.shape[1]))  # no dimension above another
    alike = torch.nn.functional.normalize(alike, dim=1) @ turn * embeddings.norm(dim=1).mean()
    embeddings[seen] = ((1 - NOISE**2) ** 0.5 * alike + NOISE * embeddings)[seen]


def look_up_translations(model: T5ForConditionalGeneration) -> None:
    """First values of cross-attention and of all sublayers' outputs, for embeddings that mean alike.

    Queries and keys are one projection, so a decoder's position looks at the source's tokens that mean what it holds,
    and outputs are the transpose of values, so that it takes up what they mean. Queries carry the scale T5 leaves out.
    """
    for block in model.decoder.block:
        cross = block.layer[1].EncDecAttention
        cross.q.weight.copy_(cross.k.weight * model.config.d_kv**-0.5)
        cross.o.weight.copy_(cross.v.weight.T)
    for name, weight in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            weight.mul_(SUBLAYERS)


def main() -> None:
    """Make both."""
    parser = argparse.ArgumentParser(description="Make an untrained T5 and its tokenizer.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", type=Path, nargs=2)
    parser.add_argument("--vocabulary", type=int, default=5000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--decoder", type=int, help="layers of the decoder; default: as many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = new_tokenizer(options.files, options.vocabulary)
    torch.manual_seed(options.seed)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=options.width, d_kv=32, d_ff=4 * options.width, num_layers=options.layers,
        num_decoder_layers=options.decoder or options.layers, num_heads=options.width // 32, decoder_start_token_id=0,
        tie_word_embeddings=False,  # means in transformers 5: readouts are not scaled by width^-0.5
        dropout_rate=0.0,  # a few epochs leave nothing to regularise
    ))  # fmt: skip
    with torch.no_grad():
        model.shared.weight.mul_(options.width**-0.5)  # so that AdamW moves them as fast as other weights
        mean_alike(model.shared.weight, tokenizer, options.files)
        look_up_translations(model)
    look_at_neighbours(model.encoder.block[0].layer[0].SelfAttention, bidirectional=True)
    look_at_neighbours(model.decoder.block[0].layer[0].SelfAttention, bidirectional=False)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"{options.folder}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
