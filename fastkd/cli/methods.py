"""What ``fastkd distill`` says of each method, and the method's own options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from fastkd.cli.arguments import fraction, numbers, positive, settings


class Defaults(NamedTuple):
    """What a method trains with unless told otherwise; the first kind of student is the default one."""

    epochs: float
    batch_size: int
    learning_rates: Mapping[str, float]


class Method(NamedTuple):
    """A command ``fastkd distill <name>``; ``fields`` are the options that its configuration has under their names."""

    help: str
    description: str
    example: str
    defaults: Defaults
    fields: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None]


def _mkd(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _sizes(parser)
    _distance(parser)
    add(
        "--hard-label-weight",
        type=float,
        default=0.0,
        help="weight of the hard-label loss, the cross-entropy with the labels (default 0)",
    )
    add(
        "--augment",
        type=positive(int),
        help="unlabelled variants to try per row, for the teacher to label (default: none)",
    )


def _mixkd(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _sizes(parser)
    _distance(parser)
    add("--alpha-mle", type=float, default=1.0, help="weight of the examples' labels (default 1)")
    add("--alpha-sm", type=float, default=1.0, help="weight of the mixtures' labels (default 1)")
    add("--alpha-tmkd", type=float, default=1.0, help="weight of the teacher's answers to mixtures (default 1)")
    add("--alpha-kd", type=float, default=0.0, help="weight of the teacher's answers to examples (default 0)")
    add("--n-mix", type=positive(int), default=1, help="mixtures of each example (default 1)")
    add("--beta-alpha", type=float, default=0.4, help="α of λ ~ Beta(α, α) (default 0.4)")
    add(
        "--lambda-per-batch",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="one λ per batch, not per example (default: no)",
    )
    add(
        "--mix-stage",
        choices=("word", "sum", "post_ln"),
        default="word",
        help="what is mixed: word, the word embeddings; sum, token types too, exact before the normalisation; "
        "post_ln, what the embedding module gives (default word)",
    )
    add(
        "--mix-mask",
        choices=("union", "first"),
        default="union",
        help="tokens of a mixture: union, where either example has one; first, a longer partner is cut (default union)",
    )
    add(
        "--mix-pads",
        choices=("embed", "zero"),
        default="embed",
        help="where one example has a pad: embed, its embedding takes part; zero, nothing does (default embed)",
    )


def _makd(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_rank_options(parser)
    add(
        "--calibration-rows",
        type=int,
        default=512,
        help="rows on which the factors keep most of what the matrices give; 0: they keep most of the weights "
        "(default 512)",
    )
    for part, what in MAKD_PARTS.items():
        add(f"--{part}-weight", type=float, default=1.0, help=f"weight of {what} (default 1)")
    add(
        "--matrix-form",
        choices=("output", "weight"),
        default="output",
        help="how matrices are compared: output, by what they give; weight, by themselves (default output)",
    )
    add("--temperature", type=float, default=1.0, help="temperature of the softmax of the answers (default 1)")
    add(
        "--layers",
        type=numbers(int),
        help="layers that are compared, from 0: 0,2,4 (default: all)",
    )
    add(
        "--stages",
        type=numbers(float),
        help="0.3,0.6 trains matrices, then layers, then answers, from these parts of the steps on (default: together)",
    )


def _baseline(name: str, parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--layers", type=positive(int), help="number of the teacher's first layers the student keeps (default 3)")
    if name != "theseus":
        add(
            "--parameters",
            type=positive(int),
            help="upper limit on the student's parameters; its word embedding becomes two factors to meet it "
            "(default: no limit)",
        )
    add("--options", type=settings, help="options of the baseline (docs/baselines.md): alpha=0.7,temperature=10")
    if name in TWO_STAGES:
        add("--switch", type=fraction, default=0.5, help="part of the steps that the first stage takes (default 0.5)")


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """The size of a low-rank student."""
    add = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--ratio", type=fraction, help="parameters of the student as a part of the teacher's (default 0.5)"
    )
    size.add_argument(
        "--parameters", type=positive(int), help="upper limit on the student's parameters; the ranks follow from it"
    )
    size.add_argument("--rank", type=positive(int), help="rank of every matrix, in place of a budget")
    add(
        "--allocation",
        choices=("uniform", "spectrum"),
        default="uniform",
        help="how a budget becomes ranks: uniform, one rank for all; spectrum, the next rank to the matrix where it "
        "keeps the largest part of the squared norm for the same part of the parameters (default uniform)",
    )
    add(
        "--factorize-embedding",
        action=argparse.BooleanOptionalAction,
        help="word embedding in two factors too (default: where the budget needs it)",
    )


def rank_options(args: argparse.Namespace) -> dict[str, Any]:
    """What ``plan_factorization`` takes of these."""
    size = {"ratio": args.ratio, "parameters": args.parameters, "rank": args.rank}
    if not any(size.values()):
        size["ratio"] = 0.5
    return {**size, "embedding": args.factorize_embedding, "allocation": args.allocation}


def _sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--preset",
        choices=("small", "mkd"),
        help="size of a bilstm without word embeddings: small, 2.7 M parameters; mkd, 10.2 M, MKD's as recalled "
        "(default small)",
    )
    add(
        "--layers",
        type=positive(int),
        help="of a transformer: number of the teacher's first layers the student keeps (default 3)",
    )


def _distance(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--loss",
        choices=("mse", "kl"),
        default="mse",
        help="distance of the logits: mse, the squared error; kl, T² · KL(teacher ‖ student) (default mse)",
    )
    add("--temperature", type=float, default=1.0, help="temperature of the softmax, for --loss kl (default 1)")


MAKD_PARTS = {
    "attention": "the attention maps' divergence",
    "hidden": "the hidden states' error",
    "mha": "the error of attention's linear maps",
    "ffn": "the error of the feed-forward part's linear maps",
    "logits": "the teacher's answers",
    "labels": "the labels",
}
_MIXING = ("n_mix", "beta_alpha", "lambda_per_batch", "mix_stage", "mix_mask", "mix_pads")
METHODS: dict[str, Method] = {
    "mkd": Method(
        "multi-task distillation into one student (Liu et al., arXiv 1911.03588)",
        "MKD: one multi-task student learns the logits of a fine-tuned multi-task teacher.",
        """example:
  fastkd distill mkd --teacher runs/teacher --tasks sst2,mrpc --student bilstm --output runs/mkd

