"""What is compared: this library, the same algorithms written out by hand, and other libraries where they can be imported.

Each candidate does three things with a network `net(x, t)` that predicts the noise, and a linear schedule of 1000 times:

    sampler(net, kind, steps, like) -> run       `run(x)` samples in `steps` steps from x; kind is "ddpm", "ddim" or one of
                                                 its `solvers`: "heun" (two network calls a step), "2m" (DPM-Solver++(2M))
    loss(net, like) -> run                       `run(x0)` draws times and noise and returns the training loss
    forward(like) -> run                         `run(x0, eps, t)` is the noisy data at times t in 1..999

and, where it has one,

    bound(net, steps, like) -> run               `run(x0)` is the negative bound of 8-bit images over that many steps
    reveal(head, features, vocab) -> run         `run(xt)` is one step of masked text: in each row of xt a hidden position, whose
                                                 token is `vocab`, is filled by a draw from the logits head(features)
    unet() -> net                                a U-Net `net(x, t)` for 3×32×32 images, of some 20 million parameters

`like` gives the device and the shape of the batches. Libraries are used as their documentation says, with clipping
switched off where there is a switch.
"""
import importlib.metadata
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

T = 1000
TORCHVISION = "import sys; sys.path.insert(0, 'benchmarks'); import candidates; candidates.define_torchvision_operators()"


class Candidate(ABC):
    """One way to do it. Constructing one raises ImportError where the library is absent."""

    imports = ""  # the statement whose time is compared with `import torch`
    has_out = False  # the forward process can write into a given tensor
    has_bound = has_text = has_unet = False
    solvers = ()

    @property
    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def sampler(self, net: nn.Module, kind: str, steps: int, like: Tensor) -> Callable: ...

    @abstractmethod
    def loss(self, net: nn.Module, like: Tensor) -> Callable: ...

    @abstractmethod
    def forward(self, like: Tensor) -> Callable: ...

    def bound(self, net: nn.Module, steps: int, like: Tensor) -> Callable:
        raise NotImplementedError

    def reveal(self, head: nn.Module, features: Tensor, vocab: int) -> Callable:
        raise NotImplementedError

    def unet(self) -> nn.Module:
        raise NotImplementedError


