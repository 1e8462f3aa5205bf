"""Every sampler beside diffusers, step by step: from the same state, with the same network output and the same noise.

diffusers numbers times from 0, its index is our time less 1; its `alphas_cumprod` lacks our entry at 0. It makes its
tables in float32, so `peer` gives it ours and what is compared are the formulas, not the roundings of the tables.

Where the two disagree a test says who is right by a property that both ought to keep. A later diffusers that keeps it
makes that test skip with a message instead of failing.
"""
import importlib.metadata

import pytest
import torch
from conftest import close, full, normal, per_row, rng

pytest.importorskip("diffusers", reason="diffusers is not installed: `make test-all` does it, or pip install '.[peers]'")
from diffusers import (DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler,
                       EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, RePaintScheduler)
from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete, scheduling_repaint
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from udm_book.elbo import reverse_law
from udm_book.hot import Hot, ddim, ddpm
from udm_book.parameterization import EPS, X0, Denoiser, V, zero_terminal
from udm_book.reverse import ask, coefficients, reuse_noise, reverse, sample
from udm_book.samplers import Clip, LastMean, LearnedVariance, Threshold, inpaint, invert
from udm_book.schedule import Schedule
from udm_book.score import DPMSolver2M, Heun, Solver

NAMES = {EPS: "epsilon", X0: "sample", V: "v_prediction"}
SCHEDULES = {"linear": Schedule.linear(1000), "squaredcos_cap_v2": Schedule.cosine(1000)}         # under its names
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")       # it and NumPy
each_prediction = pytest.mark.parametrize("P", NAMES, ids=NAMES.values())
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def mended(what):
    """A peer's error that this file shows is gone: say so, rather than fail."""
    pytest.skip(f"diffusers {importlib.metadata.version('diffusers')} {what}: make this test one of agreement")


def net(x, t):
    """Any function of the state and the time does: what is compared is what each library makes of its values."""
    return torch.tanh(1.3 * x.roll(1, -1) - 0.4 * x + per_row(t, x) / 700)


def start(seed=0):
    return normal(2, 3, 4, 4, seed=seed, device="cpu")


def peer(kind, schedule, **config):
    """A scheduler of diffusers with our tables."""
    scheduler = kind(num_train_timesteps=schedule.T, **config)
    scheduler.alphas_cumprod = schedule.alpha_bar[1:].clone()
    return scheduler


def their_grid(scheduler):
    """The times of a scheduler in our numbers, with the end."""
    return [int(t) + 1 for t in scheduler.timesteps] + [0]


def size_of_step(schedule, t, s, x, y):
    """The largest intermediate number of a step from t to s, whichever way it is written."""
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
    x, y = x.abs().max().item(), y.abs().max().item()
    guess = max((x + sigma[t] * y) / alpha[t] if alpha[t] else 0, x + y)
    return alpha[s] * guess + sigma[s] * (x + alpha[t] * guess) / sigma[t] + 6 * sigma[s]


def thinnest(schedule, t, s):
    """What tables in float64 lose: 1 - alpha_bar at t and s, and the share of the chain's noise, by subtraction."""
    a = schedule.alpha_bar.tolist()
    return min(1 - a[t], 1 - a[s] if s else 1, 1 - a[t] / a[s])