A transformer student is made of the teacher's first layers.
""",
        Defaults(10.0, 128, {"bilstm": 2e-3, "transformer": 1e-4}),
        ("loss", "temperature", "hard_label_weight"),
        _mkd,
    ),
    "mixkd": Method(
        "distillation on mixtures of examples too (Liang et al., arXiv 2011.00593)",
        "MixKD: a student also learns the teacher's answers to mixtures of training examples.",
        """example:
  fastkd distill mixkd --teacher runs/teacher --tasks sst2 --student transformer --layers 3 --output runs/mixkd

A transformer student is made of the teacher's first layers.
""",
        Defaults(3.0, 32, {"transformer": 1e-4, "bilstm": 1e-3}),
        ("loss", "temperature", "alpha_mle", "alpha_sm", "alpha_tmkd", "alpha_kd", *_MIXING),
        _mixkd,
    ),
    "makd": Method(
        "a student of low-rank factors learns layers and matrices too (Liu et al., arXiv 2604.03110)",
        "MaKD: the teacher's matrices become two factors, which learn its attention, states, matrices and answers.",
        """example:
  fastkd factorize --model runs/teacher --ratio 0.5 --dry-run
  fastkd distill makd --teacher runs/teacher --tasks sst2 --ratio 0.5 --output runs/makd
""",
        Defaults(3.0, 32, {"low-rank": 1e-4}),
        (*(f"{part}_weight" for part in MAKD_PARTS), "matrix_form", "temperature", "layers", "stages"),
        _makd,
    ),
}
BASELINES = {
    "kd": ("logits at a temperature (Hinton et al., arXiv 1503.02531)", "KD"),
    "reverse-kl": ("logits by KL(student ‖ teacher)", "Reverse KL"),
    "jsd": ("logits by a generalised JSD (Agarwal et al., arXiv 2306.13649)", "JSD"),
    "pkd": ("logits and first tokens' states (Sun et al., arXiv 1908.09355)", "PKD"),
    "distilbert": ("logits and the last states' direction (Sanh et al., arXiv 1910.01108)", "DistilBERT"),
    "tinybert": ("attention scores and states, then logits (Jiao et al., arXiv 1909.10351)", "TinyBERT"),
    "minilm": ("the last layer's attention and values, then labels (Wang et al., arXiv 2002.10957)", "MiniLM"),
    "minilmv2": ("the last layer's relations, then labels (Wang et al., arXiv 2012.15828)", "MiniLMv2"),
    "theseus": ("layers that take the teacher's place (Xu et al., arXiv 2002.02925)", "BERT-of-Theseus"),
}
TWO_STAGES = ("tinybert", "minilm", "minilmv2")
METHODS |= {
    name: Method(
        f"baseline: {what}",
        f"{title}, as other methods are compared with it. The student is the teacher's first layers.",
        f"""example:
  fastkd distill {name} --teacher runs/teacher --tasks sst2 --layers 3 --output runs/{name}
""",
        Defaults(3.0, 32, {"transformer": 1e-4}),
        ("options", "switch") if name in TWO_STAGES else ("options",),
        partial(_baseline, name),
    )
    for name, (what, title) in BASELINES.items()
}