class Library(Candidate):
    """This library."""

    imports = "import pkgutil, udm_book; [__import__('udm_book.' + m.name) for m in pkgutil.iter_modules(udm_book.__path__)]"
    has_out = has_bound = has_text = has_unet = True
    solvers = ("heun", "2m")

    def __init__(self):
        from udm_book.hot import Hot
        from udm_book.schedule import Schedule

        self.schedule = Schedule.linear(T)
        self.F = Hot(self.schedule)

    @property
    def version(self):
        import udm_book

        return udm_book.__version__

    def denoiser(self, net, like):
        from udm_book.parameterization import EPS, Denoiser

        self.F.to(like.device)
        return Denoiser(net, self.schedule, EPS).to(like.device)

    def sampler(self, net, kind, steps, like):
        from udm_book.hot import ddim, ddpm
        from udm_book.reverse import sample
        from udm_book.score import DPMSolver2M, Heun

        denoiser, times, kernel = self.denoiser(net, like), self.schedule.times(steps), ddpm if kind == "ddpm" else ddim()
        if kind in self.solvers:
            denoiser = dict(zip(self.solvers, (Heun, DPMSolver2M)))[kind](denoiser, self.F).to(like.device)
        return lambda x: sample(self.F, denoiser, x, times, kernel)

    def loss(self, net, like):
        from udm_book.objective import network_loss

        denoiser = self.denoiser(net, like)
        return lambda x0: network_loss(self.F, denoiser, x0)

    def forward(self, like):
        self.F.to(like.device)
        return lambda x0, eps, t, out=None: self.F(x0, t, eps, out=out)

    def bound(self, net, steps, like):
        from udm_book.elbo import elbo
        from udm_book.likelihood import Decoder, Levels

        denoiser, decoder, times = self.denoiser(net, like), Decoder(Levels(), var=1e-4), self.schedule.times(steps)
        return lambda x0: elbo(self.F, denoiser, x0, times=times, decoder=decoder, chunk=32).total

    def reveal(self, head, features, vocab):
        from udm_book.mask import Exactly, Mask, Reveal
        from udm_book.posterior import LazyCategorical

        b, length = features.shape[:2]
        F, step = Mask(vocab, Exactly(length)).to(features.device), Reveal()
        t = torch.full((b,), length // 2, device=features.device)
        return lambda xt: step(F, LazyCategorical(features, head), xt, t, t - 1)

    def unet(self):
        from udm_book.network import UNet

        return UNet()


class Plain(Candidate):
    """The same by hand: coefficients as Python floats, two or three operators a step, nothing checked, nothing general."""

    has_out = has_bound = has_text = True
    solvers = ("heun", "2m")

    def __init__(self):
        bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)])
        self.alpha, self.sigma = bar.sqrt(), (1 - bar).sqrt()

    @property
    def version(self):
        return "-"

    def sampler(self, net, kind, steps, like):
        times = torch.linspace(T, 0, steps + 1).round().long().tolist()
        a, b = self.alpha.tolist(), self.sigma.tolist()
        if kind in self.solvers:
            return self.solver(net, kind, times, like)
        rows = []
        for t, s in zip(times, times[1:]):
            rho = (1 - (a[t] * b[s] / (a[s] * b[t])) ** 2) ** 0.5 if kind == "ddpm" else 0.0
            keep = (1 - rho**2) ** 0.5 * b[s] / b[t]
            rows.append((torch.full(like.shape[:1], t, device=like.device), 1 / a[t], -b[t] / a[t], a[s] - keep * a[t], keep, rho * b[s]))

        def run(x):
            x, spare, noise = x.clone(), torch.empty_like(x), torch.empty_like(x)
            for t, a0, b0, on_x0, on_xt, add in rows:
                x0 = torch.mul(x, a0).add_(net(x, t), alpha=b0)
                x, spare = torch.mul(x0, on_x0, out=spare).add_(x, alpha=on_xt), x
                if add:
                    x.add_(noise.normal_(), alpha=add)
            return x

        return run

    def solver(self, net, kind, times, like):
        a, b = self.alpha.tolist(), self.sigma.tolist()
        at = {t: torch.full(like.shape[:1], t, device=like.device) for t in times}
        log_ratio = [math.log(p / q) if q else math.inf for p, q in zip(a, b)]

        def guess(x, t):
            return torch.mul(x, 1 / a[t]).add_(net(x, at[t]), alpha=-b[t] / a[t])

        def run(x):
            before, h_before = None, None
            for t, s in zip(times, times[1:]):
                x0 = better = guess(x, t)
                keep = b[s] / b[t]
                move = a[s] - keep * a[t]
                if kind == "2m":
                    h = log_ratio[s] - log_ratio[t]
                    if before is not None and s:
                        better = torch.lerp(x0, before, -h / (2 * h_before))
                    before, h_before = x0, h
                x = torch.mul(x, keep).add_(better, alpha=move)
                if kind == "heun" and s:
                    x = x.add_(guess(x, s).sub_(x0), alpha=move * b[t] * a[s] / (2 * a[t] * b[s]))
            return x

        return run

    def tables(self, like):
        shape = (-1, *[1] * (like.ndim - 1))
        return [v.to(like.device, like.dtype).reshape(shape) for v in (self.alpha, self.sigma)]

    def loss(self, net, like):
        alpha, sigma = self.tables(like)

        def run(x0):
            t = torch.randint(1, T + 1, x0.shape[:1], device=x0.device)
            eps = torch.randn_like(x0)
            return fn.mse_loss(net((alpha[t] * x0).addcmul_(sigma[t], eps), t), eps)

        return run

    def forward(self, like):
        alpha, sigma = self.tables(like)
        return lambda x0, eps, t, out=None: torch.mul(x0, alpha[t], out=out).addcmul_(eps, sigma[t])

    def bound(self, net, steps, like):
        a, b = self.alpha.tolist(), self.sigma.tolist()
        times = torch.linspace(T, 0, steps + 1).round().long()
        at = times.to(like.device)[:, None].expand(-1, len(like)).unbind()
        times = times.tolist()

        def run(x0):
            total = ((a[T] * x0).square() + (b[T] ** 2 - 1 - math.log(b[T] ** 2))).flatten(1).sum(1) / 2
            for i, (t, s) in enumerate(zip(times, times[1:])):
                xt = torch.mul(x0, a[t]).add_(torch.randn_like(x0), alpha=b[t])
                guess = torch.mul(xt, 1 / a[t]).add_(net(xt, at[i]), alpha=-b[t] / a[t])
                if s:
                    weight = ((a[s] / b[s]) ** 2 - (a[t] / b[t]) ** 2) / 2
                    total.add_((x0 - guess).square_().flatten(1).sum(1), alpha=weight)
            scale = 1e-2 * 2**0.5  # of the erf, for a last variance of 1e-4
            upper = torch.where(x0 > 0.999, 1, torch.erf((x0 - guess + 1 / 255) / scale))
            lower = torch.where(x0 < -0.999, -1, torch.erf((x0 - guess - 1 / 255) / scale))
            return total - ((upper - lower) / 2).clamp_min(1e-12).log().flatten(1).sum(1)

        return run

    def reveal(self, head, features, vocab):
        rows = torch.arange(len(features), device=features.device)

        def run(xt):
            place = torch.rand(xt.shape, device=xt.device).masked_fill_(xt != vocab, 2).argmin(1)
            xt = xt.clone()
            xt[rows, place] = torch.multinomial(head(features[rows, place]).softmax(-1), 1)[:, 0]
            return xt

        return run