def follow(schedule, denoiser, times, kernel, their_step, *, single=False, slack=lambda t, s: 1, seed=1):
    """Run ours; at every state ask `their_step(t, s, x, y, noise)` for its next state and compare.

    `y` is the network's output there and `noise` the standard normal that all of ours adds up to. `single`: the peer
    works in float32, whatever it is given. `slack`: how much a solver amplifies a guess.
    """
    F, xT, twin = Hot(schedule), start(), rng(seed, "cpu")
    x, states = xT, reverse(F, denoiser, xT, times, kernel, generator=rng(seed, "cpu"))
    for t, (s, xs, _) in zip(times, states):
        y = net(x, full(x, t))
        (a, _, c), = torch.stack(kernel.bridge(F, torch.tensor([t]), torch.tensor([s])), 1).tolist()
        var = None if isinstance(denoiser, Solver) else getattr(ask(denoiser, x, full(x, t), full(x, s), {}), "var", None)
        scales = [] if var is None else [a * var.sqrt()]                        # in the order in which ours draws
        if s and kernel.draws: scales.append(torch.full((), c, dtype=x.dtype))
        noise, total = torch.zeros_like(x), torch.zeros((), dtype=x.dtype)
        for scale in scales:
            noise, total = noise + scale * torch.randn(x.shape, generator=twin, dtype=x.dtype), total + scale.square()
        noise = noise / torch.where(total > 0, total, 1).sqrt()
        kappa = slack(t, s) * size_of_step(schedule, t, s, x, y)
        theirs = their_step(t, s, x, y, noise)
        if single: close(theirs.double(), xs, kappa, dtype=torch.float32)
        else: close(theirs, xs, kappa / thinnest(schedule, t, s))
        x = xs
    return x


def ddpm_step(scheduler, monkeypatch, output=lambda x, t, y: y):
    """A step of DDPMScheduler with given noise."""
    def step(t, s, x, y, noise):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: noise)
        return scheduler.step(output(x, t, y), t - 1, x).prev_sample
    return step


# ------------------------------------------------------------------------------------------------ tables, forward, grids


@pytest.mark.parametrize("name", SCHEDULES)
def test_its_tables_are_ours_in_float32(name):
    "Each of T products rounds twice. At t = 1 that leaves 1 - alpha_bar three or four digits: ours are float64."
    schedule, theirs = SCHEDULES[name], DDPMScheduler(num_train_timesteps=1000, beta_schedule=name).alphas_cumprod
    close(theirs.double() / schedule.alpha_bar[1:], torch.ones(schedule.T), 2 * schedule.T / 32, dtype=torch.float32)
    lost = ((1 - theirs[0].double()) / (1 - schedule.alpha_bar[1]) - 1).abs()
    assert 1e-6 < lost < torch.finfo(torch.float32).eps / (1 - schedule.alpha_bar[1])


@each_schedule
def test_add_noise_and_velocity(schedule):
    scheduler, x0, eps = peer(DDPMScheduler, schedule), start(2), start(3)
    for t in (1, 2, 500, 1000):
        times = full(x0, t)
        xt = Hot(schedule)(x0, times, eps)
        kappa = 6 / (1 - schedule.alpha_bar[t])
        close(scheduler.add_noise(x0, eps, times - 1), xt, kappa)
        close(scheduler.get_velocity(x0, eps, times - 1), Denoiser(net, schedule, V).target(x0, eps, times), kappa)


