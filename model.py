"""The method: Eq. 1 to 9 as pure functions, and one class for each row of Table 1 and for what goes beyond it.

Symbols of the paper, with B images a batch, C channels, K classes, H x W pixels:

    x        (B, C, H, W)  labeled images, each channel (v - mean) / (max - min), so within [-1, 1]
    y        (B, H, W)     their masks: int64 class indices, IGNORE where a pixel does not count
    x_u      (B, C, H, W)  unlabeled images, the paper's x'
    logits   (B, K, H, W)  what G_IS returns; its softmax over K is the paper's G_IS(x)
    G_IS     image to segmentation: the network that we want
    G_SI     segmentation (one-hot masks or softmax maps) to image
    D_S, D_I one judgement a pixel, (B, 1, H, W), of masks and of images: 1 is real, 0 is generated
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from arch.discriminators import FCDiscriminator, PixelDiscriminator
from arch.generators import ResNetGenerator
from utils import IGNORE, ReplayPool, share, total, world_size

UNLABELED = ("cycle_I", "disc_S", "disc_I", "cutmix")  # the terms for which unlabeled images are looked at

# Equations. Expectations and norms are means over images, pixels and channels, as in the released code. Where several
# processes train together, `share` makes the mean of their values the mean over the whole batch.


def gen_S(logits: Tensor, y: Tensor) -> Tensor:
    """Eq. 1, 2: pixel-wise cross-entropy H(y, G_IS(x)), mean over the pixels that count; 0 where none does."""
    total = F.cross_entropy(logits, y, ignore_index=IGNORE, reduction="sum")
    return total / share((y != IGNORE).sum())


def gen_I(fake_x: Tensor, x: Tensor) -> Tensor:
    """Eq. 3: squared error between G_SI(y) and x, over all pixels."""
    return F.mse_loss(fake_x, x)


def disc(real: Tensor, fake: Tensor, valid: Tensor | None = None) -> Tensor:
    """Eq. 4, 5, the discriminator's side: (D(real) - 1)^2 + D(fake)^2; `valid` (of real's shape) picks real pixels."""
    error = (real - 1).square()
    real_term = error.mean() if valid is None else (error * valid).sum() / share(valid.sum())
    return real_term + fake.square().mean()


def fool(fake: Tensor) -> Tensor:
    """Eq. 4, 5, the generators' side: (D(fake) - 1)^2.

    Eq. 8 subtracts the discriminators' loss, which read literally is -D(fake)^2. Least-squares GANs [19] and the
    released code pull D(fake) to "real" instead; so do we.
    """
    return (fake - 1).square().mean()


def cycle_I(rec_x: Tensor, x: Tensor) -> Tensor:
    """Eq. 6: L1 distance between G_SI(G_IS(x')) and x'."""
    return F.l1_loss(rec_x, x)


def cycle_S(logits: Tensor, y: Tensor) -> Tensor:
    """Eq. 7: pixel-wise cross-entropy H(y, G_IS(G_SI(y))), as Eq. 2."""
    return gen_S(logits, y)


# Hung et al. (Adversarial learning for semi-supervised semantic segmentation, 2018), the other method of Table 1.


def judge(logits: Tensor, target: float, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of D's logits (B, 1, H, W) with 1 (real) or 0, mean over the `valid` pixels; 0 of none."""
    error = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="none")
    return error.mean() if valid is None else (error * valid).sum() / share(valid.sum())


def semi(logits: Tensor, judgement: Tensor, threshold: float) -> Tensor:
    """Cross-entropy of the prediction with its own argmax where D is sure enough: sigmoid(judgement) >= threshold.

    logits (B, K, H, W), judgement (B, 1, H, W); the mean over the pixels that pass, 0 where none does. Neither the
    argmax nor the choice of pixels passes a gradient.
    """
    unsure = judgement.squeeze(1).sigmoid() < threshold
    return gen_S(logits, logits.argmax(1).masked_fill(unsure, IGNORE))


# Beyond the paper: consistency under CutMix (French et al. 2020) with a mean teacher (Tarvainen and Valpola 2017).


def boxes(x: Tensor) -> Tensor:
    """A box for each image, of any place, each side a quarter to three quarters of the image's: bool (B, 1, H, W)."""
    inside = []
    for n in x.shape[-2:]:
        side = 0.25 + 0.5 * torch.rand(len(x), 1, device=x.device)
        start = (1 - side) * torch.rand(len(x), 1, device=x.device)
        at = (torch.arange(n, device=x.device) + 0.5) / n
        inside.append((start <= at) & (at < start + side))
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).unsqueeze(1)


