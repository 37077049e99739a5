"""What a model can never do: the spectra of its layers, and which theorems speak of them.

Every statement has a scope, from the strongest to the weakest:

- "architecture": holds for all weights of this configuration;
- "vocabulary, exact": holds for these weights and every token; of a first layer that sees the current token alone;
- "sound bound": holds for these weights and all inputs that a layer can get, by the norms of its weights; the truth may
  be better. Of layers whose matrices are products of symmetric ones, behind an RMS norm (`mixers.bounds`);
- "measured": what random words showed. It proves nothing.

The theorems are those of `requirements`. Of attention, LSTMs and models with any such layer none of them speaks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor

from statetrack import seeds
from statetrack.mixers import MixerConfig
from statetrack.mixers.bounds import FactorBounds
from statetrack.mixers.deltanet import DeltaNetConfig
from statetrack.mixers.mixer import WidenedMixerConfig
from statetrack.model import Block, LanguageModel
from statetrack.transition import Diagonal, Discretized, EigenvalueRange, Householder, Transition

Scope = Literal["architecture", "vocabulary, exact", "sound bound", "measured"]
Capability = Literal["parity", "counting modulo m", "first letter"]

FADED = 2.0**-8
"""A part of the state that has shrunk by this factor is lost beside the rest in bfloat16."""

REAL = 1e-6
"""Imaginary parts up to this are rounding errors of the eigenvalue solver."""

MOST_TOKENS = 4096
"""Larger vocabularies are measured on words and not token by token."""

_PRODUCTS = (1, 2, 3)


@dataclass(frozen=True)
class Structure:
    """What holds for the matrices of a layer whatever its weights and inputs are; nothing unless it is known.

    Attributes:
        contraction: norms of at most 1.
        real: every matrix has real eigenvalues.
        nonnegative: every matrix has eigenvalues in [0, inf).
        real_products: every product of matrices has real eigenvalues.
        rests: products have no eigenvalue of modulus 1 but 1 itself.
    """

    contraction: bool = False
    real: bool = False
    nonnegative: bool = False
    real_products: bool = False
    rests: bool = False


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one head, or of its products of several tokens.

    Attributes:
        layer: from 0.
        head: from 0.
        scope: for what they hold.
        tokens: how many tokens' matrices are multiplied.
        lowest: the least real part; of a sound bound none is less.
        largest: the largest modulus; of a sound bound none is larger, and so on.
        imaginary: the largest imaginary part.
        horizon: tokens after which what the most lasting negative or non-real eigenvalue carries has shrunk to
            `FADED`; None if there is none, inf if it never shrinks. Of a sound bound that leaves room for non-real ones
            it is about those with a negative real part: a turn by a small angle may last longer.
        beta_gap: how far the largest beta stays from 2; None for matrices that are no reflections.
        values: some of the eigenvalues, as pairs of real and imaginary part, for pictures; of a sound bound points
            around the region that holds them.
    """

    layer: int
    head: int
    scope: Scope
    tokens: int
    lowest: float
    largest: float
    imaginary: float
    horizon: float | None
    beta_gap: float | None
    values: tuple[tuple[float, float], ...] = field(repr=False)

    def lasting(self) -> str:
        """The horizon in words; empty if there is none."""
        if self.horizon is None:
            return ""
        if self.horizon == math.inf:
            return "as long as can be told" if self.scope == "sound bound" else "for ever"
        count = math.ceil(self.horizon)
        most = "at most " if self.scope == "sound bound" else ""
        return f"{most}{count:,} application{'s' * (count != 1)}"


@dataclass(frozen=True)
class Claim:
    """Something that the model can't do.

    Attributes:
        capability: what.
        scope: for what it holds.
        theorem: why.
        assumption: under which assumption.
        sentence: in plain words.
    """

    capability: Capability
    scope: Scope
    theorem: str
    assumption: str
    sentence: str