class Diffusers(Candidate):
    """diffusers' schedulers in the loop of its documentation."""

    imports = "from diffusers import DDIMScheduler, DDPMScheduler"
    solvers = ("heun", "2m")

    def __init__(self):
        from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

        self.kinds = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "heun": HeunDiscreteScheduler, "2m": DPMSolverMultistepScheduler}

    @property
    def version(self):
        return importlib.metadata.version("diffusers")

    def sampler(self, net, kind, steps, like):
        scheduler = self.kinds[kind](num_train_timesteps=T, **{} if kind == "2m" else dict(clip_sample=False))
        scheduler.set_timesteps(steps, device=like.device)

        def run(x):
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t), t, x).prev_sample
            return x

        def run_solver(x):
            scheduler.set_timesteps(steps, device=like.device)  # it counts its steps
            for t in scheduler.timesteps:
                x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
            return x

        return run_solver if kind in self.solvers else run

    def loss(self, net, like):
        scheduler = self.kinds["ddpm"](num_train_timesteps=T)

        def run(x0):
            eps = torch.randn_like(x0)
            t = torch.randint(0, T, x0.shape[:1], device=x0.device)
            return fn.mse_loss(net(scheduler.add_noise(x0, eps, t), t), eps)

        return run

    def forward(self, like):
        return self.kinds["ddpm"](num_train_timesteps=T).add_noise


class SmallDiffusion(Candidate):
    """smalldiffusion: DDPM is (gam, mu) = (1, 1/2), DDIM is (1, 0); its x is divided by alpha."""

    imports = f"{TORCHVISION}; import smalldiffusion"

    def __init__(self):
        import smalldiffusion

        self.lib = smalldiffusion

        class Model(nn.Module, smalldiffusion.ModelMixin):
            def __init__(self, net, shape):
                super().__init__()
                self.net, self.input_dims = net, tuple(shape)

            def forward(self, x, sigma, cond=None):
                return self.net(x, sigma)

        self.Model = Model

    @property
    def version(self):
        return importlib.metadata.version("smalldiffusion")

    def sampler(self, net, kind, steps, like):
        from accelerate import Accelerator

        model, accelerator = self.Model(net, like.shape[1:]), Accelerator(cpu=like.device.type == "cpu")
        sigmas = self.lib.ScheduleDDPM(T).sample_sigmas(steps)

        def run(x):
            for x in self.lib.samples(model, sigmas, gam=1.0, mu=0.5 if kind == "ddpm" else 0.0, xt=x, accelerator=accelerator):
                pass
            return x

        return run

    def loss(self, net, like):
        model, schedule = self.Model(net, like.shape[1:]), self.lib.ScheduleDDPM(T)

        def run(x0):
            x0, sigma, eps, _ = self.lib.diffusion.generate_train_sample(x0, schedule)
            return model.get_loss(x0, sigma, eps)

        return run

    def forward(self, like):
        sigmas = self.lib.ScheduleDDPM(T).sigmas.to(like).reshape(-1, *[1] * (like.ndim - 1))
        return lambda x0, eps, t: x0 + sigmas[t] * eps  # as written in its `get_loss`


class DenoisingDiffusion(Candidate):
    """denoising-diffusion-pytorch. Its samplers draw their own start and always clip."""

    imports = f"{TORCHVISION}; import denoising_diffusion_pytorch"
    has_unet = True

    def __init__(self):
        define_torchvision_operators()
        import denoising_diffusion_pytorch

        self.lib = denoising_diffusion_pytorch

        class Model(nn.Module):
            channels = out_dim = 3
            self_condition = False

            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x, t, x_self_cond=None):
                return self.net(x, t)

        self.Model = Model

    @property
    def version(self):
        return importlib.metadata.version("denoising-diffusion-pytorch")

    def process(self, net, size, device, **options):
        return self.lib.GaussianDiffusion(self.Model(net), image_size=size, objective="pred_noise", beta_schedule="linear",
                                          auto_normalize=False, **options).to(device)

    def sampler(self, net, kind, steps, like):
        options = dict(timesteps=steps) if kind == "ddpm" else dict(timesteps=T, sampling_timesteps=steps)
        process = self.process(net, like.shape[-1], like.device, **options)
        return lambda x: process.sample(batch_size=len(x))

    def loss(self, net, like):
        return self.process(net, like.shape[-1], like.device, timesteps=T)

    def forward(self, like):
        process = self.process(nn.Identity(), like.shape[-1], like.device, timesteps=T)
        return lambda x0, eps, t: process.q_sample(x0, t, noise=eps)

    def unet(self):
        return self.lib.Unet(dim=48, dim_mults=(1, 2, 4, 8))  # with 64, the width of its examples, 36 million


