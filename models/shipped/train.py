"""Train the small Qwen3-shaped models that octavo ships, from scratch, on one or two CPU cores.

    python models/shipped/train.py --model leaf-4m --out models/shipped/leaf-4m
    python models/shipped/train.py --model leaf-draft --out models/shipped/leaf-draft --tokenizer models/shipped/leaf-4m

The corpus comes from the Debian packages that `corpus.py` names; `--corpus` is a folder into which they are unpacked,
by this script if it is empty. Half of each batch is conversations from `conversations.py`. Same packages, same Python,
same seed and same number of threads: same weights.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from conversations import ConversationMaker
from corpus import documents, unpack_packages
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
END_OF_TEXT, _, IM_END, PAD = range(4)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = message.content | map(attribute='text') | join('') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Words with their leading space, single digits, runs of punctuation, white space: as GPT-4 and Qwen split.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SOURCE_WEIGHTS = {  # of the half of a batch that is not conversations
    "python3.11-doc": 0.52, "wordnet-base": 0.24, "dict-jargon": 0.12, "golang-1.19-src": 0.06, "dict-devil": 0.06,
}  # fmt: skip


class Stage(NamedTuple):
    """A part of the training, at one depth."""

    num_layers: int
    num_steps: int
    seq_len: int  # tokens of a row


class Recipe(NamedTuple):
    """The shape of a model and how long it is trained."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    stages: tuple[Stage, ...]


# A shallow model learns as much from a token for less compute at first, so the deep one starts shallow and grows.
# Source: Gong et al., "Efficient training of BERT by progressively stacking", ICML 2019.
RECIPES = {
    "leaf-4m": Recipe(256, 704, 4, 2, 64, (Stage(2, 400, 256), Stage(4, 650, 256), Stage(4, 50, 512))),
    "leaf-draft": Recipe(128, 384, 2, 1, 64, (Stage(2, 700, 256), Stage(2, 100, 512))),
}


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer that encodes any text and decodes it unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def render_chat(messages: list[dict[str, str]]) -> str:
    """Write a conversation as `CHAT_TEMPLATE` does."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


class Batches:
    """Draws the rows of a batch: one half windows of the corpus, one half packed conversations."""

    def __init__(self, streams: dict[str, torch.Tensor], chats: torch.Tensor, seed: int) -> None:
        self._streams = streams  # for each source its tokens, one document after the other
        self._chats = chats  # [num_rows, longest seq_len + 1]
        self._chance = random.Random(seed)

    def draw(self, num_rows: int, seq_len: int) -> torch.Tensor:
        """Return `[num_rows, seq_len + 1]` token ids."""
        size = seq_len + 1
        rows = [self._chats[self._chance.randrange(len(self._chats))][:size] for _ in range(num_rows // 2)]
        sources = self._chance.choices(list(_SOURCE_WEIGHTS), list(_SOURCE_WEIGHTS.values()), k=num_rows - len(rows))
        for source in sources:
            start = self._chance.randrange(len(self._streams[source]) - size)
            rows.append(self._streams[source][start : start + size])
        return torch.stack(rows).long()


def pack_chats(tokenizer: Tokenizer, maker: ConversationMaker, num_rows: int, seq_len: int) -> torch.Tensor:
    """Return `[num_rows, seq_len + 1]` rows, each of which opens with the start of a conversation."""
    rows: list[list[int]] = []
    row: list[int] = []
    while len(rows) < num_rows:
        row += [*tokenizer.encode(render_chat(maker.make())).ids, END_OF_TEXT]
        if len(row) > seq_len:
            rows.append(row[: seq_len + 1])
            row = []
    return torch.tensor(rows, dtype=torch.int16)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Replace each matrix of `[n, rows, cols]` by nearly the nearest one with orthonormal rows or columns.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Newton-Schulz iteration.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(4):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for matrices; in float32, as torch's own needs bfloat16 in hardware."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever passed
        """Update every matrix, those of one shape together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                updates = []
                for param in params:
                    assert param.grad is not None
                    buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    buffer.lerp_(param.grad, 1 - group["momentum"])
                    updates.append(param.grad.lerp(buffer, group["momentum"]))
                scale = math.sqrt(max(1.0, shape[0] / shape[1]))
                for param, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    param.mul_(1 - group["lr"] * 0.02)
                    param.add_(update, alpha=-group["lr"] * scale)