@dataclass(frozen=True)
class Certificate:
    """What `certify` found.

    Attributes:
        claims: what is ruled out; nothing is said about the rest.
        spectra: of every layer and head.
        structures: what holds for each layer by its architecture.
        note: why no theorem speaks of this model; empty if some do.
    """

    claims: tuple[Claim, ...]
    spectra: tuple[Spectrum, ...]
    structures: tuple[Structure | None, ...]
    note: str = ""

    def rules_out(self, capability: Capability) -> bool:
        return any(claim.capability == capability for claim in self.claims)

    def data(self) -> dict[str, Any]:
        """As JSON has it; a horizon without end is the string "inf"."""
        data = asdict(self)
        for spectrum in data["spectra"]:
            if spectrum["horizon"] == math.inf:
                spectrum["horizon"] = "inf"
        return data

    def __str__(self) -> str:
        lines = [f"{claim.sentence} [{claim.scope}; {claim.theorem}; {claim.assumption}]" for claim in self.claims]
        lines = lines or [self.note or "no theorem here rules anything out"]
        for s in self.spectra:
            of = "a token" if s.tokens == 1 else f"{s.tokens} tokens"
            parts = [
                f"layer {s.layer} head {s.head}, {of} ({s.scope}): real parts from {s.lowest:.6f}",
                f"moduli up to {s.largest:.6f}",
                f"imaginary parts up to {s.imaginary:.4f}",
            ]
            if s.horizon is not None:
                parts.append(f"what flips or turns lasts {s.lasting()}")
            if s.beta_gap is not None:
                parts.append(f"beta stays {s.beta_gap:.2g} from 2")
            lines.append(", ".join(parts))
        return "\n".join(lines)


@torch.no_grad()
def certify(
    model: LanguageModel, data: Tensor | None = None, *, seed: int = 0, words: int = 4, length: int = 32
) -> Certificate:
    """Certifies a model, trained or compiled, with any mixer.

    Args:
        model: the model, on the CPU.
        data: token ids [B, T] on which spectra are measured; None for random words.
        seed: of the random words.
        words: how many.
        length: their length.

    Raises:
        ValueError: if the data are no token ids of the model.
    """
    if data is None:
        random = seeds.generator("certificate", seed)
        data = torch.randint(model.config.vocab_size, (words, length), generator=random)
    measured = model.transitions(data)
    mixers = model.config.layer_mixers()
    structures = tuple(None if t is None else structure(t, mixer) for t, mixer in zip(measured, mixers, strict=True))
    spectra: list[Spectrum] = []
    vocabulary = _vocabulary_transition(model)
    if vocabulary is not None:
        spectra += _spectra(vocabulary, 0, "vocabulary, exact", structures[0], products=(1,))
    bounds = [_bounds(model, layer) for layer in range(len(mixers))]
    for layer, transition in enumerate(measured):
        if (found := bounds[layer]) is not None:
            spectra += [_bound_spectrum(found, layer, head) for head in range(found.lo.shape[1])]
        if transition is not None:
            spectra += _spectra(transition, layer, "measured", structures[layer], products=_PRODUCTS)
    known = [s for s in structures if s is not None]
    if len(known) < len(structures):
        note = "no theorem here speaks of models with layers that have no state-transition matrix, such as attention"
        return Certificate((), tuple(spectra), structures, note)
    return Certificate(tuple(_claims(model, known, bounds, spectra)), tuple(spectra), structures)


@singledispatch
def structure(transition: Transition, config: MixerConfig) -> Structure:
    """What holds for all matrices of this kind under a config; nothing for kinds that are not registered here."""
    return Structure()


@structure.register
def _(transition: Householder, config: MixerConfig) -> Structure:
    factors = _range(config, "eigenvalue_range")
    decays = _range(config, "decay_range") if transition.decay is not None else EigenvalueRange(0, 1)
    if factors is None or decays is None:
        return Structure()  # a range that nobody declared
    count = transition.k.shape[2]
    if not transition.normalize:
        # A `DeltaNet` makes keys unit vectors all the same, up to rounding. With beta up to 1 a factor then has
        # eigenvalues from a rounding error below 0 to 1, far from -1; with beta up to 2 it may pass -1.
        unit = isinstance(config, DeltaNetConfig) and factors.lo >= 0 and decays.lo >= 0
        return Structure(contraction=unit, rests=unit)
    matrices = count + int(transition.decay is not None and transition.decay.ndim == 4)
    positive = factors.lo >= 0 and decays.lo >= 0
    # A product of two positive semidefinite matrices has eigenvalues of 0 or above; one of three need not.
    nonnegative = positive and matrices <= 2
    one = count == 1 and (decays.lo >= 0 or matrices == 1)
    return Structure(
        contraction=True,
        real=nonnegative or one,
        nonnegative=nonnegative,
        real_products=transition.k.shape[-1] == 1,
        rests=positive,
    )


@structure.register(Diagonal)
@structure.register(Discretized)
def _(transition: Diagonal | Discretized, config: MixerConfig) -> Structure:
    declared = config.spectrum()
    if declared is None:
        return Structure(real=True, real_products=True)
    if config.rotary_positions:  # seen from the rotating keys, the state turns as well as decays
        return Structure(contraction=True, rests=declared.hi < 1)
    positive = declared.lo >= 0
    return Structure(contraction=True, real=True, nonnegative=positive, real_products=True, rests=positive)


