"""The method: Eq. 1 to 9, and one class for each method of Table 1.

Read the equations, Method, Supervised and CycleGAN; the baselines follow. Symbols of the paper,
with B images in a batch, C channels, K classes and H x W pixels:

    x        (B, C, H, W)  labeled images, each channel (v - mean) / (max - min), so within [-1, 1]
    y        (B, H, W)     their masks: int64 class indices, IGNORE where a pixel does not count
    x_u      (B, C, H, W)  unlabeled images, the paper's x'
    logits   (B, K, H, W)  what G_IS returns; its softmax over K is the paper's G_IS(x)
    G_IS     image to segmentation: the network we want
    G_SI     segmentation (one-hot masks or softmax maps) to image
    D_S, D_I masks and images to one score per pixel, (B, 1, H, W): 1 is real, 0 is generated

A method needs no command line; its options are the paper's by default:

    >>> import torch
    >>> from model import CycleGAN
    >>> ours = CycleGAN(channels=1, n_classes=4, ngf=4, ndf=4, n_blocks=1)
    >>> x, x_u = 2 * torch.rand(2, 3, 1, 16, 16) - 1  # three images of each kind
    >>> y = torch.randint(4, (3, 16, 16))
    >>> list(ours.train().step(x, y, x_u))
    ['gen_S', 'gen_I', 'cycle_S', 'cycle_I', 'disc_S', 'disc_I', 'D_S', 'D_I']
    >>> ours.eval().segment(x).shape
    torch.Size([3, 4, 16, 16])
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from arch.discriminators import FCDiscriminator, PixelDiscriminator
from arch.generators import NormedConv2d, NormedConvTranspose2d, ResNetGenerator
from utils import IGNORE, InputError, NonFiniteLoss, count_per_process, n_connected, total

WEIGHTS = {  # lambda 1 to 5 of Eq. 8 (Section 3.3)
    "gen_I": 1.0,
    "cycle_S": 0.05,
    "cycle_I": 1.0,
    "disc_S": 1.0,
    "disc_I": 1.0,
}

# Equations. Expectations and norms are means over images, pixels and channels, as in the released
# code. With several processes, the mean of values over `count_per_process` is the whole batch's.


def mean_over(error: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of the error where `valid`, a mask of its shape, is true; 0 if it is nowhere."""
    if valid is None:
        return error.mean()
    return (error * valid).sum() / count_per_process(valid.sum())


def gen_S(logits: Tensor, y: Tensor) -> Tensor:
    """Eq. 1, 2: cross-entropy H(y, G_IS(x)), mean over the pixels that count; 0 if none does."""
    # reduction="sum" has no deterministic kernel on GPUs
    error = F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="none")
    return error.sum() / count_per_process((y != IGNORE).sum())


def gen_I(fake_x: Tensor, x: Tensor) -> Tensor:
    """Eq. 3: squared error between G_SI(y) and x, over all pixels."""
    return F.mse_loss(fake_x, x)


def disc(real: Tensor, fake: Tensor, valid: Tensor | None = None) -> Tensor:
    """Eq. 4, 5, the discriminator's side: (D(real) - 1)^2 + D(fake)^2.

    `valid`, a mask of real's shape, selects the real pixels that count.
    """
    return mean_over((real - 1).square(), valid) + fake.square().mean()


def fool(fake: Tensor) -> Tensor:
    """Eq. 4, 5, the generators' side: (D(fake) - 1)^2.

    Eq. 8 subtracts the discriminators' loss, which read literally is -D(fake)^2. Least-squares GANs
    [19] and the released code pull D(fake) to "real" instead; so do we.
    """
    return (fake - 1).square().mean()


def cycle_I(rec_x: Tensor, x: Tensor) -> Tensor:
    """Eq. 6: L1 distance between G_SI(G_IS(x')) and x'."""
    return F.l1_loss(rec_x, x)


