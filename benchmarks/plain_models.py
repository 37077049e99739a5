"""Small models as anybody would write them in plain PyTorch: `nn` modules and a loop over tokens.

They compute what ours compute, with parameters of the same names, so that both can have the same weights. The loops are
the definitions, as in flash-linear-attention's `naive_recurrent_*` and `transformers`' and mambapy's step functions.
Written with care where care costs no thought: tensors are unbound along time once, as indexing them token by token
would make the backward quadratic in T (`token_by_token` says how much slower that is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.mixers.deltanet import DeltaNetConfig
from statetrack.mixers.mamba import MambaConfig
from statetrack.mixers.mlstm import MLSTMConfig
from statetrack.model import ModelConfig

token_by_token = False
"""Index tensors token by token, `x[:, t]`, as flash-linear-attention's naive functions do."""


def tokens(x: Tensor) -> Iterator[Tensor]:
    return iter([x[:, t] for t in range(x.shape[1])] if token_by_token else x.unbind(1))


class PlainModel(nn.Module):
    """Token ids [B, T] -> logits, with the parameters of a `LanguageModel` of the same config without MLPs."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.output_size or config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        mixer, kinds = config.mixer, {DeltaNetConfig: PlainDeltaNet, MambaConfig: PlainMamba, MLSTMConfig: PlainMLSTM}
        (made,) = [kind(config.d_model, mixer) for of, kind in kinds.items() if isinstance(mixer, of)]
        self.mixer = made

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.mixer_norm(x))


def causal_convolution(channels: int, size: int, *, bias: bool) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, size, groups=channels, padding=size - 1, bias=bias)


def convolved(convolution: nn.Module, x: Tensor) -> Tensor:
    return convolution(x.mT)[..., : x.shape[1]].mT


class PlainDeltaNet(nn.Module):
    """DeltaNet and DeltaProduct with eigenvalues in [-1, 1].

    Attributes:
        rule: computes DeltaNet's outputs in place of the loop, from q, k, v [B, H, T, K] and beta [B, H, T]; it scales
            q by itself.
    """

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None

    def __init__(self, d_model: int, config: DeltaNetConfig) -> None:
        super().__init__()
        self.heads, self.factors = config.num_heads, config.num_householder
        d, n = d_model, config.num_householder
        self.q_proj, self.o_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = nn.Linear(d, n * d, bias=False), nn.Linear(d, n * d, bias=False)
        self.b_proj = nn.Linear(d, n * self.heads, bias=False)
        self.o_norm = nn.RMSNorm(d // self.heads, eps=config.output_norm_eps)
        sizes = {"q": d, "k": n * d, "v": n * d}
        self.convolutions = nn.ModuleDict(
            {name: causal_convolution(size, config.conv_size, bias=False) for name, size in sizes.items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        h, n, size = self.heads, self.factors, d // self.heads
        q, k, v = (
            F.silu(convolved(convolution, projection(x)))
            for convolution, projection in zip(
                self.convolutions.values(), (self.q_proj, self.k_proj, self.v_proj), strict=True
            )
        )
        q = F.normalize(q.reshape(b, t, h, size), dim=-1) * size**-0.5
        k = F.normalize(k.reshape(b, t, n, h, size), dim=-1)
        v = v.reshape(b, t, n, h, size)
        beta = 2 * torch.sigmoid(self.b_proj(x)).view(b, t, n, h)
        if self.rule is not None:
            o = self.rule(*(y.transpose(1, 2) for y in (q * size**0.5, k[:, :, 0], v[:, :, 0], beta[:, :, 0])))
            return self.o_proj(self.o_norm(o.transpose(1, 2)).flatten(2))
        state, outputs = x.new_zeros(b, h, size, size), []
        for q_t, k_t, v_t, beta_t in zip(*map(tokens, (q, k, v, beta)), strict=True):
            for j in range(n):
                error = v_t[:, j] - torch.einsum("bhk,bhkv->bhv", k_t[:, j], state)
                state = state + torch.einsum("bhk,bhv->bhkv", k_t[:, j], beta_t[:, j, :, None] * error)
            outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, state))
        return self.o_proj(self.o_norm(torch.stack(outputs, 1)).flatten(2))


class PlainMamba(nn.Module):
    """Mamba with eigenvalues in [-1, 1]."""

    def __init__(self, d_model: int, config: MambaConfig) -> None:
        super().__init__()
        inner, self.size = config.expand * d_model, config.state_size
        self.rank = config.dt_rank or -(-d_model // 16)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = causal_convolution(inner, config.conv_size, bias=True)
        self.x_proj = nn.Linear(inner, self.rank + 2 * self.size, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, self.size))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(convolved(self.conv1d, u))
        low, write, read = self.x_proj(u).split([self.rank, self.size, self.size], -1)
        dt = F.softplus(self.dt_proj(low))
        decay = 2 * torch.exp(dt.unsqueeze(-1) * -torch.exp(self.A_log)) - 1
        written = (dt * u).unsqueeze(-1) * write.unsqueeze(2)
        state, outputs = torch.zeros_like(decay[:, 0]), []
        for decay_t, written_t, read_t in zip(*map(tokens, (decay, written, read)), strict=True):
            state = decay_t * state + written_t
            outputs.append((state @ read_t.unsqueeze(-1)).squeeze(-1))
        return self.out_proj((torch.stack(outputs, 1) + self.D * u) * F.silu(z))


class PlainMLSTM(nn.Module):
    """mLSTM with eigenvalues in [-1, 1]."""

    def __init__(self, d_model: int, config: MLSTMConfig) -> None:
        super().__init__()
        self.heads, self.cap = config.num_heads, config.gate_soft_cap
        self.q, self.k = (nn.Linear(d_model, d_model // 2, bias=False) for _ in range(2))
        self.v, self.ogate_preact = (nn.Linear(d_model, d_model, bias=False) for _ in range(2))
        self.igate_preact, self.fgate_preact = (nn.Linear(d_model, self.heads) for _ in range(2))
        self.multihead_norm = nn.ParameterDict({"weight": torch.ones(d_model)})
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, _, d = x.shape
        h, k_size, v_size = self.heads, d // 2 // self.heads, d // self.heads
        q = self.q(x).unflatten(-1, (h, k_size)) * k_size**-0.5
        k, v = self.k(x).unflatten(-1, (h, k_size)), self.v(x).unflatten(-1, (h, v_size))
        log_input = self.cap * torch.tanh(self.igate_preact(x) / self.cap)
        forget = 2 * torch.sigmoid(self.cap * torch.tanh(self.fgate_preact(x) / self.cap)) - 1
        memory, normalizer = x.new_zeros(b, h, k_size, v_size), x.new_zeros(b, h, k_size)
        m, outputs = x.new_zeros(b, h), []
        for q_t, k_t, v_t, i_t, f_t in zip(*map(tokens, (q, k, v, log_input, forget)), strict=True):
            before = m
            with torch.no_grad():
                m = torch.maximum(f_t.abs().log() + before, i_t)
            kept, written = f_t * torch.exp(before - m), torch.exp(i_t - m)
            memory = kept[..., None, None] * memory + torch.einsum("bhk,bhv->bhkv", written.unsqueeze(-1) * k_t, v_t)
            normalizer = kept.unsqueeze(-1) * normalizer + written.unsqueeze(-1) * k_t
            scale = torch.maximum((normalizer * q_t).sum(-1).abs(), torch.exp(-m)) + 1e-6
            outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, memory) / scale.unsqueeze(-1))
        read = torch.stack(outputs, 1)
        read = F.layer_norm(read, (v_size,), eps=1e-6).flatten(2) * self.multihead_norm["weight"]
        return self.out_proj(read * torch.sigmoid(self.ogate_preact(x)))