def _range(config: MixerConfig, name: str) -> EigenvalueRange | None:
    """What the config says that gates may reach, a lower end that is learned included."""
    value = getattr(config, name, None)
    if isinstance(config, WidenedMixerConfig) and name == "eigenvalue_range":
        value = config.gate_range()
    return value if isinstance(value, EigenvalueRange) else None


def _sees_one_token(block: Block) -> bool:
    """Whether the mixer of a first layer sees the current token alone: no convolution, nothing else that remembers."""
    return set(block.mixer.init_state(1)) == {"recurrence"}


def _vocabulary_transition(model: LanguageModel) -> Transition | None:
    """The first layer's matrices for every token, [1, vocabulary, ...].

    None if it sees more than the current token, or if there are more tokens than are worth a table.
    """
    block = model._blocks()[0]
    if model.config.vocab_size > MOST_TOKENS or not _sees_one_token(block):
        return None
    return block.mixer.transition(block.mixer_input(model.embedding.weight.unsqueeze(0)))


def _bounds(model: LanguageModel, layer: int) -> FactorBounds | None:
    block = model._blocks()[layer]
    scale = block.mixer_input_scale()
    return None if scale is None else block.mixer.factor_bounds(scale)


def _bound_spectrum(bounds: FactorBounds, layer: int, head: int) -> Spectrum:
    """The region that holds the eigenvalues of every matrix of a head: an interval, or a disc that ends at 1."""
    interval, spread = bounds.real_interval(head), bounds.spread(head)
    if interval is not None:
        lowest, highest = interval
        imaginary, moving = 0.0, max(0.0, -lowest)
        values = ((lowest, 0.0), (highest, 0.0))
    else:
        # The disc between (1 - R) / (1 + R) and 1; with a real part below 0 moduli end where it crosses that axis.
        radius = spread / (1 + spread) if spread < math.inf else 1.0
        lowest, highest, imaginary = 1 - 2 * radius, 1.0, radius
        moving = math.sqrt(max(0.0, 2 * radius - 1))
        angles = [2 * math.pi * step / 48 for step in range(49)]
        values = tuple((1 - radius + radius * math.cos(a), radius * math.sin(a)) for a in angles)
    return Spectrum(
        layer=layer,
        head=head,
        scope="sound bound",
        tokens=1,
        lowest=lowest,
        largest=max(abs(lowest), abs(highest)),
        imaginary=imaginary,
        # Gates are computed in float32, which has nothing between this and -1.
        horizon=_horizon(moving if moving < 1 - 2**-24 else 1.0) if moving > 0 else None,
        beta_gap=None if bounds.beta is None else 2 - float(bounds.beta[head]),
        values=values,
    )


def _horizon(modulus: float) -> float:
    """Applications after which an eigenvalue of this modulus has shrunk to `FADED`."""
    return math.inf if modulus >= 1 - 1e-12 else 0.0 if modulus == 0 else math.log(FADED) / math.log(modulus)


def _claims(
    model: LanguageModel, structures: list[Structure], bounds: list[FactorBounds | None], spectra: list[Spectrum]
) -> list[Claim]:
    claims = []
    layers = len(structures)
    every = f"finite precision, answers that stay apart by a margin, {layers} layer{'s' * (layers > 1)}"
    exact = [s for s in spectra if s.scope == "vocabulary, exact"]
    if all(s.nonnegative for s in structures):
        claims.append(
            Claim(
                "parity", "architecture", "T1", every, "cannot solve parity: no eigenvalue lies below 0 or off the axis"
            )
        )
    elif all(s.nonnegative or s.rests for s in structures):
        claims.append(
            Claim(
                "parity",
                "architecture",
                "unit modulus (ours)",
                every,
                "cannot solve parity: eigenvalues may lie below 0, but none of modulus 1 does, and what flips fades",
            )
        )
    elif layers == 1 and exact and all(s.lowest >= 0 and s.imaginary <= REAL for s in exact):
        claims.append(
            Claim("parity", "vocabulary, exact", "T1", every, "cannot solve parity: no token has an eigenvalue below 0")
        )
    elif all(s.nonnegative or _stays_positive(b) for s, b in zip(structures, bounds, strict=True)):
        claims.append(
            Claim(
                "parity",
                "sound bound",
                "T1",
                every,
                "cannot solve parity: with these weights no input takes an eigenvalue below 0 or off the axis",
            )
        )
    if all(s.rests for s in structures):
        claims.append(
            Claim(
                "counting modulo m",
                "architecture",
                "unit modulus (ours)",
                every,
                "cannot count how often a letter is repeated modulo any m above 1: what repeats comes to rest",
            )
        )
    elif all(s.real_products for s in structures):
        claims.append(
            Claim(
                "counting modulo m",
                "architecture",
                "T2",
                every,
                f"cannot count how often a letter is repeated modulo m unless m divides {2**layers}: all products have "
                "real eigenvalues",
            )
        )
    elif layers == 1 and structures[0].real:
        claims.append(
            Claim(
                "counting modulo m",
                "architecture",
                "T2",
                every,
                "cannot count how often a letter is repeated modulo any m above 2: one layer, real eigenvalues",
            )
        )
    # A head that also reads the state before the update sees one letter more, as a convolution does.
    before = model.config.layer_mixers()[0].reads_before_update()
    if layers == 1 and structures[0].contraction and not before and _sees_one_token(model._blocks()[0]):
        claims.append(
            Claim(
                "first letter",
                "architecture",
                "O2 (ours)",
                every + ", the current token alone, norms of at most 1",
                "cannot tell the first letter of a word, nor a*b*, exactly: one layer without a short convolution",
            )
        )
    return claims