def perturb(x: Tensor) -> Tensor:
    """Another contrast (± 20 %) and brightness (± 0.1) for each image, and noise of deviation 0.1: (B, C, H, W)."""
    contrast, brightness = (2 * torch.rand(2, len(x), 1, 1, 1, dtype=x.dtype, device=x.device) - 1).unbind()
    return x * (1 + 0.2 * contrast) + 0.1 * brightness + 0.1 * torch.randn_like(x)


def cutmix(student: Callable, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the student on mixed and perturbed images with the masks mixed in the same way.

    A box of each image shows the next image of the batch. Ignored pixels count as 0 in the mean over all pixels.
    """
    box = boxes(x)
    x_mixed = perturb(torch.where(box, x.roll(1, 0), x))
    y_mixed = torch.where(box.squeeze(1), y.roll(1, 0), y)
    return F.cross_entropy(student(x_mixed), y_mixed, ignore_index=IGNORE, reduction="sum") / y.numel()


@torch.no_grad()
def pseudo_masks(teacher: Callable, x_u: Tensor, confidence: float) -> Tensor:
    """The teacher's masks (B, H, W), IGNORE where its largest probability is under `confidence`."""
    sure, y_u = teacher(x_u).softmax(1).max(1)
    return y_u.masked_fill(sure < confidence, IGNORE)


def one_hot(y: Tensor, n_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Masks (B, H, W) to (B, K, H, W); IGNORE becomes the zero vector."""
    return (y.unsqueeze(1) == torch.arange(n_classes, device=y.device).view(1, -1, 1, 1)).to(dtype)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Inside, these networks' parameters take no gradient (Eq. 9: they are "considered as fixed"); their inputs do."""
    for network in networks:
        network.requires_grad_(False)
    try:
        yield
    finally:
        for network in networks:
            network.requires_grad_(True)


def compute(network: nn.Module, x: Tensor, bf16: bool) -> Tensor:
    """The network's output in x's dtype, with its products in bfloat16 where that is asked."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        return network(x).to(x.dtype)


def generator_optimizer(parameters: Iterable[nn.Parameter], cfg) -> Optimizer:
    """Section 3.3's Adam, or the SGD of Hung et al."""
    if cfg.optimizer == "sgd":
        return SGD(parameters, cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay, fused=True)
    return Adam(parameters, cfg.lr, tuple(cfg.betas), weight_decay=cfg.weight_decay, fused=True)


def discriminator_optimizer(parameters: Iterable[nn.Parameter], cfg) -> Optimizer:
    """Section 3.3's Adam, that of the generators unless flags say otherwise."""
    return Adam(parameters, cfg.disc_lr, tuple(cfg.disc_betas), fused=True)


def averaged(network: nn.Module, decay: float) -> nn.Module | None:
    """A copy that will be the network's exponential moving average; None where the decay is 0."""
    return copy.deepcopy(network).requires_grad_(False) if decay else None


@torch.no_grad()
def follow(average: nn.Module | None, network: nn.Module, decay: float) -> None:
    """Move an average towards its network: decay * average + (1 - decay) * network."""
    if average is not None:
        get_ema_multi_avg_fn(decay)(list(average.parameters()), list(network.parameters()), None)


def in_use(model: nn.Module) -> nn.Module:
    """A method's G_IS; once it is trained, the average of G_IS where it keeps one."""
    return model.G_IS if model.training or model.teacher is None else model.teacher


def consistency(model: nn.Module, x: Tensor, y: Tensor, x_u: Tensor) -> Tensor:
    """The term `cutmix` of a method: G_IS on unlabeled images with the masks of its average (its own without one).

    --cutmix-on both adds labeled images with their true masks; labeled has them alone, as a control.
    """

    def student(images: Tensor) -> Tensor:
        return compute(model.G_IS, images, model.bf16)

    def teacher(images: Tensor) -> Tensor:
        return compute(model.G_IS if model.teacher is None else model.teacher, images, model.bf16)

    if model.cutmix_on == "labeled":
        return cutmix(student, x, y)
    y_u = pseudo_masks(teacher, x_u, model.confidence)
    if model.cutmix_on == "both":
        x_u, y_u = torch.cat([x, x_u]), torch.cat([y, y_u])
    return cutmix(student, x_u, y_u)


def ramped(weights: dict[str, float], progress: float, ramp_up: float) -> dict[str, float]:
    """The weights of Eq. 8, those of unlabeled images growing linearly over the first part `ramp_up` of the run."""
    grown = min(1.0, progress / ramp_up) if ramp_up else 1.0
    return {name: weight * grown if name in UNLABELED else weight for name, weight in weights.items()}


class NonFiniteLoss(ArithmeticError):
    """A loss is infinite or not a number; the message gives the terms."""


def descend(optimizer: Optimizer, loss: Tensor, terms: dict[str, Tensor]) -> None:
    """One update of the optimizer's parameters by the loss's gradient; NonFiniteLoss before it where that is needed."""
    finite = (total((~loss.detach().isfinite()).int()) == 0).to("cpu", non_blocking=loss.is_cuda)
    known = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None
    optimizer.zero_grad()
    loss.backward()
    if known:
        known.synchronize()  # waits for the forward pass alone, while the backward pass is under way
    if not finite:
        means = {name: total(term.detach()) / world_size() for name, term in terms.items()}
        raise NonFiniteLoss(", ".join(f"{name} {mean.item():g}" for name, mean in means.items()))
    optimizer.step()


class Side(nn.Module):
    """The networks of one optimizer, and the terms that it descends: what DistributedDataParallel wraps."""

    def __init__(self, networks: Iterable[nn.Module], terms: Callable):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.terms = terms

    def forward(self, *batch):
        return self.terms(*batch)


def distribute(model: nn.Module, device: torch.device) -> None:
    """Let every process's gradients be averaged in each update, and batch norm's statistics on GPUs.

    On the CPU, which has no such batch norm, each process normalizes its own part of the batch.
    """
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for key, optimizer in model.optimizers.items():
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        networks = [network for network in model.children() if {id(p) for p in network.parameters()} <= own]
        model.sides[key] = DistributedDataParallel(
            Side(networks, model.sides[key]),
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=0 in model.weights.values(),  # networks that only a term without weight needs
        )


def diagnose(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
    """What a batch (x, y, x_u) tells of a method, without an update and without a trace in the random numbers.

    "gradients": the norm, in G_IS's parameters, of the gradient of each term without its weight; 0 where none is sent.
    "answers": the mean of what the discriminators say to real and generated masks and images, of the CycleGAN.
    """
    devices = [batch[0].device] if batch[0].is_cuda else []
    with torch.random.fork_rng(devices):
        terms = model.generator_terms(*batch)
        terms = terms[0] if isinstance(terms, tuple) else terms
        norms = {}
        for name, term in terms.items():
            grads = ()
            if term.requires_grad:
                grads = torch.autograd.grad(term, list(model.G_IS.parameters()), retain_graph=True, allow_unused=True)
            norms[name] = sum(grad.double().square().sum().item() for grad in grads if grad is not None) ** 0.5
        return {"gradients": norms, "answers": model.answers(*batch) if hasattr(model, "answers") else {}}


# Methods. Each has optimizers, step(x, y, x_u), segment(x) and pictures(x, y); `sides` holds the function of each
# optimizer's terms. The training loop sets `progress`, the share of the run that is done, before every step. `teacher`
# is the moving average of G_IS, or None: where it is kept, it is what is evaluated.


class Supervised(nn.Module):
    """Full (every label) and Partial (some): G_IS trained by Eq. 1 alone."""

    def __init__(self, spec, cfg):
        super().__init__()
        self.bf16 = cfg.precision == "bf16"
        self.G_IS = ResNetGenerator(spec.channels, len(spec.classes), cfg.ngf, cfg.n_blocks, cfg.dropout)
        self.ema, self.teacher = cfg.ema, averaged(self.G_IS, cfg.ema)
        self.weights = {"gen_S": 1.0}
        self.optimizers = {"G": generator_optimizer(self.G_IS.parameters(), cfg)}
        self.sides = {"G": self.generator_terms}

    def segment(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        return compute(in_use(self), x, self.bf16)

    def generator_terms(self, x: Tensor, y: Tensor, x_u: Tensor | None = None) -> dict[str, Tensor]:
        """Eq. 1, 2."""
        return {"gen_S": gen_S(self.segment(x), y)}

    def step(self, x: Tensor, y: Tensor, x_u: Tensor | None = None) -> dict[str, Tensor]:
        """One update; returns the loss by the paper's name, detached. Unlabeled images are not looked at."""
        terms = self.sides["G"](x, y)
        descend(self.optimizers["G"], terms["gen_S"], terms)
        follow(self.teacher, self.G_IS, self.ema)
        return {"gen_S": terms["gen_S"].detach()}

    def pictures(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What the networks make of labeled images, by name: masks (B, H, W)."""
        return {"G_IS(x)": self.segment(x).argmax(1)}


class CycleGAN(nn.Module):
    """Ours: two generators and two discriminators trained alternately on Eq. 8. A weight of 0 takes its term out."""

    progress = 0.0

    def __init__(self, spec, cfg):
        super().__init__()
        self.n_classes = len(spec.classes)
        self.bf16 = cfg.precision == "bf16"
        self.hard_fakes = cfg.disc_input == "argmax"
        self.cycle_S_both = cfg.cycle_s_trains == "both"
        self.ramp_up, self.confidence, self.cutmix_on = cfg.ramp_up, cfg.confidence, cfg.cutmix_on
        self.weights = {
            "gen_S": 1.0,
            "gen_I": cfg.lambda1,
            "cycle_S": cfg.lambda2,
            "cycle_I": cfg.lambda3,
            "disc_S": cfg.lambda4,
            "disc_I": cfg.lambda5,
        }
        if cfg.lambda6:
            self.weights["cutmix"] = cfg.lambda6
        K, C = self.n_classes, spec.channels
        self.G_IS = ResNetGenerator(C, K, cfg.ngf, cfg.n_blocks, cfg.dropout)
        self.ema, self.teacher = cfg.ema, averaged(self.G_IS, cfg.ema)
        self.G_SI = ResNetGenerator(K, C, cfg.ngf, cfg.n_blocks, cfg.dropout, tanh=True)
        self.D_S = PixelDiscriminator(K, cfg.ndf, cfg.disc_norm, cfg.disc_kernel)
        self.D_I = PixelDiscriminator(C, cfg.ndf, cfg.disc_norm, cfg.disc_kernel)
        generators = [*self.G_IS.parameters(), *self.G_SI.parameters()]
        discriminators = [*self.D_S.parameters(), *self.D_I.parameters()]
        self.optimizers = {"G": generator_optimizer(generators, cfg)}
        if cfg.lambda4 or cfg.lambda5:
            self.optimizers["D"] = discriminator_optimizer(discriminators, cfg)
        self.sides = {"G": self.generator_terms, "D": self.discriminator_terms}
        self.pools = {"y": ReplayPool(cfg.pool_size), "x": ReplayPool(cfg.pool_size)}

    def segment(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        return compute(in_use(self), x, self.bf16)

    def paint(self, y: Tensor) -> Tensor:
        """G_SI: masks (B, H, W), one-hot masks or softmax maps (B, K, H, W) to images (B, C, H, W)."""
        if y.dim() == 3:
            y = one_hot(y, self.n_classes, next(self.parameters()).dtype)
        return compute(self.G_SI, y, self.bf16)

    def generator_terms(self, x: Tensor, y: Tensor, x_u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of Eq. 8 that have a weight, unweighted, and the fakes {"y": G_IS(x'), "x": G_SI(y)}.

        The discriminators are fixed in here: a backward through the terms leaves no gradient in them. Each generator
        runs once on both its inputs: instance norm works image by image, so the values are those of separate runs.
        """
        on = {name for name, weight in self.weights.items() if weight}
        uses_x_u, uses_y = bool(on & {"cycle_I", "disc_S"}), bool(on & {"gen_I", "cycle_S", "disc_I"})
        terms, fakes = {}, {}

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
            terms["cycle_S"] = cycle_S(self.segment(fakes["x"] if self.cycle_S_both else fakes["x"].detach()), y)
        if "cycle_I" in on:
            terms["cycle_I"] = cycle_I(images[-len(x_u) :], x_u)

        if uses_x_u and self.hard_fakes:  # the released code: an index map, which passes no gradient to G_IS
            fakes["y"] = one_hot(fakes["y"].argmax(1), self.n_classes, x.dtype)
        with frozen(self.D_S, self.D_I):
            if "disc_S" in on:
                terms["disc_S"] = fool(compute(self.D_S, fakes["y"], self.bf16))
            if "disc_I" in on:
                terms["disc_I"] = fool(compute(self.D_I, fakes["x"], self.bf16))
        if "cutmix" in on:
            terms["cutmix"] = consistency(self, x, y, x_u)
        return {name: terms[name] for name in self.weights if name in terms}, fakes

    @torch.no_grad()
    def answers(self, x: Tensor, y: Tensor, x_u: Tensor) -> dict[str, float]:
        """Means of what D_S and D_I, where they are trained, say to real and to generated masks and images."""
        judged = {}
        if self.weights["disc_S"]:
            judged["D_S(y)"] = self.D_S, one_hot(y, self.n_classes, x.dtype)
            judged["D_S(G_IS(x'))"] = self.D_S, self.segment(x_u).softmax(1)
        if self.weights["disc_I"]:
            judged |= {"D_I(x')": (self.D_I, x_u), "D_I(G_SI(y))": (self.D_I, self.paint(y))}
        return {name: compute(D, shown, self.bf16).mean().item() for name, (D, shown) in judged.items()}

    def discriminator_terms(self, y: Tensor, x_u: Tensor, fakes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Eq. 4 and 5 on the generators' fakes, detached. Real and fake go separately: batch norm would mix them."""
        terms = {}
        if self.weights["disc_S"]:
            real = compute(self.D_S, one_hot(y, self.n_classes, x_u.dtype), self.bf16)
            fake = compute(self.D_S, self.pools["y"](fakes["y"].detach()), self.bf16)
            terms["D_S"] = disc(real, fake, valid=(y != IGNORE).unsqueeze(1))
        if self.weights["disc_I"]:
            real = compute(self.D_I, x_u, self.bf16)
            fake = compute(self.D_I, self.pools["x"](fakes["x"].detach()), self.bf16)
            terms["D_I"] = disc(real, fake)
        return terms

    def step(self, x: Tensor, y: Tensor, x_u: Tensor) -> dict[str, Tensor]:
        """Eq. 9, one alternation: the generators on Eq. 8 with the discriminators fixed, then the discriminators.

        Returns the unweighted terms by the paper's names and the discriminators' losses as D_S and D_I, detached.
        """
        terms, fakes = self.sides["G"](x, y, x_u)
        weights = ramped(self.weights, self.progress, self.ramp_up)
        descend(self.optimizers["G"], sum(weights[k] * term for k, term in terms.items()), terms)  # Eq. 8
        follow(self.teacher, self.G_IS, self.ema)
        losses = {}
        if "D" in self.optimizers:
            losses = self.sides["D"](y, x_u, fakes)
            descend(self.optimizers["D"], sum(losses.values()), losses)
        return {name: term.detach() for name, term in (terms | losses).items()}

    def pictures(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What the networks make of labeled images, by name: masks (B, H, W) and images (B, C, H, W)."""
        logits = self.segment(x)
        fake_x = self.paint(y)
        return {
            "G_IS(x)": logits.argmax(1),
            "G_SI(y)": fake_x,
            "G_SI(G_IS(x))": self.paint(logits.softmax(1)),
            "G_IS(G_SI(y))": self.segment(fake_x).argmax(1),
        }


class AdvSemi(nn.Module):
    """Hung et al. with our G_IS, from scratch: D tells masks from predictions and chooses pixels to learn alone from.

    A weight of 0 takes its term out; the term `semi` is 0 until `semi_start` of the run is done.
    """

    progress = 0.0

    def __init__(self, spec, cfg):
        super().__init__()
        self.n_classes = len(spec.classes)
        self.bf16 = cfg.precision == "bf16"
        self.threshold, self.semi_start = cfg.semi_threshold, cfg.semi_start
        self.weights = {
            "gen_S": 1.0,
            "adv": cfg.lambda_adv,
            "semi_adv": cfg.lambda_semi_adv,
            "semi": cfg.lambda_semi,
        }
        self.G_IS = ResNetGenerator(spec.channels, self.n_classes, cfg.ngf, cfg.n_blocks, cfg.dropout)
        self.ema, self.teacher = cfg.ema, averaged(self.G_IS, cfg.ema)
        self.D_S = FCDiscriminator(self.n_classes, cfg.ndf)
        self.optimizers = {"G": generator_optimizer(self.G_IS.parameters(), cfg)}
        if cfg.lambda_adv or cfg.lambda_semi_adv or cfg.lambda_semi:
            self.optimizers["D"] = discriminator_optimizer(self.D_S.parameters(), cfg)
        self.sides = {"G": self.generator_terms, "D": self.discriminator_terms}

    def segment(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        return compute(in_use(self), x, self.bf16)

    def generator_terms(self, x: Tensor, y: Tensor, x_u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """G_IS's terms that have a weight, unweighted, with D_S fixed; and the softmax maps of x, then of x_u if used.

        gen_S: cross-entropy on x; adv and semi_adv: x and x_u should look real to D_S; semi: x_u where they do.
        """
        on = {name for name, weight in self.weights.items() if weight}
        begun = self.progress >= self.semi_start
        uses_x_u = "semi_adv" in on or ("semi" in on and begun)
        logits = self.segment(torch.cat([x, x_u]) if uses_x_u else x)
        maps, terms = logits.softmax(1), {"gen_S": gen_S(logits[: len(x)], y)}
        with frozen(self.D_S):
            if "adv" in on:
                judgement = compute(self.D_S, maps[: len(x)], self.bf16)
                terms["adv"] = judge(judgement, 1.0, valid=(y != IGNORE).unsqueeze(1))
            judgement = compute(self.D_S, maps[len(x) :], self.bf16) if uses_x_u else None
        if "semi_adv" in on:
            terms["semi_adv"] = judge(judgement, 1.0)
        if "semi" in on:
            terms["semi"] = semi(logits[len(x) :], judgement, self.threshold) if begun else logits.new_zeros(())
        return terms, maps

    def discriminator_terms(self, y: Tensor, maps: Tensor) -> dict[str, Tensor]:
        """Half the cross-entropy of predictions with 0, half that of true masks with 1; ignored pixels are left out.

        As in their code, the predictions are those of unlabeled images too.
        """
        valid = (y != IGNORE).unsqueeze(1)
        valid_maps = torch.cat([valid, valid.new_ones(len(maps) - len(y), *valid.shape[1:])])
        fake = judge(compute(self.D_S, maps.detach(), self.bf16), 0.0, valid_maps)
        real = judge(compute(self.D_S, one_hot(y, self.n_classes, maps.dtype), self.bf16), 1.0, valid)
        return {"D_S": (fake + real) / 2}

    def step(self, x: Tensor, y: Tensor, x_u: Tensor) -> dict[str, Tensor]:
        """One update of G_IS with D_S fixed, then of D_S on the same predictions; the unweighted terms, detached."""
        terms, maps = self.sides["G"](x, y, x_u)
        descend(self.optimizers["G"], sum(self.weights[k] * term for k, term in terms.items()), terms)
        follow(self.teacher, self.G_IS, self.ema)
        losses = {}
        if "D" in self.optimizers:
            losses = self.sides["D"](y, maps)
            descend(self.optimizers["D"], sum(losses.values()), losses)
        return {name: term.detach() for name, term in (terms | losses).items()}

    def pictures(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What G_IS makes of labeled images, by name: masks (B, H, W)."""
        return {"G_IS(x)": self.segment(x).argmax(1)}


class MeanTeacher(nn.Module):
    """What a user would take instead: G_IS learns from labels, and from masks of its own average under CutMix."""

    progress = 0.0

    def __init__(self, spec, cfg):
        super().__init__()
        self.bf16 = cfg.precision == "bf16"
        self.ramp_up, self.confidence, self.cutmix_on = cfg.ramp_up, cfg.confidence, cfg.cutmix_on
        self.weights = {"gen_S": 1.0, "cutmix": cfg.lambda6}
        self.G_IS = ResNetGenerator(spec.channels, len(spec.classes), cfg.ngf, cfg.n_blocks, cfg.dropout)
        self.ema, self.teacher = cfg.ema, averaged(self.G_IS, cfg.ema)
        self.optimizers = {"G": generator_optimizer(self.G_IS.parameters(), cfg)}
        self.sides = {"G": self.generator_terms}

    def segment(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        return compute(in_use(self), x, self.bf16)

    def generator_terms(self, x: Tensor, y: Tensor, x_u: Tensor) -> dict[str, Tensor]:
        """Eq. 1, 2, and the consistency of unlabeled images."""
        terms = {"gen_S": gen_S(self.segment(x), y)}
        if self.weights["cutmix"]:
            terms["cutmix"] = consistency(self, x, y, x_u)
        return terms

    def step(self, x: Tensor, y: Tensor, x_u: Tensor) -> dict[str, Tensor]:
        """One update of G_IS, which its average then follows; the unweighted terms, detached."""
        terms = self.sides["G"](x, y, x_u)
        weights = ramped(self.weights, self.progress, self.ramp_up)
        descend(self.optimizers["G"], sum(weights[k] * term for k, term in terms.items()), terms)
        follow(self.teacher, self.G_IS, self.ema)
        return {name: term.detach() for name, term in terms.items()}

    def pictures(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What G_IS makes of labeled images, by name: masks (B, H, W)."""
        return {"G_IS(x)": self.segment(x).argmax(1)}


METHODS = {"supervised": Supervised, "cyclegan": CycleGAN, "advsemi": AdvSemi, "meanteacher": MeanTeacher}