def cycle_S(logits: Tensor, y: Tensor) -> Tensor:
    """Eq. 7: cross-entropy H(y, G_IS(G_SI(y))), as Eq. 2."""
    return gen_S(logits, y)


def one_hot(y: Tensor, n_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Masks (B, H, W) to (B, K, H, W); IGNORE becomes the zero vector."""
    classes = torch.arange(n_classes, device=y.device).view(1, -1, 1, 1)
    return (y.unsqueeze(1) == classes).to(dtype)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Eq. 9: inside, these networks are fixed; gradients pass through them to their inputs."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


def descend(optimizer: Optimizer, loss: Tensor, terms: dict[str, Tensor]) -> None:
    """Take one optimizer step; raise NonFiniteLoss before it if the loss is not finite."""
    finite = total((~loss.detach().isfinite()).int()) == 0
    finite = finite.to("cpu", non_blocking=loss.is_cuda)
    known = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None
    optimizer.zero_grad()
    loss.backward()
    if known:
        known.synchronize()  # waits for the forward pass only, while the backward pass runs
    if not finite:
        means = {name: total(term.detach()) / n_connected() for name, term in terms.items()}
        raise NonFiniteLoss(", ".join(f"{name} {mean.item():g}" for name, mean in means.items()))
    optimizer.step()


class Side(nn.Module):
    """The networks of one optimizer and the terms it descends: what DDP wraps."""

    def __init__(self, networks: Iterable[nn.Module], terms: Callable):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.terms = terms

    def forward(self, *batch):
        return self.terms(*batch)


class Method(nn.Module):
    """G_IS, the optimizers and the step (Eq. 8, 9) that every method shares.

    channels, n_classes: of the images and masks. ngf, n_blocks, dropout: of the generators. lr,
    betas: of Adam. bf16: compute the networks in bfloat16.

    A subclass adds its networks, calls `optimize` for them, and defines `weights` and
    `generator_terms`, with discriminators also `discriminator_terms`.
    """

    progress = 0.0  # share of the run that is done; the training loop sets it before every step
    uses_unlabeled = True  # whether a step needs x_u

    def __init__(
        self,
        channels: int,
        n_classes: int,
        *,
        ngf: int = 64,
        n_blocks: int = 9,
        dropout: float = 0.0,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        bf16: bool = False,
    ):
        super().__init__()
        self.n_classes, self.bf16 = n_classes, bf16
        self.adam = {"lr": lr, "betas": tuple(betas), "fused": True}
        self.generator = {"ngf": ngf, "n_blocks": n_blocks, "dropout": dropout}
        self.G_IS = ResNetGenerator(channels, n_classes, **self.generator)
        self.weights = {"gen_S": 1.0}
        self.optimizers: dict[str, Optimizer] = {}
        self.sides: dict[str, nn.Module] = {}
        self.pools: dict[str, ReplayPool] = {}

    @classmethod
    def from_args(cls, spec, args) -> "Method":
        """The method for a dataset that the flags describe."""
        return cls(spec.channels, len(spec.classes), **cls.options(spec, args))

    @classmethod
    def options(cls, spec, args) -> dict:
        """The constructor's options as the flags give them."""
        keys = "ngf", "n_blocks", "dropout", "lr", "betas"
        return {key: getattr(args, key) for key in keys} | {"bf16": args.precision == "bf16"}

    def optimize(self, side: str, networks: list[nn.Module]) -> None:
        """Create the Adam optimizer (Section 3.3) of networks for one side of the step.

        side: "G", which descends generator_terms, or "D", which descends discriminator_terms.
        """
        terms = {"G": self.generator_terms, "D": self.discriminator_terms}[side]
        parameters = [parameter for network in networks for parameter in network.parameters()]
        self.optimizers[side] = Adam(parameters, **self.adam)
        self.sides[side] = Side(networks, terms)

    @property
    def evaluated(self) -> nn.Module:
        """The segmentation network that is scored and exported."""
        return self.G_IS

    def sources(self, weights: dict[str, Tensor], same_method: bool) -> dict[str, str]:
        """By network: the name of the network in another run's `weights` that it starts from."""
        names = [name for name, _ in self.named_children()]
        return {name: name for name in names if same_method or name == "G_IS"}

    def compute(self, network: nn.Module, x: Tensor) -> Tensor:
        """The network's output in x's dtype, computed in bfloat16 under --precision bf16."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return network(x).to(x.dtype)

    def segment(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) of G_IS; in eval mode, of the network that is scored."""
        return self.compute(self.G_IS if self.training else self.evaluated, x)

    def generator_terms(
        self, x: Tensor, y: Tensor, x_u: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The unweighted terms by name, and the fakes that discriminators see."""
        raise NotImplementedError

    def discriminator_terms(
        self, x: Tensor, y: Tensor, x_u: Tensor | None, fakes: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The losses by name; fakes: those of generator_terms, to be detached."""
        raise NotImplementedError

    def step(self, x: Tensor, y: Tensor, x_u: Tensor | None = None) -> dict[str, Tensor]:
        """Eq. 9, one alternation: generators with the discriminators fixed, then the opposite.

        Returns the unweighted terms by the paper's names and the discriminators' losses as D_S and
        D_I, detached, on the device. Raises NonFiniteLoss.
        """
        terms, fakes = self.sides["G"](x, y, x_u)
        loss = sum(self.weights[name] * term for name, term in terms.items())  # Eq. 8
        descend(self.optimizers["G"], loss, terms)
        losses = {}
        if "D" in self.sides:
            losses = self.sides["D"](x, y, x_u, fakes)
            # Eq. 4 + Eq. 5, without the weights of Eq. 8: a factor does not change Adam's step
            descend(self.optimizers["D"], sum(losses.values()), losses)
        return {name: term.detach() for name, term in (terms | losses).items()}

    def pictures(self, y: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The networks' outputs, masks (B, H, W) and images (B, C, H, W), for labeled images.

        logits: those of `segment` for the images.
        """
        return {"G_IS(x)": logits.argmax(1)}


class Supervised(Method):
    """Full (all labels) and Partial (some): G_IS trained with Eq. 1 only."""

    uses_unlabeled = False

    def __init__(self, channels: int, n_classes: int, **options):
        super().__init__(channels, n_classes, **options)
        self.optimize("G", [self.G_IS])

    def generator_terms(self, x, y, x_u):
        """Eq. 1, 2. Unlabeled images are not used."""
        return {"gen_S": gen_S(self.segment(x), y)}, {}


def as_sums(weights: dict[str, float], channels: int, height: int, width: int) -> dict[str, float]:
    """Scale the weights of Eq. 8 so that means are weighted like the sums in Eq. 2, 3, 6 and 7.

    Those sum over pixels, Eq. 3 and 6 also over channels. Eq. 4 and 5 are printed with one
    probability per image, so their mean over D's map stays; if they were sums over it, disc_S and
    disc_I would keep their weights. All weights are divided by H W, a common factor, to which Adam
    is invariant. Where pixels are ignored, the means of Eq. 2 and 7 stay those over the others.
    """
    factors = {"gen_I": channels, "cycle_I": channels}
    factors |= dict.fromkeys(("disc_S", "disc_I"), 1 / (height * width))
    return {name: weight * factors.get(name, 1) for name, weight in weights.items()}


class CycleGAN(Method):
    """Ours: two generators and two discriminators trained alternately on Eq. 8.

    weights: by term; WEIGHTS has those that are not given, gen_S has 1. A weight of 0, except that
    of gen_S, takes its term, and the networks that only it needs, out of the step. hard_fakes: D_S
    sees argmax maps of x_u, as released. ndf, disc_norm, disc_kernel: as in PixelDiscriminator.
    pool_size: of past fakes. options: those of Method.

        CycleGAN(channels=1, n_classes=4, ngf=16, weights={"disc_S": 0.1})
    """

    def __init__(
        self,
        channels: int,
        n_classes: int,
        *,
        weights: dict[str, float] | None = None,
        ndf: int = 64,
        disc_norm: str = "batch",
        disc_kernel: int = 1,
        hard_fakes: bool = False,
        pool_size: int = 0,
        **options,
    ):
        super().__init__(channels, n_classes, **options)
        self.G_SI = ResNetGenerator(n_classes, channels, **self.generator, tanh=True)
        self.D_S = PixelDiscriminator(n_classes, ndf, disc_norm, disc_kernel)
        self.D_I = PixelDiscriminator(channels, ndf, disc_norm, disc_kernel)
        if unknown := {*(weights or {})} - {"gen_S", *WEIGHTS}:
            expected = ", ".join(["gen_S", *WEIGHTS])
            raise ValueError(f"weights of {sorted(unknown)}: expected some of {expected}")
        self.weights = {"gen_S": 1.0, **WEIGHTS, **(weights or {})}
        self.hard_fakes = hard_fakes
        self.pools = {"y": ReplayPool(pool_size), "x": ReplayPool(pool_size)}
        on = self.active_terms()
        paints = on & {"gen_I", "cycle_S", "cycle_I", "disc_I"}
        self.optimize("G", [self.G_IS, self.G_SI] if paints else [self.G_IS])
        discriminators = {"disc_S": self.D_S, "disc_I": self.D_I}
        if used := [network for name, network in discriminators.items() if name in on]:
            self.optimize("D", used)

    @classmethod
    def options(cls, spec, args) -> dict:
        weights = {name: getattr(args, f"lambda{i}") for i, name in enumerate(WEIGHTS, 1)}
        if args.reduction == "sum":
            weights = as_sums(weights, spec.channels, *args.size)
        keys = "ndf", "disc_norm", "disc_kernel", "pool_size"
        options = {key: getattr(args, key) for key in keys}
        options |= {"weights": weights, "hard_fakes": args.disc_input == "argmax"}
        return super().options(spec, args) | options

    def active_terms(self) -> set[str]:
        """The names of the terms whose weight is not 0."""
        return {name for name, weight in self.weights.items() if weight}

    @property
    def uses_unlabeled(self) -> bool:
        """Whether a term with x_u has a weight: Eq. 4, 5 or 6."""
        return bool(self.active_terms() & {"cycle_I", "disc_S", "disc_I"})

    def paint(self, y: Tensor) -> Tensor:
        """G_SI: masks (B, H, W), one-hot masks or softmax maps (B, K, H, W) to (B, C, H, W)."""
        if y.dim() == 3:
            y = one_hot(y, self.n_classes, next(self.parameters()).dtype)
        return self.compute(self.G_SI, y)

    def generator_terms(self, x, y, x_u):
        """The terms of Eq. 8 and the fakes {"y": G_IS(x'), "x": G_SI(y)}.

        Terms whose weight is 0, and fakes that only they need, are left out. The backward pass
        leaves no gradient in the discriminators. x and x' pass through G_IS together, true and
        predicted masks through G_SI: instance norm works image by image, so the values are the
        same.
        """
        on, terms, fakes = self.active_terms(), {}, {}
        uses_x_u, uses_y = on & {"cycle_I", "disc_S"}, on & {"gen_I", "cycle_S", "disc_I"}

        logits = self.segment(torch.cat([x, x_u]) if uses_x_u else x)
        terms["gen_S"] = gen_S(logits[: len(x)], y)
        if uses_x_u:
            fakes["y"] = logits[len(x) :].softmax(1)  # (B, K, H, W)

        masks = [one_hot(y, self.n_classes, x.dtype)] if uses_y else []
        masks += [fakes["y"]] if "cycle_I" in on else []
        images = self.paint(torch.cat(masks)) if masks else None
        if uses_y:
            fakes["x"] = images[: len(y)]  # (B, C, H, W)
        if "gen_I" in on:
            terms["gen_I"] = gen_I(fakes["x"], x)
        if "cycle_S" in on:
            terms["cycle_S"] = cycle_S(self.segment(fakes["x"]), y)
        if "cycle_I" in on:
            terms["cycle_I"] = cycle_I(images[-len(x_u) :], x_u)

        if uses_x_u and self.hard_fakes:  # as released: the argmax, which passes no gradient
            fakes["y"] = one_hot(fakes["y"].argmax(1), self.n_classes, x.dtype)
        with frozen(self.D_S, self.D_I):
            if "disc_S" in on:
                terms["disc_S"] = fool(self.compute(self.D_S, fakes["y"]))
            if "disc_I" in on:
                terms["disc_I"] = fool(self.compute(self.D_I, fakes["x"]))
        return terms, fakes

    def discriminator_terms(self, x, y, x_u, fakes):
        """Eq. 4, 5 on the detached fakes; in two passes, as batch norm would mix them."""
        on, terms = self.active_terms(), {}
        if "disc_S" in on:
            real = self.compute(self.D_S, one_hot(y, self.n_classes, x_u.dtype))
            fake = self.compute(self.D_S, self.pools["y"](fakes["y"].detach()))
            terms["D_S"] = disc(real, fake, valid=(y != IGNORE).unsqueeze(1))
        if "disc_I" in on:
            real = self.compute(self.D_I, x_u)
            fake = self.compute(self.D_I, self.pools["x"](fakes["x"].detach()))
            terms["D_I"] = disc(real, fake)
        return terms

    def pictures(self, y, logits):
        """The outputs of both generators and of both cycles."""
        fake_x = self.paint(y)
        return {
            "G_IS(x)": logits.argmax(1),
            "G_SI(y)": fake_x,
            "G_SI(G_IS(x))": self.paint(logits.softmax(1)),
            "G_IS(G_SI(y))": self.segment(fake_x).argmax(1),
        }


class ReplayPool:
    """The released code's buffer of past fakes: with probability 1/2 swap a new one for an old one.

    A pool of size 0 (the paper) returns its input.
    """

    def __init__(self, size: int):
        self.size = size
        self.fakes: list[Tensor] = []

    def __call__(self, batch: Tensor) -> Tensor:
        if self.size == 0:
            return batch
        returned = []
        for fake in batch:
            if len(self.fakes) < self.size:
                self.fakes.append(fake.clone())  # a view would keep the whole batch
            elif torch.rand(()) < 0.5:
                slot = int(torch.randint(self.size, ()))
                fake, self.fakes[slot] = self.fakes[slot], fake.clone()
            returned.append(fake)
        return torch.stack(returned)


# Baseline: Hung et al., Adversarial learning for semi-supervised semantic segmentation (2018).


def bce(logits: Tensor, target: float, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of D's logits (B, 1, H, W) with 1 (real) or 0.

    Mean over the `valid` pixels; 0 if there is none.
    """
    truth = torch.full_like(logits, target)
    error = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return mean_over(error, valid)


def semi(logits: Tensor, score_map: Tensor, threshold: float) -> Tensor:
    """Cross-entropy of the prediction with its own argmax where sigmoid(score_map) >= threshold.

    logits (B, K, H, W), score_map (B, 1, H, W); mean over the selected pixels, 0 if there is none.
    No gradient passes through the argmax or the selection.
    """
    unsure = score_map.squeeze(1).sigmoid() < threshold
    return gen_S(logits, logits.argmax(1).masked_fill(unsure, IGNORE))


class AdvSemi(Method):
    """Hung et al. with our G_IS, trained from scratch.

    D_S tells masks from predictions and selects the pixels of x_u whose predictions become labels.
    """

    threshold, start = 0.2, 0.25  # confidence of D_S; share of the run before the term `semi`

    def __init__(self, channels: int, n_classes: int, *, ndf: int = 64, **options):
        super().__init__(channels, n_classes, **options)
        self.weights |= {"adv": 0.01, "semi_adv": 0.001, "semi": 0.1}
        self.D_S = FCDiscriminator(n_classes, ndf)
        self.optimize("G", [self.G_IS])
        self.optimize("D", [self.D_S])

    @classmethod
    def options(cls, spec, args) -> dict:
        return super().options(spec, args) | {"ndf": args.ndf}

    def generator_terms(self, x, y, x_u):
        """G_IS's terms with D_S fixed, and the softmax maps of x and x_u.

        gen_S: cross-entropy on x; adv, semi_adv: D_S should rate the maps of x, x_u as real; semi:
        cross-entropy of x_u with its own argmax where D_S's score is at least `threshold`.
        """
        logits = self.segment(torch.cat([x, x_u]))
        maps = logits.softmax(1)
        terms = {"gen_S": gen_S(logits[: len(x)], y)}
        with frozen(self.D_S):
            score_map = self.compute(self.D_S, maps[: len(x)])
            terms["adv"] = bce(score_map, 1.0, valid=(y != IGNORE).unsqueeze(1))
            score_map = self.compute(self.D_S, maps[len(x) :])
        terms["semi_adv"] = bce(score_map, 1.0)
        begun = self.progress >= self.start
        logits_u = logits[len(x) :]
        terms["semi"] = semi(logits_u, score_map, self.threshold) if begun else logits.new_zeros(())
        return terms, {"y": maps}

    def discriminator_terms(self, x, y, x_u, fakes):
        """Half the cross-entropy of predictions with 0, half that of true masks with 1.

        As in their code, predictions include those on unlabeled images. Ignored pixels do not
        count.
        """
        maps, valid = fakes["y"].detach(), (y != IGNORE).unsqueeze(1)
        valid_maps = torch.cat([valid, torch.ones_like(maps[len(y) :, :1], dtype=torch.bool)])
        fake = bce(self.compute(self.D_S, maps), 0.0, valid_maps)
        real = bce(self.compute(self.D_S, one_hot(y, self.n_classes, maps.dtype)), 1.0, valid)
        return {"D_S": (fake + real) / 2}


# Baseline beyond the paper: consistency under CutMix (French et al. 2020) with a mean teacher
# (Tarvainen and Valpola 2017).


def boxes(x: Tensor) -> Tensor:
    """One random box per image, bool (B, 1, H, W), with sides of 1/4 to 3/4 of the image's."""
    inside = []
    for n in x.shape[-2:]:
        side = 0.25 + 0.5 * torch.rand(len(x), 1, device=x.device)
        start = (1 - side) * torch.rand(len(x), 1, device=x.device)
        at = (torch.arange(n, device=x.device) + 0.5) / n
        inside.append((start <= at) & (at < start + side))
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)


def perturb(x: Tensor) -> Tensor:
    """Random contrast (±20%) and brightness (±0.1) per image, and noise of deviation 0.1.

    Values may leave [-1, 1].
    """
    draw = 2 * torch.rand(2, len(x), 1, 1, 1, dtype=x.dtype, device=x.device) - 1
    contrast, brightness = draw.unbind()
    return x * (1 + 0.2 * contrast) + 0.1 * brightness + 0.1 * torch.randn_like(x)


def check_mixable(n_images: int) -> None:
    """InputError for a single image, which CutMix would mix with itself."""
    if n_images < 2:
        raise InputError("CutMix needs two images per process; give a larger --batch-size")


def cutmix(student: Callable, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the student on mixed and perturbed images with masks mixed the same way.

    A box in each image is filled from another one; InputError if there is none. Mean over all
    pixels, where ignored ones add 0.
    """
    check_mixable(len(x))
    box = boxes(x)
    x_mixed = perturb(torch.where(box, x.roll(1, 0), x))
    y_mixed = torch.where(box.squeeze(1), y.roll(1, 0), y)
    error = F.cross_entropy(student(x_mixed), y_mixed, ignore_index=IGNORE, reduction="none")
    return error.mean()


class MeanTeacher(Method):
    """G_IS learns from labels and, under CutMix, from the masks of its own moving average.

    The average is evaluated. cutmix_on: which images are mixed and perturbed: "both", "unlabeled",
    or "labeled" (the control), which uses the true masks and no unlabeled image.
    """

    decay, ramp_up = 0.99, 0.25  # of the average; share of the run in which `cutmix` grows

    def __init__(self, channels: int, n_classes: int, *, cutmix_on: str = "both", **options):
        super().__init__(channels, n_classes, **options)
        self.weights["cutmix"] = 1.0
        self.cutmix_on, self.uses_unlabeled = cutmix_on, cutmix_on != "labeled"
        self.teacher = copy.deepcopy(self.G_IS).requires_grad_(False)
        self.follow = get_ema_multi_avg_fn(self.decay)
        self.optimize("G", [self.G_IS])

    @classmethod
    def options(cls, spec, args) -> dict:
        if args.training and args.cutmix_on != "both":
            check_mixable(args.batch_size // n_connected())  # before --overwrite deletes a run
        return super().options(spec, args) | {"cutmix_on": args.cutmix_on}

    @property
    def evaluated(self) -> nn.Module:
        """The moving average of G_IS."""
        return self.teacher

    def sources(self, weights, same_method):
        """As in every method; the average starts from the other run's, or from its G_IS."""
        has_teacher = any(key.startswith("teacher.") for key in weights)
        own = {"teacher": "teacher" if has_teacher else "G_IS"}
        return super().sources(weights, same_method) | own

    def generator_terms(self, x, y, x_u):
        """Eq. 1, 2, and `cutmix`, whose weight grows, on labeled or unlabeled images or both."""
        self.weights["cutmix"] = min(1.0, self.progress / self.ramp_up)
        terms = {"gen_S": gen_S(self.segment(x), y)}
        if self.uses_unlabeled:
            with torch.no_grad():
                y_u = self.compute(self.teacher, x_u).argmax(1)
            both = self.cutmix_on == "both"
            x, y = (torch.cat([x, x_u]), torch.cat([y, y_u])) if both else (x_u, y_u)
        terms["cutmix"] = cutmix(self.segment, x, y)
        return terms, {}

    def step(self, x, y, x_u=None):
        """One update of G_IS, then of its average."""
        losses = super().step(x, y, x_u)
        with torch.no_grad():
            self.follow(list(self.teacher.parameters()), list(self.G_IS.parameters()), None)
            for own, new in zip(self.teacher.buffers(), self.G_IS.buffers(), strict=True):
                own.copy_(new)  # running statistics; ResNetGenerator has none
        return losses


METHODS = {
    "supervised": Supervised,
    "cyclegan": CycleGAN,
    "advsemi": AdvSemi,
    "meanteacher": MeanTeacher,
}


def move(model: Method, device: torch.device) -> Method:
    """Move a method to a device; on a CPU in channels-last format, which speeds up convolutions."""
    layout = {"memory_format": torch.channels_last} if device.type == "cpu" else {}
    return model.to(device, **layout)


def distribute(model: Method, device: torch.device) -> None:
    """Average gradients over all processes."""
    for module in model.modules():
        if isinstance(module, (NormedConv2d, NormedConvTranspose2d)):
            module.bias.requires_grad_(False)  # DDP would wait for its gradient
    devices = [device] if device.type == "cuda" else None
    for name, side in model.sides.items():
        wrapped = DistributedDataParallel(side, device_ids=devices, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # batch norm's are equal; the argument is deprecated
        model.sides[name] = wrapped
