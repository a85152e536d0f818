"""Trains a small BERT whose attention is InfSA to say which library a docstring is from.

    python examples/text_classifier.py

The texts are the docstrings of the packages that this needs anyway, so nothing is downloaded. Their lengths differ: batches are
padded, and InfSA leaves padding out as keys and as queries. --variant softmax is the same model before it is converted.
"""

import argparse
import ast
import importlib.util
import random
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from infsa_kernels.nn import convert

LIBRARIES = ("networkx", "numpy", "sympy", "torch", "transformers")
WORDS = 60  # of a docstring, at most


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    texts = [(text, label) for label, name in enumerate(LIBRARIES) for text in docstrings(name, args.texts)]
    random.Random(args.seed).shuffle(texts)
    train, test = texts[len(texts) // 5 :], texts[: len(texts) // 5]
    tokenizer = word_pieces([text for text, _ in train])

    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=args.dim, num_hidden_layers=2, num_attention_heads=args.dim // 32,
        intermediate_size=4 * args.dim, max_position_embeddings=128, num_labels=len(LIBRARIES),
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    if args.variant != "softmax":
        report = convert(model, args.variant, score_floor=args.score_floor)
        print(report)
        model = report.model

    optimizer = torch.optim.AdamW(model.parameters(), args.rate, weight_decay=0.01)
    steps = args.epochs * -(-len(train) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, total_steps=steps)
    shuffled = random.Random(args.seed)
    for epoch in range(args.epochs):
        shuffled.shuffle(train)
        model.train()
        total = 0.0
        for batch in batches(train, args.batch):
            loss = F.cross_entropy(*scores(model, tokenizer, batch))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        right = accuracy(model, tokenizer, test, args.batch)
        print(
            f"epoch {epoch + 1}: loss {total / len(train):.3f}, accuracy {right:.1%} of {len(test)} others", flush=True
        )
    for text, label in test[:3]:
        found, _ = scores(model, tokenizer, [(text, label)])
        print(f"{LIBRARIES[label]}, taken for {LIBRARIES[found.argmax()]}: {text[:80]}")


def docstrings(library: str, count: int) -> list[str]:
    """The first paragraphs of docstrings of a package's source, each once, without the package's name."""
    root = Path(importlib.util.find_spec(library).origin).parent
    found: dict[str, None] = {}
    # From all over the package, and the same every time.
    files = sorted(root.rglob("*.py"))
    random.Random(0).shuffle(files)
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                words = text.split("\n\n")[0].lower().replace(library, "").split()
                if len(words) > 4:
                    found[" ".join(words[:WORDS])] = None
        if len(found) >= count:
            break
    return list(found)[:count]


def word_pieces(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of these texts' own words."""
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(texts, vocab_size=4000, min_frequency=2, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="[PAD]", model_max_length=128)


def batches(texts: list, size: int):
    return (texts[at : at + size] for at in range(0, len(texts), size))


def scores(model, tokenizer, batch: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
    """Of a padded batch, and its labels."""
    words = tokenizer([text for text, _ in batch], padding=True, truncation=True, return_tensors="pt")
    out = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).logits
    return out, torch.tensor([label for _, label in batch])


@torch.no_grad()
def accuracy(model, tokenizer, texts: list[tuple[str, int]], size: int) -> float:
    model.eval()
    right = 0
    for batch in batches(texts, size):
        found, labels = scores(model, tokenizer, batch)
        right += (found.argmax(1) == labels).sum().item()
    return right / len(texts)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variant", default="linear_infsa", help="linear_infsa, pure_infsa, multi_hop_infsa, or softmax")
    add(
        "--score-floor", type=float, default=0.1, help="of linear_infsa, whose keys are not tied here; 0 is the paper's"
    )
    add("--texts", type=int, default=1500, help="of each library")
    add("--dim", type=int, default=128)
    add("--epochs", type=int, default=8)
    add("--batch", type=int, default=32)
    add("--rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.variant != "linear_infsa":
        args.score_floor = 0.0
    return args


if __name__ == "__main__":
    main()