def make_config(recipe: Recipe, num_layers: int) -> Qwen3Config:
    """Return the model configuration of a recipe at a depth."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IM_END,
        pad_token_id=PAD,
    )


def grow(small: Qwen3ForCausalLM, recipe: Recipe, num_layers: int) -> Qwen3ForCausalLM:
    """Return a deeper model that computes the same: each added layer is a copy that adds nothing yet."""
    large = Qwen3ForCausalLM(make_config(recipe, num_layers))
    depth = small.config.num_hidden_layers
    # Layer `i` of the large model copies layer `origins[i]`; the second copy of a layer is silenced.
    origins = sorted([*range(depth), *(range(depth - (num_layers - depth), depth))])
    weights = {name: w for name, w in small.state_dict().items() if ".layers." not in name}
    for index, origin in enumerate(origins):
        for name, weight in small.model.layers[origin].state_dict().items():
            silent = index > 0 and origins[index - 1] == origin and name.endswith(("o_proj.weight", "down_proj.weight"))
            weights[f"model.layers.{index}.{name}"] = torch.zeros_like(weight) if silent else weight.clone()
    large.load_state_dict(weights)
    return large


def make_optimizers(model: Qwen3ForCausalLM, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers, and AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if not (p.dim() == 2 and ".layers." in name)]
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.97), weight_decay=0.0)
    optimizers: list[torch.optim.Optimizer] = [Muon(inner, muon_lr), adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def learning_rate_factor(step: int, num_steps: int, *, num_warmup: int = 40, decay_share: float = 0.5) -> float:
    """Return the share of the peak learning rate at a step: warm up, stay, then fall in a line to zero."""
    decay = (num_steps - step) / max(1.0, num_steps * decay_share)
    return min((step + 1) / num_warmup, 1.0, decay)


def loss_of(model: Qwen3ForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy, in nats, of predicting each token of the rows but the first."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the loss on each set of held out rows."""
    model.train(False)
    losses = {name: round(loss_of(model, rows).item(), 3) for name, rows in held_out.items()}
    model.train()
    return losses


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder that `from_pretrained` reads, the weights in bfloat16."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy = Qwen3ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    # No sampling parameters: over HTTP, requests that name none get those that every client of OpenAI's API expects.
    copy.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=PAD
    )
    copy.bfloat16().save_pretrained(partial)
    tokenizer.save(str(partial / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (partial / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir()):  # one by one, so that a reader always finds a whole file
        path.chmod(0o644)
        path.replace(out / path.name)
    partial.rmdir()


def prepare(
    corpus: Path, known_tokenizer: Path | None, seq_len: int, seed: int
) -> tuple[Tokenizer, Batches, dict[str, torch.Tensor]]:
    """Read the corpus and return the tokenizer, the training batches and the held out rows."""
    if not corpus.is_dir() or not any(corpus.iterdir()):
        corpus.mkdir(parents=True, exist_ok=True)
        unpack_packages(corpus)
    texts = documents(corpus)
    maker = ConversationMaker(corpus, random.Random(seed))
    if known_tokenizer is not None:
        tokenizer = Tokenizer.from_file(str(known_tokenizer / "tokenizer.json"))
    else:
        chats = [message["content"] for _ in range(6000) for message in maker.make()]
        tokenizer = train_tokenizer(iter([*(text for _, text in texts), *chats]))
    streams: dict[str, list[int]] = {source: [] for source in _SOURCE_WEIGHTS}
    held_out_text: list[int] = []
    for index, (source, text) in enumerate(texts):
        ids = [*tokenizer.encode(text).ids, END_OF_TEXT]
        (held_out_text if index % 40 == 7 else streams[source]).extend(ids)
    num_windows = min(32, len(held_out_text) // (seq_len + 1))
    windows = torch.tensor(held_out_text).unfold(0, seq_len + 1, len(held_out_text) // num_windows - seq_len)
    held_out = {
        "text": windows[:num_windows].long(),
        "chat": pack_chats(tokenizer, ConversationMaker(corpus, random.Random(-seed - 1)), 16, seq_len).long(),
    }
    tensors = {source: torch.tensor(ids, dtype=torch.int16) for source, ids in streams.items()}
    chat_rows = pack_chats(tokenizer, maker, 3000, seq_len)
    num_tokens = {source: len(ids) for source, ids in streams.items()}
    print(f"{num_tokens} tokens, {len(chat_rows)} rows of chat", flush=True)
    return tokenizer, Batches(tensors, chat_rows, seed), held_out


def train(args: argparse.Namespace) -> None:
    """Train the model that the command line asks for."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.model]
    started = time.monotonic()
    seq_len = max(stage.seq_len for stage in recipe.stages)
    tokenizer, batches, held_out = prepare(args.corpus, args.tokenizer, seq_len, args.seed + args.resume)
    print(f"corpus ready after {time.monotonic() - started:.0f} s", flush=True)
    if args.resume:
        model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    else:
        model = Qwen3ForCausalLM(make_config(recipe, recipe.stages[0].num_layers))
    optimizers = make_optimizers(model, args.muon_lr, args.adam_lr)
    plan = [stage for stage in recipe.stages for _ in range(round(stage.num_steps * args.scale))]
    average = 0.0
    for step, stage in list(enumerate(plan))[args.resume :]:
        if stage.num_layers > model.config.num_hidden_layers:
            model = grow(model, recipe, stage.num_layers)
            optimizers = make_optimizers(model, args.muon_lr, args.adam_lr)
        factor = learning_rate_factor(step, len(plan))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        loss = loss_of(model, batches.draw(args.batch_tokens // stage.seq_len, stage.seq_len))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if step == args.resume else 0.95 * average + 0.05 * loss.item()
        if step % 50 == 49 or step == len(plan) - 1:
            elapsed = time.monotonic() - started
            print(f"step {step + 1}/{len(plan)} loss {average:.3f} after {elapsed:.0f} s", flush=True)
        if step % args.save_every == args.save_every - 1 or step == len(plan) - 1:
            print(f"held out: {evaluate(model, held_out)}", flush=True)
            save(model, tokenizer, args.out)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(RECIPES), default="leaf-4m")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint, written now and then")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder of the unpacked Debian packages")
    parser.add_argument("--tokenizer", type=Path, help="folder of a checkpoint whose tokenizer to reuse")
    parser.add_argument("--resume", type=int, default=0, help="continue --out from this step of the plan")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--save-every", type=int, default=200, help="steps between two checkpoints")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_args())