@pytest.mark.parametrize("n", [1, 2, 7, 10, 50, 300, 1000])
def test_our_even_grid_is_trailing(n):
    """Both start at pure noise. "leading", the default of DDPM and DDIM, does not: a network that is first asked at
    T - T//n + 1 gets noise where training had shown it a trace of signal."""
    schedule, scheduler = SCHEDULES["linear"], DDIMScheduler(timestep_spacing="trailing", num_train_timesteps=1000)
    scheduler.set_timesteps(n)
    ours, theirs = schedule.times(n), their_grid(scheduler)
    assert len(ours) == len(theirs)
    assert max(abs(a - b) for a, b in zip(ours, theirs)) <= (1000 % n > 0)                      # halves round either way
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(n)
    assert their_grid(scheduler)[0] == 1 + (n - 1) * (1000 // n) < 1000 or n == 1000


# ----------------------------------------------------------------------------------------------------------------- DDPM


@each_prediction
@each_schedule
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm(spacing, schedule, P, monkeypatch):
    scheduler = peer(DDPMScheduler, schedule, clip_sample=False, prediction_type=NAMES[P], timestep_spacing=spacing)
    scheduler.set_timesteps(8)
    follow(schedule, Denoiser(net, schedule, P), their_grid(scheduler), ddpm, ddpm_step(scheduler, monkeypatch))


@each_schedule
def test_ddpm_with_every_time(schedule, monkeypatch):
    scheduler = peer(DDPMScheduler, schedule, clip_sample=False)
    follow(schedule, Denoiser(net, schedule, EPS), range(30, -1, -1), ddpm, ddpm_step(scheduler, monkeypatch))


VARIANCES = {                                                       # of the step, as a variance of the guess (chapter 12)
    "fixed_small": lambda schedule, P: Denoiser(net, schedule, P),
    "fixed_large": lambda schedule, P: Denoiser(net, schedule, P, var=schedule.sigma.square()),
    "learned_range": lambda schedule, P: LearnedVariance(lambda x, t: torch.cat([net(x, t), raw(x, t)], 1), schedule, P),
}


def raw(x, t):
    "The other half of a network that learns its variance, in [-1, 1]."
    return torch.sin(3 * x.roll(2, -1) + per_row(t, x))


@each_prediction
@each_schedule
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("n", [8, 1000])
def test_ddpm_with_each_variance(n, variance, schedule, P, monkeypatch):
    "For every stride. Its last time here is 0, where it adds no noise: ours says so with LastMean."
    scheduler = peer(DDPMScheduler, schedule, clip_sample=False, prediction_type=NAMES[P], variance_type=variance)
    scheduler.set_timesteps(n)
    output = (lambda x, t, y: torch.cat([y, raw(x, full(x, t))], 1)) if variance == "learned_range" else (lambda x, t, y: y)
    times = their_grid(scheduler)[-9:]
    follow(schedule, LastMean(VARIANCES[variance](schedule, P)), times, ddpm, ddpm_step(scheduler, monkeypatch, output))


def test_ddpm_adds_noise_to_its_result_when_the_last_time_is_not_0(monkeypatch):
    """Ours is right: a network that says the true noise gives the data back in the last step. DDPMScheduler leaves its
    noise out where t = 0, not in the last step: on a trailing grid with "fixed_large" its result carries noise of the
    scale sigma_t. (What it does there is our guess of variance sigma_t² without LastMean, a *sample* of the data.)"""
    schedule, x0, eps, z = SCHEDULES["linear"], start(1), start(2), start(3)
    scheduler = peer(DDPMScheduler, schedule, clip_sample=False, variance_type="fixed_large", timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    t = their_grid(scheduler)[-2]
    xt, D = Hot(schedule)(x0, full(x0, t), eps), Denoiser(lambda x, t: eps, schedule, EPS, var=schedule.sigma.square())
    close(sample(Hot(schedule), LastMean(D), xt, [t, 0], ddpm), x0, size_of_step(schedule, t, 0, xt, eps))
    error = ddpm_step(scheduler, monkeypatch)(t, 0, xt, eps, z) - x0
    if error.abs().max() < 1e-6: mended("adds no noise in the last step of a trailing grid")
    close(error, schedule.sigma[t] * z, 10 / thinnest(schedule, t, 0))
    sampled = ask(D, xt, full(xt, t), full(xt, 0), {}).sample(generator=rng(4, "cpu"))
    close(sampled - x0, schedule.sigma[t] * torch.randn(x0.shape, generator=rng(4, "cpu"), dtype=x0.dtype), 10)


def test_fixed_large_log_is_not_a_number(monkeypatch):
    """Ours is right: exp(log beta) is beta, so this name should do what "fixed_large" does. DDPMScheduler takes the log,
    then the square root of that negative number."""
    schedule = SCHEDULES["linear"]
    results = {}
    for variance in "fixed_large", "fixed_large_log":
        scheduler = peer(DDPMScheduler, schedule, clip_sample=False, variance_type=variance)
        scheduler.set_timesteps(8)
        results[variance] = ddpm_step(scheduler, monkeypatch)(751, 626, start(), start(1), start(2))
    law = reverse_law(Hot(schedule), ddpm, VARIANCES["fixed_large"](schedule, EPS)(start(), full(start(), 751)),
                      start(), full(start(), 751), full(start(), 626))
    close(law.var, torch.full_like(law.var, 1 - schedule.alpha_bar[751] / schedule.alpha_bar[626]), 10)        # beta
    if results["fixed_large_log"].isfinite().all():
        close(results["fixed_large_log"], results["fixed_large"], 1e3)
        mended("computes fixed_large_log")
    assert results["fixed_large"].isfinite().all() and results["fixed_large_log"].isnan().all()


@each_prediction
@each_schedule
@pytest.mark.parametrize("wrap, config", [
    (lambda D: Clip(D, -0.8, 0.8), dict(clip_sample_range=0.8)),
    (lambda D: Threshold(D, 40 / 47), dict(thresholding=True, dynamic_thresholding_ratio=40 / 47, sample_max_value=1e9)),
], ids=["clip", "threshold"])
def test_clipping_and_dynamic_thresholding(wrap, config, schedule, P, monkeypatch):
    """Of 48 entries, 40/47 is a quantile that is one of them; between entries it interpolates and ours takes the larger.
    DDIM is compared with `use_clipped_model_output`: see the next test."""
    D = wrap(Denoiser(net, schedule, P))
    scheduler = peer(DDPMScheduler, schedule, prediction_type=NAMES[P], **config)
    scheduler.set_timesteps(8)
    follow(schedule, D, their_grid(scheduler), ddpm, ddpm_step(scheduler, monkeypatch))
    scheduler = peer(DDIMScheduler, schedule, prediction_type=NAMES[P], **config)
    scheduler.set_timesteps(8)

    def step(t, s, x, y, noise):
        return scheduler.step(y, t - 1, x, eta=0.5, use_clipped_model_output=True, variance_noise=noise).prev_sample
    follow(schedule, D, their_grid(scheduler), ddim(0.5), step)


def test_ddim_clips_the_data_and_keeps_noise_that_does_not_fit_them(monkeypatch):
    """Ours is right: guess and noise explain the state, so that with eta = 1 DDIM is DDPM, clipped or not. DDIMScheduler
    clips x0 by default and goes on with the network's noise, of which alpha x0 + sigma eps is another state than x_t:
    it then differs from its own DDPMScheduler. `use_clipped_model_output=True` repairs it and is off by default."""
    schedule, x, y, z = SCHEDULES["linear"], 2 * start(), start(1), start(2)
    ours, theirs, repaired, chain = [], [], [], []
    for t, s in (876, 751), (501, 376), (126, 1):
        D = Clip(Denoiser(lambda x, t: y, schedule, EPS))
        ours.append(ddpm(Hot(schedule), D(x, full(x, t)).mean, x, full(x, t), full(x, s), z))
        scheduler = peer(DDIMScheduler, schedule)
        scheduler.set_timesteps(8)
        for out, fit in (theirs, False), (repaired, True):
            out.append(scheduler.step(y, t - 1, x, eta=1.0, use_clipped_model_output=fit, variance_noise=z).prev_sample)
        scheduler = peer(DDPMScheduler, schedule)
        scheduler.set_timesteps(8)
        chain.append(ddpm_step(scheduler, monkeypatch)(t, s, x, y, z))
    ours, theirs, repaired, chain = map(torch.stack, (ours, theirs, repaired, chain))
    close(chain, ours, 1e5), close(repaired, ours, 1e5)                                 # 10 / (1 - alpha_bar_1)
    if (theirs - chain).abs().max() < 1e-9: mended("clips DDIM's noise together with its data")
    assert (theirs - chain).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------------- DDIM


@each_prediction
@each_schedule
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing, n", [("leading", 8), ("trailing", 8), ("leading", 7)])
def test_ddim(spacing, n, eta, schedule, P):
    "n = 7 does not divide T: leading then starts at 1 + 6·142 and stays on its grid."
    scheduler = peer(DDIMScheduler, schedule, clip_sample=False, prediction_type=NAMES[P], timestep_spacing=spacing)
    scheduler.set_timesteps(n)

    def step(t, s, x, y, noise):
        return scheduler.step(y, t - 1, x, eta=eta, variance_noise=noise if eta else None).prev_sample
    follow(schedule, Denoiser(net, schedule, P), their_grid(scheduler), ddim(eta), step)


def off_the_path(schedule, times, run):
    """The oracle-noise property: whoever is told the true eps at every step stays at alpha_t x0 + sigma_t eps."""
    x0, eps = start(4), start(5)
    F = Hot(schedule)
    path = [F(x0, full(x0, t), eps) for t in times]
    return max((a - b).abs().max().item() for a, b in zip(run(path[0], eps), path[1:]))


@pytest.mark.parametrize("spacing, n, stays", [("leading", 10, True), ("leading", 7, True), ("trailing", 10, True),
                                               ("trailing", 7, False), ("linspace", 10, False)])
def test_ddim_takes_its_previous_time_from_T_over_n_and_not_from_its_grid(spacing, n, stays):
    """Ours is right: every step lands on the grid, whatever the grid. DDIMScheduler sets prev = t - T//n, where linspace
    has steps of (T-1)/(n-1) and trailing, unless n divides T, of more than T//n: the next network call is told a time
    that is not the state's. Its DDPMScheduler reads the grid and is right (test_ddpm)."""
    schedule = SCHEDULES["linear"]
    scheduler = peer(DDIMScheduler, schedule, clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(n)
    times = their_grid(scheduler)

    def theirs(x, eps):
        for t in scheduler.timesteps:
            yield (x := scheduler.step(eps, t, x).prev_sample)

    def ours(x, eps):
        D = Denoiser(lambda x, t: eps, schedule, EPS)
        return [step.xt for step in reverse(Hot(schedule), D, x, times, reuse_noise)]
    exact = 1e-10                                                   # 20 steps, amplified by 1/alpha_T = 158
    assert off_the_path(schedule, times, ours) < exact
    error = off_the_path(schedule, times, theirs)
    if stays: assert error < exact
    elif error < 1e-3: mended(f"keeps to its {spacing} grid in DDIM")
    else: assert error > 0.02


# ----------------------------------------------------- solvers that scale the state by 1/alpha and work in float32


def edm(kind, schedule, times, **config):
    """A scheduler whose state is x/alpha, on our grid: `sigmas` are sigma/alpha, and 0 at the end."""
    scheduler = peer(kind, schedule, **config)
    scheduler.set_timesteps(len(times) - 1)
    ratio = (schedule.sigma / schedule.alpha)[torch.tensor(times)]
    scheduler.sigmas, scheduler.timesteps = ratio, torch.tensor(times[:-1], dtype=torch.float32) - 1
    return scheduler


def edm_step(scheduler, schedule):
    def step(t, s, x, y, noise):
        scaled, t = x / schedule.alpha[t], torch.tensor(t - 1.0)
        close(scheduler.scale_model_input(scaled, t), x, x)                             # what it shows the network
        return scheduler.step(y, t, scaled).prev_sample * schedule.alpha[s]
    return step


@each_prediction
@each_schedule
def test_euler_is_ddim_in_other_coordinates(schedule, P):
    times = schedule.times(9)
    scheduler = edm(EulerDiscreteScheduler, schedule, times, prediction_type=NAMES[P])
    follow(schedule, Denoiser(net, schedule, P), times, reuse_noise, edm_step(scheduler, schedule), single=True)


@pytest.mark.parametrize("P", [EPS, V], ids=["epsilon", "v_prediction"])
@each_schedule
def test_ancestral_euler_is_ddpm_in_other_coordinates(schedule, P, monkeypatch):
    times = schedule.times(9)
    scheduler = edm(EulerAncestralDiscreteScheduler, schedule, times, prediction_type=NAMES[P])
    step = edm_step(scheduler, schedule)

    def with_noise(t, s, x, y, noise):
        monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda shape, **_: noise)
        return step(t, s, x, y, noise)
    follow(schedule, Denoiser(net, schedule, P), times, ddpm, with_noise, single=True)


def dpm(schedule, times, **config):
    """DPMSolverMultistepScheduler on our grid. Its own tables hold sigma/alpha, its state is ours."""
    return edm(DPMSolverMultistepScheduler, schedule, times, **config)


def dpm_step(scheduler):
    def step(t, s, x, y, noise):
        return scheduler.step(y, t - 1, x, variance_noise=noise).prev_sample
    return step


@each_prediction
@each_schedule
def test_first_order_dpm_solver_is_ddim_and_its_stochastic_form_ddpm(schedule, P):
    times = schedule.times(9)
    for kind, kernel in ("dpmsolver++", reuse_noise), ("sde-dpmsolver++", ddpm):
        scheduler = dpm(schedule, times, prediction_type=NAMES[P], solver_order=1, algorithm_type=kind)
        follow(schedule, Denoiser(net, schedule, P), times, kernel, dpm_step(scheduler), single=True)


@each_prediction
@each_schedule
def test_second_order_dpm_solver(schedule, P):
    "And its stochastic form, which is the same better guess in DDPM's step."
    times = schedule.times(9)
    for kind, kernel in ("dpmsolver++", reuse_noise), ("sde-dpmsolver++", ddpm):
        scheduler = dpm(schedule, times, prediction_type=NAMES[P], solver_order=2, algorithm_type=kind)
        D = DPMSolver2M(Denoiser(net, schedule, P), Hot(schedule))
        follow(schedule, D, times, kernel, dpm_step(scheduler), single=True, slack=lambda t, s: 4)      # h < 3 h_before


@each_prediction
@each_schedule
def test_heun(schedule, P):
    "Its own loop, two network calls a step but for the last; the far slope enters times (sigma/alpha)_t / (sigma/alpha)_s."
    times = schedule.times(9)
    scheduler = edm(HeunDiscreteScheduler, schedule, times, prediction_type=NAMES[P])
    ratio = scheduler.sigmas
    scheduler.sigmas = torch.cat([ratio[:1], ratio[1:-1].repeat_interleave(2), ratio[-1:]])
    scheduler.timesteps = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[1:].repeat_interleave(2)])
    stage = edm_step(scheduler, schedule)

    def step(t, s, x, y, noise):
        euler = stage(t, s, x, y, noise)
        return stage(s, s, euler, net(euler, full(euler, s)), noise) if s else euler

    def slack(t, s):
        return 10 * ratio[times.index(t)] / ratio[times.index(s)] if s else 1
    follow(schedule, Heun(Denoiser(net, schedule, P), Hot(schedule)), times, reuse_noise, step, slack=slack)