def _stays_positive(bounds: FactorBounds | None) -> bool:
    """Whether all matrices of a layer have eigenvalues in [0, inf)."""
    if bounds is None:
        return False
    intervals = [bounds.real_interval(head) for head in range(bounds.lo.shape[1])]
    return all(interval is not None and interval[0] >= 0 for interval in intervals)


def _spectra(
    transition: Transition, layer: int, scope: Scope, known: Structure | None, products: tuple[int, ...]
) -> list[Spectrum]:
    found = []
    gaps = None
    # Products in float32 would be off by more than what an eigenvalue of -0.9999999 lacks to -1.
    transition = transition.map_tokens(torch.Tensor.double)
    if isinstance(transition, Householder):
        along = transition.effective_beta * transition.k.to(transition.effective_beta.dtype).square().sum(-1)
        gaps = (2 - along).abs().amin((0, 1, 2))
    for tokens in products:
        if transition.batch_shape[1] < tokens:
            continue
        values = _product_eigenvalues(transition, tokens, diagonal=known is not None and known.real_products)
        for head in range(values.shape[2]):
            of_head = values[:, :, head].flatten()
            moving = of_head[(of_head.real < -REAL) | (of_head.imag.abs() > REAL)].abs()
            horizon = None
            if len(moving):
                rho = float(moving.max())
                horizon = _horizon(rho)
            found.append(
                Spectrum(
                    layer=layer,
                    head=head,
                    scope=scope,
                    tokens=tokens,
                    lowest=float(of_head.real.min()),
                    largest=float(of_head.abs().max()),
                    imaginary=float(of_head.imag.abs().max()),
                    horizon=horizon,
                    beta_gap=float(gaps[head]) if gaps is not None and tokens == 1 else None,
                    values=_some(of_head),
                )
            )
    return found


def _product_eigenvalues(transition: Transition, tokens: int, *, diagonal: bool) -> Tensor:
    """Eigenvalues of the products of consecutive tokens' matrices: complex128 [B, T - tokens + 1, H, ...]."""
    values = transition.eigenvalues()
    if tokens == 1:
        return values
    count = values.shape[1] - tokens + 1
    if diagonal:
        return torch.stack([values[:, i : i + count] for i in range(tokens)]).prod(0)
    if isinstance(transition, Householder) and (transition.decay is None or transition.decay.ndim == 3):
        # The factors of all tokens in a row, and all of their decays: once more a product of so many factors.
        def along(x: Tensor) -> list[Tensor]:
            return [x[:, i : i + count] for i in range(tokens)]

        decay = None if transition.decay is None else torch.stack(along(transition.decay)).prod(0)
        k, beta = (torch.cat(along(x), 2) for x in (transition.k, transition.beta))
        return Householder(k, beta, decay, transition.normalize).eigenvalues()
    dense = transition.dense()
    product = dense[:, :count]
    for i in range(1, tokens):
        product = dense[:, i : i + count] @ product
    return torch.linalg.eigvals(product)


def _some(values: Tensor, most: int = 400) -> tuple[tuple[float, float], ...]:
    # On a grid of a ten-thousandth, as one integer a point: unique numbers are found much faster than unique rows.
    grid, width = torch.view_as_real(values).mul(1e4).round().long(), 1 << 31
    points = (grid[..., 0] * width + grid[..., 1] + width // 2).unique()
    if len(points) > most:
        points = points[torch.linspace(0, len(points) - 1, most).long()]
    x, y = points.div(width, rounding_mode="floor"), points.remainder(width) - width // 2
    return tuple(zip((x / 1e4).tolist(), (y / 1e4).tolist(), strict=True))
