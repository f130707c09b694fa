"""Write a small checkpoint in the layout of state-spaces/mamba-130m-hf, to try the commands on without a download.

    python examples/sample_checkpoint.py ./sample-checkpoint

The folder holds config.json, two safetensors files with their index, and tokenizer.json (a byte-level BPE), with
the keys, tensor names and dtype of the published one; transformers loads it as well.

Nothing is trained by gradient descent. The weights are random with a fixed seed, except two, computed in
closed form: the last layer's out_proj and the scale of the final norm. The random layers are run once over
shakespeare.txt (beside this file, public domain), and ridge regression maps the channels of the last mixer to
the log probabilities of the next token, counted after one and two tokens of that text. A recurrent network that
is read out this way is called an echo state network. The text it makes looks like a play from afar and means
nothing: enough to see whether decoding works. `--random` leaves every weight random.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = Path(__file__).with_name("shakespeare.txt")
END_OF_TEXT = "<|endoftext|>"

LAYERS, HIDDEN, INNER, STATE, KERNEL, RANK, VOCAB = 2, 512, 1024, 16, 4, 32, 512
EPSILON = 1e-5
CHUNK = 128
"""Tokens that the fit runs in one piece; longer memory is not fitted."""
RIDGE = 3.0
"""Weight of the ridge penalty, in tokens of average size."""
TARGET = 20.0
"""Scale of what the last layer adds, so that it outweighs the residual of the layers before."""

CONFIG = {
    "architectures": ["MambaForCausalLM"],
    "bos_token_id": 0,
    "conv_kernel": KERNEL,
    "d_inner": INNER,
    "d_model": HIDDEN,
    "eos_token_id": 0,
    "expand": INNER // HIDDEN,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.1,
    "intermediate_size": INNER,
    "layer_norm_epsilon": EPSILON,
    "model_type": "mamba",
    "n_layer": LAYERS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": STATE,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": RANK,
    "time_step_scale": 1.0,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": VOCAB,
}


def make_tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE of :data:`VOCAB` tokens; id 0 ends a text, as in the published tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def random_weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, float32, with the spread that trained ones have."""

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    def uniform(*shape: int, low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    # Orthogonal rows of the length that normal ones would have (VOCAB is at most HIDDEN).
    rows = torch.linalg.qr(normal(HIDDEN, VOCAB, std=1.0))[0].T * math.sqrt(HIDDEN)
    weights = {"backbone.embeddings.weight": rows.contiguous()}
    taps = torch.tensor([0.1, 0.2, 0.8, 1.5])  # the last tokens matter most
    for layer in range(LAYERS):
        prefix = f"backbone.layers.{layer}"
        step = torch.exp(uniform(INNER, low=math.log(0.001), high=math.log(0.1)))
        weights |= {
            f"{prefix}.norm.weight": uniform(HIDDEN, low=0.8, high=1.2),
            f"{prefix}.mixer.in_proj.weight": normal(2 * INNER, HIDDEN, std=1.5 / math.sqrt(HIDDEN)),
            f"{prefix}.mixer.conv1d.weight": normal(INNER, 1, KERNEL, std=0.6) * taps,
            f"{prefix}.mixer.conv1d.bias": normal(INNER, std=0.3),
            f"{prefix}.mixer.x_proj.weight": normal(RANK + 2 * STATE, INNER, std=1 / math.sqrt(INNER)),
            f"{prefix}.mixer.dt_proj.weight": uniform(INNER, RANK, low=-1, high=1) / math.sqrt(RANK),
            f"{prefix}.mixer.dt_proj.bias": step + torch.log(-torch.expm1(-step)),  # inverse softplus
            f"{prefix}.mixer.A_log": torch.arange(1.0, STATE + 1).log().repeat(INNER, 1)
            + normal(INNER, STATE, std=0.1),
            f"{prefix}.mixer.D": uniform(INNER, low=0.5, high=1.5),
            f"{prefix}.mixer.out_proj.weight": normal(HIDDEN, INNER, std=0.05 / math.sqrt(INNER)),
        }
    weights["backbone.norm_f.weight"] = torch.ones(HIDDEN)
    return weights


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x [..., H]`` over its root mean square, times ``weight [H]``."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def mixer_channels(weights: dict[str, torch.Tensor], layer: int, h: torch.Tensor) -> torch.Tensor:
    """What out_proj of ``layer`` is given: ``h [B, L, H]`` before its norm -> ``y [B, L, D]``."""
    p = {name: weights[f"backbone.layers.{layer}.mixer.{name}"] for name in ("A_log", "D", "conv1d.weight")}
    linear = {
        name: weights[f"backbone.layers.{layer}.mixer.{name}.weight"]
        for name in ("in_proj", "x_proj", "dt_proj")
    }
    x, z = (rms_norm(h, weights[f"backbone.layers.{layer}.norm.weight"]) @ linear["in_proj"].T).chunk(2, -1)
    bias = weights[f"backbone.layers.{layer}.mixer.conv1d.bias"]
    u = F.silu(F.conv1d(F.pad(x.mT, (KERNEL - 1, 0)), p["conv1d.weight"], bias, groups=INNER)).mT
    dt, b, c = (u @ linear["x_proj"].T).split([RANK, STATE, STATE], -1)
    dt = F.softplus(dt @ linear["dt_proj"].T + weights[f"backbone.layers.{layer}.mixer.dt_proj.bias"])
    a = -torch.exp(p["A_log"])
    state, ys = torch.zeros(h.shape[0], INNER, STATE), []
    for t in range(h.shape[1]):
        state = torch.exp(dt[:, t, :, None] * a) * state + (dt[:, t] * u[:, t]).unsqueeze(-1) * b[:, t, None]
        ys.append((state * c[:, t, None]).sum(-1))
    return (torch.stack(ys, 1) + p["D"] * u) * F.silu(z)


def next_token_log_probabilities(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``log P [T, V]`` of the token after each of ``inputs [B, L]``, counted in the text itself.

    Counts after two tokens lean on counts after one, and these on plain frequencies (Witten and Bell's way of
    interpolating, with fixed weights).
    """
    current = inputs.flatten()
    previous = F.pad(inputs, (1, 0))[:, :-1].flatten()
    ones = torch.ones(len(targets))
    single = torch.bincount(targets, minlength=VOCAB) + 0.5
    single = single / single.sum()
    pair = torch.zeros(VOCAB, VOCAB).index_put_((current, targets), ones, accumulate=True)
    pair = (pair + 3 * single) / (pair.sum(1, keepdim=True) + 3)
    contexts, which = (previous * VOCAB + current).unique(return_inverse=True)
    triple = torch.zeros(len(contexts), VOCAB).index_put_((which, targets), ones, accumulate=True)
    triple = (triple + 0.6 * pair[contexts % VOCAB]) / (triple.sum(1, keepdim=True) + 0.6)
    return triple.log()[which]


def fit_to_text(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
    """Set the last out_proj and the scale of the final norm so that ``ids [T]`` are predicted, in closed form."""
    chunks = ids[: (len(ids) - 1) // CHUNK * CHUNK + 1]
    inputs, targets = chunks[:-1].view(-1, CHUNK), chunks[1:]
    embedding = weights["backbone.embeddings.weight"]
    h = embedding[inputs]
    for layer in range(LAYERS - 1):
        h = (
            h
            + mixer_channels(weights, layer, h) @ weights[f"backbone.layers.{layer}.mixer.out_proj.weight"].T
        )
    y, h = mixer_channels(weights, LAYERS - 1, h).flatten(0, 1), h.flatten(0, 1)
    # The embedding's rows are orthogonal and the head is tied to it: logits x come out of the hidden state
    # x E / H. Least squares with a penalty then asks y W^T + h to be that state for the wanted logits.
    wanted = next_token_log_probabilities(inputs, targets)
    wanted = TARGET * (wanted - wanted.mean(1, keepdim=True)) @ embedding / HIDDEN - h
    gram = y.T @ y + RIDGE * y.square().mean() * torch.eye(INNER)
    out_proj = torch.linalg.solve(gram, y.T @ wanted).T
    weights[f"backbone.layers.{LAYERS - 1}.mixer.out_proj.weight"] = out_proj.contiguous()
    # The scale that makes the text likeliest: the norm's weight acts as an inverse temperature.
    logits = rms_norm(y[:2048] @ out_proj.T + h[:2048], torch.ones(HIDDEN)) @ embedding.T
    scales = torch.logspace(-2.5, 0.5, 40)
    losses = torch.stack([F.cross_entropy(logits * scale, targets[:2048]) for scale in scales])
    weights["backbone.norm_f.weight"] *= scales[losses.argmin()]


def write_checkpoint(folder: Path, weights: dict[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    """config.json, two safetensors files and their index, tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: int(".layers." in name and int(name.split(".")[2]) >= LAYERS // 2) for name in weights}
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, file in enumerate(files):
        part = {name: tensor.contiguous() for name, tensor in weights.items() if half[name] == number}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
        "weight_map": {name: files[half[name]] for name in sorted(weights)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    # config.json comes last: a folder that has it is whole.
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def main() -> None:
    """Write the checkpoint into the folder given on the command line."""
    parser = argparse.ArgumentParser(
        description="Write a small sample checkpoint in the layout of mamba-130m-hf."
    )
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument(
        "--random", action="store_true", help="leave all weights random (the text is noise then)"
    )
    args = parser.parse_args()
    text = TEXT.read_text()
    tokenizer = make_tokenizer(text)
    weights = random_weights(torch.Generator().manual_seed(0))
    if not args.random:
        fit_to_text(weights, torch.tensor(tokenizer.encode(text).ids))
    write_checkpoint(args.folder, weights, tokenizer)
    print(f"wrote {args.folder}: {sum(map(torch.Tensor.numel, weights.values())):,} parameters, float32")


if __name__ == "__main__":
    main()