# ------------------------------------------------------------------------------------------------------ no signal at T


@each_schedule
def test_zero_terminal_signal(schedule):
    theirs = (1 - rescale_zero_terminal_snr(schedule.beta[1:])).cumprod(0)
    close(theirs, zero_terminal(schedule).alpha_bar[1:], 2 * schedule.T / 32)
    assert theirs[-1] == zero_terminal(schedule).alpha[-1] == 0


@pytest.mark.parametrize("P", [X0, V], ids=["sample", "v_prediction"])
@each_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_from_no_signal(eta, schedule, P):
    schedule = zero_terminal(schedule)
    scheduler = peer(DDIMScheduler, schedule, clip_sample=False, prediction_type=NAMES[P], timestep_spacing="trailing")
    scheduler.set_timesteps(8)

    def step(t, s, x, y, noise):
        return scheduler.step(y, t - 1, x, eta=eta, variance_noise=noise if eta else None).prev_sample
    follow(schedule, Denoiser(net, schedule, P), their_grid(scheduler), ddim(eta), step)


def test_noise_prediction_from_no_signal():
    """Ours is right to refuse: without signal the noise is the state, and says nothing of the data. DDIMScheduler takes
    this pair of settings and divides by zero, in silence."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    with pytest.raises(ValueError, match="expected alpha > 0 for EPS"): Denoiser(net, zero_terminal(SCHEDULES["linear"]), EPS)
    scheduler.set_timesteps(8)
    result = scheduler.step(start(1), 999, start()).prev_sample
    if result.isfinite().all(): mended("has no division by zero with rescale_betas_zero_snr and epsilon")
    assert not result.isfinite().any()


def test_rounding_makes_ddim_of_eta_1_not_a_number():
    """Ours is right: it has sqrt(1 - rho²) with rho = sqrt(1 - something), never below 0. DDIMScheduler has
    sqrt(1 - alpha_bar - std²), which is 0 in exact numbers where x_T has no signal, and rounds to either side: with its
    own float32 tables every other number of steps ends in NaN."""
    schedule = zero_terminal(SCHEDULES["linear"])
    lost = []
    for n in range(1, 61):
        scheduler = DDIMScheduler(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction")
        scheduler.set_timesteps(n)
        if scheduler.step(start(1).float(), 999, start().float(), eta=1.0).prev_sample.isnan().any(): lost.append(n)
        assert torch.tensor(coefficients(Hot(schedule), ddpm, their_grid(scheduler))).isfinite().all()
    if not lost: mended("has no NaN in DDIM of eta = 1 from zero terminal SNR")
    assert len(lost) > 10 and 10 in lost


def test_rounding_makes_ancestral_euler_not_a_number():
    "The same subtraction, sigma_to² - sigma_up², with the cosine schedule and 4 steps."
    scheduler = EulerAncestralDiscreteScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(4)
    x = start().float()
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
    assert torch.tensor(coefficients(Hot(SCHEDULES["squaredcos_cap_v2"]), ddpm, SCHEDULES["squaredcos_cap_v2"].times(4))).isfinite().all()
    if x.isfinite().all(): mended("has no NaN in 4 ancestral steps of the cosine schedule")
    assert x.isnan().any()


# ------------------------------------------------------------------------------------- inversion and the known part


@each_prediction
@each_schedule
def test_inversion(schedule, P):
    """One step up from the same state with the same noise; see below for the time at which the network is asked for it.
    The step that leaves the data is compared for "epsilon" alone: "sample" divides by 0 there."""
    F, D, x = Hot(schedule), Denoiser(net, schedule, P), start()
    scheduler = peer(DDIMInverseScheduler, schedule, clip_sample=False, prediction_type=NAMES[P])
    scheduler.set_timesteps(8)
    grid = [0] + [int(t) + 1 for t in scheduler.timesteps]
    for s, t in zip(grid, grid[1:]):
        up = invert(F, D, x, [t, s])
        y = net(x, full(x, s)) if s else net(schedule.alpha[t] * x, full(x, t))
        kappa = size_of_step(schedule, s or t, t, x, y) / schedule.sigma[s or t].square()
        if s or P is EPS: close(scheduler.step(y, t - 1, x).prev_sample, up, kappa)
        x = up


def test_inversion_asks_for_the_noise_where_the_state_is():
    """Ours is right: for data of one point m the noise (x - alpha_t m) / sigma_t of a state is the same all along its path,
    so going up must keep it, in any number of steps. DDIMInverseScheduler numbers its steps by where they arrive, and its
    pipelines ask the network there, about a state that is not there yet."""
    schedule, m, eps = SCHEDULES["linear"], start(1), start(2)
    F = Hot(schedule)
    scheduler = peer(DDIMInverseScheduler, schedule, clip_sample=False)
    scheduler.set_timesteps(8)
    times = their_grid(scheduler)[-2::-1]

    def exact(x, t):
        return F.infer_noise(m, x, t)
    x = F(m, full(m, times[-1]), eps)
    ours = invert(F, Denoiser(exact, schedule, EPS), x, times)
    truth = F(m, full(m, times[0]), eps)
    close(ours, truth, 1e4)
    for t in scheduler.timesteps[1:]:
        x = scheduler.step(exact(x, full(x, int(t) + 1)), int(t), x).prev_sample
    if (x - truth).abs().max() < 1e-6: mended("inverts with the noise of the state it leaves")
    assert (x - truth).abs().max() > 0.1


def repaint(schedule, n, eta):
    scheduler = peer(RePaintScheduler, schedule, clip_sample=False, eta=eta)
    scheduler.betas = schedule.beta[1:].clone()
    scheduler.set_timesteps(n, jump_length=1, jump_n_sample=1)
    return scheduler


@each_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n, resample", [(8, 1), (1000, 3)])
def test_inpainting(n, resample, eta, schedule, monkeypatch):
    """Runs of one, two, … steps around known entries. With n = 1000, where its step back up is right, also resampled
    (by hand: its own list of jumps leaves the first step out)."""
    F, D, kernel, scheduler = Hot(schedule), Denoiser(net, schedule, EPS), ddim(eta), repaint(schedule, n, eta)
    known, mask, grid = start(1), start(2) > 0, their_grid(scheduler)[-5:]
    for end in range(2, len(grid) + 1):
        times, twin = grid[:end], rng(3, "cpu")
        ours = inpaint(F, D, known, mask, times, kernel, resample=resample, generator=rng(3, "cpu"))
        draw = lambda *_, **__: torch.randn(known.shape, generator=twin, dtype=known.dtype)
        x, error = draw(), 0.0
        for t, s in zip(times, times[1:]):
            (a, b, _), = torch.stack(kernel.bridge(F, torch.tensor([t]), torch.tensor([s])), 1).tolist()
            gain = abs(a) * (1 + 1.7 * schedule.sigma[t]) / schedule.alpha[t] + abs(b)  # the network's slope is below 1.7
            for again in range(resample)[::-1]:
                y = net(x, full(x, t))
                error = error * gain + size_of_step(schedule, t, s, x, y) / thinnest(schedule, t, s)
                fresh = draw() if s and kernel.draws else torch.zeros_like(x)
                monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda *_, **__: torch.where(mask, draw(), fresh))
                x = scheduler.step(y, t - 1, x, known, mask.double()).prev_sample
                monkeypatch.setattr(scheduling_repaint, "randn_tensor", draw)
                if again: x = scheduler.undo_step(x, t - 1)
        close(x, ours, error)
        if times[-1] == 0: assert torch.equal(ours[mask], known[mask]) and torch.equal(x[mask], known[mask])


def test_the_step_back_up_adds_the_noise_of_its_own_span(monkeypatch):
    """Ours is right: going up from q(x_s | x0) must give q(x_t | x0), of mean alpha_t x0. RePaintScheduler climbs with
    betas[t], betas[t+1], … where the span from s to t has betas[s+1] … betas[t]: right for strides of 1 only, which is
    not how it is used (250 steps of 1000)."""
    schedule = SCHEDULES["linear"]
    monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    errors = {}
    for n in 1000, 250, 50:
        scheduler, stride = repaint(schedule, n, 1.0), 1000 // n
        t = 601
        x0, s = torch.ones(1, 1, dtype=torch.float64), t - stride
        up = Hot(schedule).step(schedule.alpha[s] * x0, full(x0, t), full(x0, s), torch.zeros_like(x0))
        close(up, schedule.alpha[t] * x0, 2)
        errors[n] = (scheduler.undo_step(schedule.alpha[s] * x0, t - 1) / schedule.alpha[t] - 1).abs().item()
    assert errors[1000] < 1e-12
    if errors[50] < 1e-9: mended("climbs with the betas of its own span in RePaint")
    assert errors[250] > 1e-5 and errors[50] > 1e-3