class Azula(Candidate):
    """azula, with its variance-preserving schedule and EDM's preconditioning, its default denoiser."""

    imports = "import azula.denoise, azula.noise, azula.sample"

    def __init__(self):
        import azula.denoise
        import azula.noise
        import azula.sample

        self.lib, self.schedule = azula, azula.noise.VPSchedule()

    @property
    def version(self):
        return importlib.metadata.version("azula")

    def denoiser(self, net, like):
        net.register_buffer("dtype_of_azula", torch.zeros((), device=like.device), persistent=False)  # it asks the network for its dtype
        return self.lib.denoise.KarrasDenoiser(net, self.schedule)

    def sampler(self, net, kind, steps, like):
        make = self.lib.sample.DDPMSampler if kind == "ddpm" else self.lib.sample.DDIMSampler
        return make(self.denoiser(net, like), steps=steps, silent=True)

    def loss(self, net, like):
        denoiser = self.denoiser(net, like)
        return lambda x0: denoiser.loss(x0, torch.rand(x0.shape[:1], device=x0.device))

    def forward(self, like):
        def run(x0, eps, t):  # as written in its `loss`
            alpha, sigma = self.schedule(t.to(x0) / T)
            while alpha.ndim < x0.ndim:
                alpha, sigma = alpha[..., None], sigma[..., None]
            return alpha * x0 + sigma * eps

        return run


class ImprovedDiffusion(Candidate):
    """openai/improved-diffusion, from its source (not on a package index)."""

    imports = "import improved_diffusion.gaussian_diffusion, improved_diffusion.respace"
    has_bound = True

    def __init__(self):
        from improved_diffusion import gaussian_diffusion, respace

        self.gd, self.respace = gaussian_diffusion, respace

    @property
    def version(self):
        return "source"

    def process(self, steps):
        gd = self.gd
        return self.respace.SpacedDiffusion(
            use_timesteps=self.respace.space_timesteps(T, [steps]), betas=gd.get_named_beta_schedule("linear", T),
            model_mean_type=gd.ModelMeanType.EPSILON, model_var_type=gd.ModelVarType.FIXED_SMALL, loss_type=gd.LossType.MSE)

    def sampler(self, net, kind, steps, like):
        net.anything = nn.Parameter(torch.zeros((), device=like.device))  # it asks the network for its device
        process = self.process(steps)
        loop = process.p_sample_loop if kind == "ddpm" else process.ddim_sample_loop
        return lambda x: loop(net, x.shape, noise=x, clip_denoised=False)

    def loss(self, net, like):
        process = self.process(T)

        def run(x0):
            return process.training_losses(net, x0, torch.randint(0, T, x0.shape[:1], device=x0.device))["loss"]

        return run

    def forward(self, like):
        process = self.process(T)
        return lambda x0, eps, t: process.q_sample(x0, t, noise=eps)

    def bound(self, net, steps, like):
        process = self.process(steps)
        return lambda x0: process.calc_bpd_loop(net, x0, clip_denoised=False)["total_bpd"]


def define_torchvision_operators():
    """Let `import torchvision` pass beside a torch it was not built with; nothing here calls these operators."""
    from importlib.util import find_spec

    if find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    global _torchvision
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")  # kept: its operators live as long as it does
    for name in ("nms", "qnms"):
        try:
            _torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            pass  # they exist already: torchvision was built with this torch


ALL = dict(udm_book=Library, plain=Plain, smalldiffusion=SmallDiffusion, denoising_diffusion_pytorch=DenoisingDiffusion,
           azula=Azula, diffusers=Diffusers, improved_diffusion=ImprovedDiffusion)


def find(names: list[str]) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The candidates that can be imported here, and why the others can't."""
    found, absent = {}, {}
    define_torchvision_operators()
    for name in names:
        try:
            found[name] = ALL[name]()
        except Exception as e:  # others' imports fail in many ways; the reason is printed
            absent[name] = f"{type(e).__name__}: {e}"
    return found, absent
