"""The tests have power: small errors in the exported code are noticed.

Mutants come from rules applied to the exported lines (a sign, an index off by one, a missing square root, alpha for sigma,
s for t, the mean for a sample, …) and from a list of classics. Each lives in a fork of this process, where the library is
loaded anew with one module changed and the fast tests of that module and the laws are run until one fails.
Survivors stand in EQUIVALENT, each with the reason why no test can tell it from the original.
"""
import ast
import copy
import importlib
import importlib.abc
import importlib.util
import inspect
import itertools
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "udm_book"

# What runs against a mutant of a module: its own test file first, then those that rest on it.
KILLERS = {
    "forward": ["test_forward", "test_bad_input", "test_hot"],
    "posterior": ["test_posterior", "test_objective", "test_speed"],
    "reverse": ["test_reverse", "test_bad_input", "test_hot", "test_speed"],
    "objective": ["test_objective", "test_bad_input"],
    "schedule": ["test_schedule", "test_bad_input"],
    "hot": ["test_hot", "test_bad_input"],
    "parameterization": ["test_parameterization", "test_bad_input", "test_objective", "test_schedule"],
    "likelihood": ["test_likelihood"],
    "analytic": ["test_analytic"],
    "estimators": ["test_estimators"],
    "elbo": ["test_elbo", "test_mask"],
    "score": ["test_score"],
    "oracle": ["test_oracle", "test_bad_input"],
    "data": ["test_data", "test_bad_input"],
    "lines": ["test_lines"],
    "train": ["test_train", "test_bad_input", "test_resume"],
    "batches": ["test_batches", "test_resume"],
    "resume": ["test_resume", "test_train"],
    "network": ["test_network", "test_bad_input"],
    "samplers": ["test_samplers"],
    "degradations": ["test_degradations"],
    "cold": ["test_cold"],
    "mask": ["test_mask", "test_edit"],
    "edit": ["test_edit"],
    "encoding": ["test_encoding"],
    "text": ["test_text"],
    "conditional": ["test_conditional"],
    "guidance": ["test_guidance"],
    "config": ["test_config"],
    "runs": ["test_runs"],
    "measure": ["test_measure"],
}

# ----------------------------------------------------------------------------------------------------------- the classics

# (module, what stands there, what is put there instead): errors that published code has had.
CLASSICS = {
    "β for β̃: the variance of the chain in the posterior": (
        "hot", "row(c.square(), x0)",
        "row((self.schedule.sigma[t] * markov_rho(self.schedule, t, s)).square(), x0)"),
    "√ᾱ_t for √α_t in the chain": ("hot", "row(a[t] / a[s], xs) * xs", "row(a[t], xs) * xs"),
    "unstrided β: the share of one step, whatever the stride": (
        "hot", "\n    a, b = (schedule.alpha, schedule.sigma)\n",
        "\n    a, b, s = (schedule.alpha, schedule.sigma, t - 1)\n"),
    "the ratio of SNRs upside down": ("hot", "a[t] * b[s] / (a[s] * b[t])", "a[s] * b[t] / (a[t] * b[s])"),
    "a variance for a standard deviation": ("hot", ".square()).sqrt()", ".square())"),
    "ᾱ for √ᾱ in the tables": ("schedule", "super().__init__(alpha=a.sqrt()", "super().__init__(alpha=a"),
    "1 - √ᾱ for √(1 - ᾱ)": ("schedule", "sigma=(1 - a).sqrt()", "sigma=1 - a.sqrt()"),
    "σ² for σ": ("schedule", "sigma=(1 - a).sqrt()", "sigma=1 - a"),
    "log-SNR without its 2": ("schedule", "return 2 * (self.alpha.log()", "return (self.alpha.log()"),
    "the cosine without its clip": ("schedule", ".clamp(max=max_beta)", ""),
    "even steps of log noise for even quantiles": ("schedule", "torch.special.ndtri(u[0].lerp(u[1], ", "torch.lerp(*torch.special.ndtri(u), ("),
    "the mean instead of a sample (generic loop)": (
        "reverse", "x0 = posterior.sample(generator=generator)",
        "x0 = posterior.mean"),
    "the mean instead of a sample (collapsed loop)": ("reverse", "cond).sample(generator=generator)", "cond).mean"),
    "the last step adds noise": ("reverse", "if times[i + 1] == 0 and F.ends_with_guess:", "if False:"),
    "noise kept with 1 - ρ for √(1 - ρ²)": (
        "reverse", "keep, add = (row((1 - rho.square()).sqrt(), xt)",
        "keep, add = (row(1 - rho, xt)"),
    "noise scaled by σ_t for σ_s": ("reverse", "rho * sigma[s])", "rho * sigma[t])"),
    "the guess scaled by α_t for α_s": (
        "reverse", "return (alpha[s] - b * alpha[t]",
        "return (alpha[t] - b * alpha[t]"),
    "the denoiser told the time it steps to": (
        "reverse", "ask(denoiser, x, grid[i], grid[i + 1], cond).sample",
        "ask(denoiser, x, grid[i + 1], grid[i + 1], cond).sample"),
    "the sign of v": ("parameterization", "(-sigma, alpha)", "(sigma, alpha)"),
    "skip and out exchanged": ("parameterization", "skip, out = self.into(", "out, skip = self.into("),
    "min(SNR + 1, γ) for min(SNR, γ)": ("parameterization", "schedule.snr.clamp(max=gamma)", "(schedule.snr + 1).clamp(max=gamma)"),
    "the SNR of the roots squared once more": (
        "parameterization", "schedule.snr.clamp(max=gamma)", "schedule.snr.square().clamp(max=gamma)"),
    "the bound with β_t of the whole way": ("parameterization", "-schedule.snr[1:].diff() / 2", "schedule.snr[2:] / 2"),
    "the noise of one step for that of all": (
        "parameterization", "asked((1 - kept.square()).sqrt() / sigma, sigma)", "asked(torch.ones_like(sigma), sigma)"),
    "the mean with β̃_t's σ_{t-1} for its square": (
        "parameterization", "alpha / a * s.square() / sigma", "alpha / a * s / sigma"),
    "c_out without σ_data": ("parameterization", "sigma / (sigma_data * size)", "sigma / size"),
    "zero terminal SNR by shifting alone": (
        "parameterization", "alpha[1] * (alpha - alpha[-1]) / (alpha[1] - alpha[-1])", "alpha - alpha[-1]"),
    "the weight without its square": ("parameterization", "[1].square()", "[1]"),
    "times drawn from 0": ("objective", "torch.randint(1, F.T + 1, x0", "torch.randint(0, F.T + 1, x0"),
    "times drawn up to T - 1": ("objective", "torch.randint(1, F.T + 1, x0", "torch.randint(1, F.T, x0"),
    "independent times up to T - 1": ("objective", "torch.randint(1, F.T + 1, (n,)", "torch.randint(1, F.T, (n,)"),
    "a comb without its turn": ("objective", "/ n + turn) % 1", "/ n + 0 * turn) % 1"),
    "a comb with two teeth in one place": ("objective", "dtype=torch.float64) / n + turn", "dtype=torch.float64) / (n - 1) + turn"),
    "a comb that shifts within its strata alone": ("objective", "/ n + turn) % 1", "/ n + turn / n) % 1"),
    "stratified times from 0": ("objective", "(F.T * u).long() + 1", "(F.T * u).long()"),
    "stratified times up to T - 1": ("objective", "(F.T * u).long()", "((F.T - 1) * u).long()"),
    "weights of the times forgotten": ("objective", "return weight * self.loss(", "return self.loss("),
    "noise drawn where the loss is computed": ("objective", "self.denoiser, x0, t, eps, **cond)", "self.denoiser, x0, t, **cond)"),
    "a new noise for the target": (
        "objective", "denoiser.target(x0, eps, t), reduction",
        "denoiser.target(x0, F.sample_noise(x0), t), reduction"),
    "characters of held-out lines in the vocabulary": (
        "lines", "counts = Counter(chain.from_iterable(train))", "counts = Counter(chain.from_iterable(lines))"),
    "an unknown token that the held-out lines have": ("lines", "used = set().union(*lines)", "used = set().union(*train)"),
    "BGR for RGB": ("data", ".permute(2, 0, 1)", ".permute(2, 0, 1).flip(0)"),
    "a crop that is off by one": ("data", "(length - side) // 2", "(length - side + 1) // 2"),
    "the corner instead of the centre": ("data", "(length - side) // 2", "0 * length"),
    "every eighth pixel instead of their mean": ("data", "Image.Resampling.BICUBIC", "Image.Resampling.NEAREST"),
    "bytes over 255": ("data", "pixels.float() / 127.5 - 1", "pixels.float() / 255"),
    "bytes cut off instead of rounded": ("data", "127.5).round()", "127.5)"),
    "what is transparent on black": ("data", "image.size, 'white')", "image.size, 'black')"),
    "16 bits by their low byte": ("data", "(values / 257).round()", "(values % 256)"),
    "a photograph left on its side": ("data", "ImageOps.exif_transpose(image)", "image.copy()"),
    "pairs of a row with itself": ("data", ".fill_diagonal_(0)", ""),
    "half the square of the bandwidth": ("data", ".square() / 2).exp()", ".square()).exp()"),
    "the bandwidth of the wrong set": ("data", "torch.pdist(b)", "torch.pdist(a)"),
    "labels of all images for those that can be read": ("data", "images[i].parts[0]) for i in sound", "images[i].parts[0]) for i in range(n)"),
    "attention to features that are not normalised": ("network", "x = self.norm(x)", "x = x"),
    "one head for several": ("network", "(self.heads, -1)", "(1, -1)"),
    "the image asked instead of the context": ("network", "self.outside(pixels, context)", "self.inside(pixels)"),
    "nothing carried over in the U-Net": ("network", "grow(h) + held.pop()", "grow(h)"),
    "features scaled by what should be added to 1": ("network", "(1 + scale)", "scale"),
    "label 0 for the null label": ("network", "torch.full_like(t, self.classes)", "torch.zeros_like(t)"),
    "the place forgotten": ("network", "self.token(x) + self.place", "self.token(x)"),
    "nats for bits": ("text", "nats / (length * math.log(2))", "nats / length"),
    "tokens counted where pairs should be": ("text", "shared * self.ends[x]", "shared * self.single[x]"),
    "first weights that forget the seed": ("config", "torch.manual_seed(config.seed)", "torch.manual_seed(0)"),
    "training pictures among those held out": ("runs", "Subset(images, order[n:])", "Subset(images, order)"),
    "samples by the last weights instead of their average": ("runs", "state.ema", "state.model"),
    "samples measured against training data": ("measure", "energy_distance(new, held)", "energy_distance(new, real)"),
    "a decoder with a standard deviation for its variance": (
        "measure", "1 / schedule.snr[1].item()", "schedule.snr[1].item() ** -0.5"),
    "times drawn unevenly, losses not divided": ("text", "(1 / (F.T * p[t])).float()", "torch.ones(n)"),
    "all times equally likely": ("text", "dtype=torch.float64).rsqrt()", "dtype=torch.float64) * 0 + 1"),
    "w for 1 + w: the other convention of the scale": ("guidance", "cls(denoiser, 1 + w, null)", "cls(denoiser, w, null)"),
    "guided away from the label": ("guidance", "weight(self.scale, xt) * shift * g)", "-weight(self.scale, xt) * shift * g)"),
    "the gradient of a raw logit": ("guidance", "classifier(x, t).log_softmax(-1)", "classifier(x, t)"),
    "the classifier asked at the guess": (
        "guidance", "label_gradient(self.classifier, xt, t, y)\n        posterior = self.denoiser(xt, t, **cond, **{'y': y} if self.tell else {})",
        "label_gradient(self.classifier, (posterior := self.denoiser(xt, t, **cond, **{'y': y} if self.tell else {})).mean, t, y)"),
    "the guess shifted by σ for σ²": ("guidance", "sigma.square() / alpha", "sigma / alpha"),
    "label and null label exchanged": ("guidance", "y=torch.cat([y, null])", "y=torch.cat([null, y])"),
    "labels dropped for the whole batch at once": ("conditional", "torch.rand(len(x0),", "torch.rand(1,"),
    "Laplace draws of one sign": ("posterior", "dtype=m.dtype) * 2 - 1", "dtype=m.dtype) * 0 + 1"),
    "a standard deviation taken for a variance": (
        "posterior", "self.var.sqrt() * normal_like",
        "self.var * normal_like"),
    "an impossible token at u = 0": ("posterior", "right=True", "right=False"),
    "probabilities summed in float32": ("posterior", "p.cumsum(1, dtype=torch.float64)", "p.cumsum(1).double()"),
    "a stick taken to be one long": ("posterior", " * total[:, -1:]", ""),
    "a softmax over the positions": ("posterior", "z.softmax(-1, dtype=fine)", "z.softmax(0, dtype=fine)"),
    "probabilities rounded to the bits of the logits": ("posterior", "torch.promote_types(flat.dtype, torch.float32)", "flat.dtype"),
    "one u for every piece": ("posterior", "zip(flat.split(chunk), u.split(chunk))", "((z, u[:len(z)]) for z in flat.split(chunk))"),
    "positions read as rows": ("posterior", "self.features[where]", "self.features[where.any(1)].flatten(0, 1)"),
    "the guess returned where a last step is due": (
        "reverse", "last = times[i + 1] == 0 and F.ends_with_guess", "last = times[i + 1] == 0"),
    "noise mixed that is not normal": ("reverse", "if not F.normal:", "if False:"),
    "marginals for logits": ("oracle", "Categorical(self.mean.log())", "Categorical(self.mean)"),
    "a table without the chances of its sentences": (
        "oracle", "joint = self.log_probs + self.F", "joint = 0 * self.log_probs + self.F"),
    "a level of noise for its square": ("oracle", "noise.square()[:, None, None]", "noise[:, None, None]"),
    "the covariance of the data for that of what is left": (
        "oracle", "rest = cov - gain @ maps @ cov", "rest = cov - 0 * (gain @ maps @ cov)"),
    "the oracle forgets what the data weigh": (
        "oracle", "d.log_weights + component_log_prob(z, total)",
        "component_log_prob(z, total)"),
    "the covariance between components left out": (
        "oracle", "return within + torch.einsum",
        "return within + 0 * torch.einsum"),
    "half widths of 8 bits, whatever the levels": ("likelihood", "levels.step / 2 / sd", "1 / 255 / sd"),
    "closed bins at the ends": (
        "likelihood", "return torch.where(k == 0, first, torch.where(k == levels.n - 1, last, inner))",
        "return inner"),
    "a floor under the masses": (
        "likelihood", "return torch.where(narrow, thin, wide)",
        "return torch.where(narrow, thin, wide).clamp(min=math.log(1e-12))"),
    "a tanh for the normal distribution function": (
        "likelihood", "torch.special.erfc(above) / 2)",
        "(1 - torch.tanh(math.sqrt(2 / math.pi) * (x.clamp(min=0) + 0.044715 * x.clamp(min=0) ** 3))) / 2)"),
    "a variance taken for a standard deviation by the decoder": ("likelihood", "sd = var.sqrt()", "sd = var"),
    "uniform noise that is not centred": ("likelihood", "(u - 0.5)", "u"),
    "bits divided by the size of the batch too": ("likelihood", "x0[0].numel()", "x0.numel()"),
    "the variance of a whole datum for that of one number": (
        "analytic", "return (x0 - mean).square().reshape(len(x0), -1).mean(1)",
        "return (x0 - mean).square().reshape(len(x0), -1).sum(1)"),
    "the second form for a network that is not exact": (
        "analytic", "each.append(error_var(data, mean)",
        "each.append(noise_var(F.schedule, F.infer_noise(mean, xt, t), t)"),
    "noise on another datum than the one compared with": (
        "analytic", "return (x0[i], F.sample", "return (x0[i.flip(0)], F.sample"),
    "the standard error without its root": ("analytic", "each.std(1) / n ** 0.5", "each.std(1) / n"),
    "negative estimates kept": ("analytic", "return var.clamp_min(0)", "return var"),
    "σ/α for σ²/α² in the upper bound": (
        "analytic", "(schedule.sigma / schedule.alpha).square()", "(schedule.sigma / schedule.alpha)"),
    "the table of variances one time late": ("analytic", "*self.var.at(t, xt)", "*self.var.at(t - 1, xt)"),
    "x̂_t compared with its own input": (
        "estimators", "model_step(F, denoiser, xt, t, cond).nll(xs))", "model_step(F, denoiser, xt, t, cond).nll(xt))"),
    "states drawn one by one for a path": ("estimators", "xt = F.step(xs, t, t - 1, eps)", "xt = F(x0, t, eps)"),
    "one term taken for the sum over t": (
        "estimators", "F.T * model_step(F, denoiser, xt, t, cond).nll(xs)", "model_step(F, denoiser, xt, t, cond).nll(xs)"),
    "the distance of the means alone for the divergence": (
        "estimators", "+ per_row((q.var / p.var).expand_as(x0)) / 2", ""),
    "a step's noise drawn apart from its state": ("estimators", "per_row((step - net", "per_row((F.sample_noise(x0) - net"),
    "the noise of a step taken for all of it": ("estimators", "t, **cond) / rho)", "t, **cond))"),
    "a reflection with two equal signs": ("estimators", "add * earlier - keep * step", "add * earlier + keep * step"),
    "the variance of the forward step for that of the bridge": (
        "elbo", "own = (row(a, x0), row(c.square(), x0))",
        "own = (row(a, x0), row((F.schedule.sigma[t] ** 2 - (F.schedule.alpha[t] / F.schedule.alpha[s] * "
        "F.schedule.sigma[s]) ** 2).expand(c.shape), x0))"),
    "the divergence the wrong way round": (
        "elbo", "normal_kl(a * x0, own, a * mean, own + a.square() * var)", "normal_kl(a * mean, own + a.square() * var, a * x0, own)"),
    "the constant of the divergence forgotten": ("elbo", " + (excess - excess.log1p())", ""),
    "the variance of the guess not carried to the step": ("elbo", "own + a.square() * var", "own"),
    "the guess's variance without the square of its coefficient": ("elbo", "own + a.square() * var", "own + a * var"),
    "the prior compared at T - 1": ("elbo", "table[-1] for table", "table[-2] for table"),
    "one noise for all the times of a chunk": (
        "elbo", "draws = [F.sample_noise(x0, generator=generator) for _ in range(i, j)]",
        "draws = [F.sample_noise(x0, generator=generator)] * (j - i)"),
    "the prior left out of the bound": ("elbo", "return self.prior + self.steps", "return self.steps"),
    "the second slope of Heun at the level of the first": (
        "score", "self.guess(euler, s if isinstance(w, float) else s.clamp(min=1), s, cond)", "self.guess(euler, t, s, cond)"),
    "Heun's mean of slopes without its half": ("score", "ratio_s / ratio / 2", "ratio_s / ratio"),
    "no fallback in the last step": ("score", "torch.where(sigma == 0, 0.0, torch.where(", "torch.where(sigma < 0, 0.0, torch.where("),
    "a solver that remembers the run before": ("score", "if t is self.time and", "if self.time is not None and"),
    "the steps of 2M upside down": ("score", "-h / h_before / 2", "-h_before / h / 2"),
    "the score without its square": ("score", "(alpha * mean - xt) / sigma.square()", "(alpha * mean - xt) / sigma"),
    "variances mixed, not their logarithms": (
        "samplers", "torch.expm1(nu * rate) + last) / gain", "nu * torch.expm1(rate) + last) / gain"),
    "the learned range of one step, whatever the stride": ("samplers", "self.range.at(s, like)", "self.range.at(t - 1, like)"),
    "the bound trains the mean too": ("samplers", "y.detach()", "y"),
    "RePaint: the known part noised to t": ("samplers", "F.sample(known, s,", "F.sample(known, t,"),
    "RePaint: the last round goes back up as well": ("samplers", "if again:", "if True:"),
    "inversion: the noise of one time with the scales of another": (
        "samplers", "F.infer_noise(guess, here, s, None)", "F.infer_noise(guess, here, t, None)"),
    "z = 0 one step too early": ("samplers", "row(s > 0, xt)", "row(s > 1, xt)"),
    "a variance without a² for the guess": ("samplers", "c ** 2 + a ** 2 * v[t]", "c ** 2 + v[t]"),
    "t/l for l/t as the weight of a hole": ("mask", "return 1 - share[s] / share[t]", "return share[t] / self.T"),
    "every hole counted whole in a term of the bound": (
        "mask", "return share * each.new_zeros", "return 1 * each.new_zeros"),
    "visible tokens left out where the guess may replace them": (
        "mask", "torch.where(hidden, share[:, None] * each, each)", "torch.where(hidden, share[:, None] * each, 0 * each)"),
    "as many masks left as before the step": ("mask", "return (n - s)", "return (n - t)"),
    "visible positions among those to fill": (
        "mask", "self.order(posterior, hidden, generator).masked_fill(~hidden, -math.inf)",
        "self.order(posterior, hidden, generator)"),
    "confidence in the drawn token decides": (
        "mask", "score = self.order(posterior, hidden, generator)",
        "drawn = posterior.sample(generator=generator); p = posterior.mean; "
        "posterior = Categorical(nn.functional.one_hot(drawn, F.vocab).log()); "
        "score = p.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)"),
    "one hit too many, counted": ("mask", "ranks(u) < t", "ranks(u) <= t"),
    "places for ranks": ("mask", "descending=descending).argsort(1)", "descending=descending)"),
    "the number of sets forgotten": (
        "mask", " + log_factorial(t) - math.lgamma(l + 1)", " - log_factorial(l - t)"),
    "numbers of hits spread over the whole interval": ("mask", "return torch.where(must, fresh * r, spare)", "return torch.where(must, fresh, spare)"),
    "Algorithm 2 with D_t and D_{t-1} exchanged, by the sign of the inferred noise": (
        "cold", "(xt - self.D(x0, t)) / self.table.at", "(self.D(x0, t) - xt) / self.table.at"),
    "Algorithm 2 that forgets where it stands": ("cold", "(xt - self.D(x0, t)) / self.table.at", "self.D(x0, t) / self.table.at"),
    "noise inferred with the level of the time before": ("cold", "self.table.at(t, x0)[0]", "self.table.at(t - 1, x0)[0]"),
    "improved sampling that ends with the guess, whatever the levels": (
        "cold", "self.ends_with_guess = bool(levels[0] == 0)", "self.ends_with_guess = True"),
    "a scale of 0 that divides": ("cold", "/ self.table.at(t, x0)[0]", "/ (self.scale * self.table.at(t, x0)[0])"),
    "generation from what is left at T - 1": ("forward", "(len(x0),), self.T,", "(len(x0),), self.T - 1,"),
    "no damage in the inferred noise": ("cold", "(xt - self.D(x0, t)) / self.table.at", "(xt - x0) / self.table.at"),
    "the old token counted as an edit": ("edit", "others = logits.scatter(-1, own, -math.inf)", "others = logits"),
    "Z over the wrong tokens alone": (
        "edit", "Z = change.double().exp().sum(1)",
        "Z = torch.where(differ, change.double().exp(), 0.0).sum(1)"),
    "a uniform start for rule two": (
        "edit", "return self.sample_end(like, generator=generator)",
        "return torch.randint(0, self.vocab, like.shape, generator=generator, device=like.device)"),
    "rule two writes the old token too": ("edit", "span = (self.vocab - self.choices, self.vocab)", "span = (0, self.vocab)"),
    "rule two rests like rule one": ("edit", "return torch.zeros_like(Z)", "return (t - Z).clamp_min(0)"),
    "rule one never rests": ("edit", "return (t - Z).clamp_min(0)", "return torch.zeros_like(Z)"),
    "hits that left no trace get other tokens": (
        "edit", "torch.where(self.hits.at(u, t), xt, fresh[1])",
        "torch.where(self.seen(x0, xt), xt, fresh[1])"),
    "hits outside the differences restored": (
        "edit", "torch.where(differ, (xt - x0) % self.vocab, fresh[1])",
        "torch.where(self.hits.at(u, t), (xt - x0) % self.vocab, fresh[1])"),
    "a difference too many in the table": ("edit", "return table[:, 0].gather", "return table[:, 1].gather"),
    "differences due, not less one": ("edit", "one_less(z[:, 1:]) - z[:, :-1]", "z[:, 1:] - z[:, :-1]"),
    "the likeliest tokens for the largest margins": (
        "edit", "margin = others.amax(-1) - self.logits.gather(-1, self.xt.unsqueeze(-1)).squeeze(-1)",
        "margin = others.amax(-1)"),
    "a bound without its -log t": ("edit", "(total - t.log())", "total"),
    "rule one as far from uniform as rule two": (
        "edit", "c = 1 - F.hits.table.share[-1] * (1 - F.odds)",
        "c = 1 - F.hits.table.share[-1]"),
    "the moving average turned around": ("train", "1 - keep)", "keep)"),
    "the counter of the average not saved": ("train", "torch.zeros((), dtype=torch.long))", "torch.zeros((), dtype=torch.long), persistent=False)"),
    "the counter of the average not taken up": ("resume", "self.ema.updates.copy_(checkpoint.rest['updates'])", "pass"),
    "the average copied into the model when it is saved": (
        "train", "self.record.save(", "self.model.load_state_dict(self.ema_model.state_dict()); self.record.save("),
    "resumed one step late": ("resume", "self.step = checkpoint.step", "self.step = checkpoint.step + 1"),
    "warm-up that starts again when a run is resumed": (
        "train", "s.lr * rate(n, s.steps, s.warmup)", "s.lr * rate(n - self.__dict__.setdefault('began', n), s.steps, s.warmup)"),
    "parts clipped before they are added up": (
        "train", "            loss = loss + value.detach()\n",
        "            loss = loss + value.detach()\n            nn.utils.clip_grad_norm_(trained, s.clip)\n"),
    "an order of the data that no one can repeat": (
        "batches", "torch.Generator().manual_seed(seed_of(self.seed, 'pass', k))", "None"),
    "renamed before it is on the disk": (
        "resume", "    sync(part)\n    os.replace(part, path)\n", "    os.replace(part, path)\n    sync(path)\n"),
    "the folder not synchronised": ("resume", "    sync(path.parent)\n", ""),
    "moments that do not survive": ("resume", "state[i] = moments", "pass"),
    "the log not cut back": ("resume", "json.loads(line)['step'] <= step", "True"),
    "the same noise for every process": (
        "train", "slice(self.rank * len(x0), (self.rank + 1) * len(x0))", "slice(0, len(x0))"),
    "a step that is not finite taken all the same": ("train", "(~self.judge(n, loss)).float()", "0 * (~self.judge(n, loss)).float()"),
    "a bad step hidden by its finite gradient": ("train", "torch.isfinite(loss + self.norm)", "torch.isfinite(self.norm)"),
    "a scale without a floor": ("train", "(t['scale'] > 1)", "(t['scale'] > 0)"),
    "a width for its square": ("degradations", "width.square() / 2", "width / 2"),
    "the identity up to rounding": ("degradations", "return torch.where(row(t, x0) == 0, x0, blurred)", "return blurred"),
    "cosines at the pixels' edges for their centres": ("degradations", "* k * (2 * i + 1)", "* k * (2 * i)"),
    "waves of the rows for those of the columns": ("degradations", "rates = decay_rates(h)[:, None] + decay_rates(w)", "rates = decay_rates(h)[:, None] + decay_rates(h)[:1]"),
    "0 times infinity at the end of the blur": (
        "degradations", "torch.where(rates > 0, (-rates * width.square() / 2).exp(), 1.0)", "(-rates * width.square() / 2).exp()"),
    "blocks summed up": ("degradations", "cut.mean((-3, -1)", "cut.sum((-3, -1)"),
    "the shares of two pictures exchanged": (
        "degradations", "torch.lerp(x0, self.table.other.to(x0), ", "torch.lerp(self.table.other.to(x0), x0, "),
    "the bound without L_T": (
        "encoding", "whole = prior_kl(F.codes, z) + data", "whole = data"),
    "L_T without the size of the codes": (
        "encoding", "return prior_kl(F.codes, F.encode(x0))", "return prior_kl(F.codes, F.encode(x0) * 0)"),
    "the code at the end for the datum": ("encoding", "starts_at_data = False", "starts_at_data = True"),
    "SNR_t - SNR_s for SNR_s - SNR_t": (
        "encoding", "a, _, c = noisy_bridge(F.codes, kernel, t, s)", "a, _, c = noisy_bridge(F.codes, kernel, s, t)"),
    "a guess that is not encoded": (
        "encoding", "return Dirac(encoder(posterior.mean))", "return Dirac(posterior.mean)"),
    "a code that is encoded twice": (
        "encoding", "return self.codes(self.encode(x0), t, eps)", "return self.codes(self.encode(self.encode(x0)), t, eps)"),
    "a/c for its square": ("encoding", "(a / c).square() / 2", "(a / c) / 2"),
    "the spread of drawn codes left out": ("encoding", "z, xt, t, s, kernel) + charge", "z, xt, t, s, kernel)"),
    "one step taken for all of them": ("encoding", "whole + (F.T - 1) * code_kl", "whole + code_kl"),
    "the first step priced like the others": ("encoding", "torch.randint(2, F.T + 1", "torch.randint(1, F.T"),
    "an encoder that the loss does not reach": ("encoding", "z = F.encode(x0)\n", "z = F.encode(x0).detach()\n"),
    "the mean code where a draw is charged": (
        "encoding", "if isinstance(kernel, MeanCode):", "if True:"),
}

# ---------------------------------------------------------------------------------------------------------------- the rules

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
         ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And}
NAMES = {"alpha": "sigma", "sigma": "alpha", "t": "s", "s": "t", "skip": "out", "mean": "var", "x0": "xt", "xt": "x0", "low": "high"}
DROPPED = {"sqrt", "square", "log", "exp", "abs", "softmax", "logsumexp", "log_softmax", "clamp_min", "clone", "double", "round"}


def mutate(node):
    """Wrong versions of one node: what to say, and the node to put in its place."""
    def changed(**fields):
        new = copy.copy(node)
        for k, v in fields.items(): setattr(new, k, v)
        return new
    kind = type(node)
    if kind is ast.BinOp and type(node.op) in SWAPS: yield "operator", changed(op=SWAPS[type(node.op)]())
    if kind is ast.BoolOp: yield "and/or", changed(op=SWAPS[type(node.op)]())
    if kind is ast.Compare and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        yield "comparison", changed(ops=[SWAPS[type(node.ops[0])]()])
    if kind is ast.UnaryOp and isinstance(node.op, (ast.USub, ast.Not)): yield "sign", node.operand
    if kind is ast.Constant and type(node.value) in (int, float):
        for d in 1, -1: yield f"{d:+}", changed(value=node.value + d)
    if kind is ast.Constant and type(node.value) is bool: yield "not", changed(value=not node.value)
    if kind is ast.Name and isinstance(node.ctx, ast.Load) and node.id in NAMES: yield "name", changed(id=NAMES[node.id])
    if kind is ast.Attribute and isinstance(node.ctx, ast.Load) and node.attr in NAMES: yield "name", changed(attr=NAMES[node.attr])
    if kind is ast.Attribute and node.attr == "alpha_bar": yield "alpha", changed(attr="alpha")
    if kind is ast.Call and isinstance(node.func, ast.Attribute):
        if node.func.attr in DROPPED and not isinstance(node.func.value, ast.Name) or node.func.attr in DROPPED and not node.args:
            yield "dropped", node.func.value
        if node.func.attr == "sample": yield "mean", ast.Attribute(node.func.value, "mean", ast.Load())
    if kind is ast.IfExp: yield "branches", changed(body=node.orelse, orelse=node.body)
    if kind is ast.keyword and node.arg == "generator" and isinstance(node.value, ast.Name):
        yield "generator", changed(value=ast.Constant(None))


IGNORED = (ast.JoinedStr, ast.Raise, ast.arg, ast.AnnAssign, ast.Import, ast.ImportFrom)


def places(node, path=()):
    """Every node below, with the way to it; annotations, messages, docstrings and imports left out."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"): continue
        for i, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, IGNORED):
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant): continue
                yield child, (*path, (field, i))
                yield from places(child, (*path, (field, i)))


def mutants(module):
    """name -> source, for every mutant of a module that the rules make."""
    tree, found = ast.parse((LIBRARY / f"{module}.py").read_text(encoding="utf-8")), {}
    for node, path in places(tree):
        for what, new in mutate(node):
            whole = copy.deepcopy(tree)
            parent = whole
            for field, i in path[:-1]: parent = getattr(parent, field) if i is None else getattr(parent, field)[i]
            field, i = path[-1]
            if i is None: setattr(parent, field, new)
            else: getattr(parent, field)[i] = new
            def said(n): return ast.unparse(n).replace("\n", " ")[:60]
            where = f"{module} in {owner(tree, path)}: {said(node)} -> {said(new)}"
            number = sum(k.startswith(where) for k in found)
            found[where + (f" #{number + 1}" if number else "")] = ast.unparse(ast.fix_missing_locations(whole))
    return found


def owner(tree, path):
    """The function or class that a place belongs to."""
    names, node = [], tree
    for field, i in path:
        node = getattr(node, field) if i is None else getattr(node, field)[i]
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.append(node.name)
    return ".".join(names) or "module"


# ------------------------------------------------------------------------------------------------------------- the killers


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module of the library from a given source."""
    def __init__(self, module, source): self.name, self.source = "udm_book." + module, source
    def find_spec(self, name, path, target=None): return importlib.util.spec_from_loader(name, self) if name == self.name else None
    def exec_module(self, module): exec(compile(self.source, self.name, "exec"), module.__dict__)


LEFT_OUT = re.compile("compiled|has_a_case")             # slow; looks at line numbers
FIXTURES = {"tmp_path", "monkeypatch"}                   # those that `called` can give


def cases(module):
    """The tests of a module as plain calls: every combination of their parameters; slow ones and other fixtures left out."""
    for name, f in list(vars(module).items()):
        if not name.startswith("test_") or not callable(f) or LEFT_OUT.search(name): continue
        marks = getattr(f, "pytestmark", [])
        if any(m.name in ("slow", "skip") for m in marks): continue
        axes = []
        for m in marks:
            if m.name != "parametrize": continue
            names = [n.strip() for n in m.args[0].split(",")]
            axes.append([dict(zip(names, v if len(names) > 1 else [v])) for v in m.args[1]])
        wanted = set(inspect.signature(f).parameters) - FIXTURES
        for combination in itertools.product(*axes):
            given = {k: v for part in combination for k, v in part.items()}
            if wanted <= given.keys(): yield f"{module.__name__}.{name}", f, given


def called(f, given):
    """The test, with the fixtures that it asks for."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        fixtures = {"tmp_path": Path(folder), "monkeypatch": patch}
        f(**given, **{name: fixtures[name] for name in FIXTURES & inspect.signature(f).parameters.keys()})


def verdict(module, source, files, only, seconds=100):
    """The first test that fails on the mutated library, or None. Runs in a fork."""
    import hypothesis
    import torch
    from conftest import HOOK
    hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, database=None, max_examples=12,
                                         phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate], report_multiple_bugs=False)
    hypothesis.settings.load_profile("mutants")
    HOOK.uninstall()
    torch.manual_seed(0)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("udm_book", "families", "strategies", "trainers") or name.startswith("test_"): del sys.modules[name]
    sys.meta_path.insert(0, Mutated(module, source))
    signal.alarm(seconds)                                                            # an endless loop is noticed too
    name = "import"
    try:
        for file in files or KILLERS[module]:
            for name, f, given in cases(importlib.import_module(file)):
                if re.search(only, name): called(f, given)
    except BaseException as e:
        return f"{name}: {type(e).__name__}"
    return None


def killed(module, source, files=(), only=""):
    """What `verdict` says, from a fork of this process: which test failed."""
    with tempfile.TemporaryFile("w+") as answer:
        if not (pid := os.fork()):
            with open(os.devnull, "w") as null: os.dup2(null.fileno(), 1), os.dup2(null.fileno(), 2)
            answer.write(verdict(module, source, files, only) or "")
            answer.flush()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        answer.seek(0)
        return answer.read() or (f"signal {status}" if status else "")


def with_edit(module, old, new):
    text = ast.unparse(ast.parse((LIBRARY / f"{module}.py").read_text(encoding="utf-8")))      # one line per statement
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {module}.py: bring CLASSICS up to date"
    return text.replace(old, new)


@pytest.mark.parametrize("module", ["objective", *(pytest.param(m, marks=pytest.mark.slow) for m in KILLERS if m != "objective")])
def test_the_killers_let_the_original_live(module):
    "Otherwise every mutant would count as noticed."
    assert not killed(module, (LIBRARY / f"{module}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CLASSICS)
def test_classic_errors_are_noticed(name):
    assert killed(CLASSICS[name][0], with_edit(*CLASSICS[name]))


@pytest.mark.parametrize("name, law", [
    ("the mean instead of a sample (collapsed loop)", "L4"), ("noise scaled by σ_t for σ_s", "L4"),
    ("the guess scaled by α_t for α_s", "L4"), ("the oracle forgets what the data weigh", "L4"),
    ("noise kept with 1 - ρ for √(1 - ρ²)", "L3")])
def test_the_laws_alone_notice_what_changes_a_distribution(name, law):
    """L3 and L4 compare samples with samples and know none of the formulas; N is large enough for these.

    (A wrong share ρ is no error to them: the theorem holds for every share.)
    """
    module, *edit = CLASSICS[name]
    assert f"test_laws.test_{law}" in killed(module, with_edit(module, *edit), ["test_laws"], law)


# Survivors: a pattern of their names, and why no test that runs here can notice them.
EQUIVALENT = {
    r"measure in error: 100 -> ": "how many rows at once",
    r"measure in guesses: 1 -> 2$": "the mean over all numbers, whatever the axes of a row",
    r"measure in report: 0 -> -?1$": "any row: all have the same names",
    r"measure in nearest: (1000 -> |0 -> -1$)": "how many rows at once; a row that is looked at twice changes no minimum",
    r"conditional in LabelledOracle.forward: -1 -> 1$": "the last of two axes",
    r"guidance in tilt.head: 0 -> -1$": "the only entry of a list",
    r"conditional in DropLabels.draw: u < self.share -> u <=": "a number of 53 random bits equals the share with chance 1e-16",
    r"forward in check_t: 1 -> 2": "an empty batch has no time that could be out of range",
    r"posterior in Laplace.sample: (m \+ self.scale \* sign|self.scale \* sign -> self.scale /)": "the law is symmetric and the sign is ±1",
    r"posterior in (per_row|inverse_cdf): -1 -> 1$": "an axis of size 1, anywhere behind the first",
    r"posterior in TokenLaw.sample: 0 -> (1|-1) #2": "only the shape of a column is taken, that of any",
    r"posterior in TokenLaw.sample: -1 -> 1 #[23]": "the last of two axes",
    r"reverse in MixNoise.__call__: (xt -> x0|t -> s #2)": "only shape, dtype and device are taken from it",
    r"reverse in _reverse: (len\(times\) - 1 -> len\(times\) \+ 1|1 -> [02]) #2": "the total on the progress bar, read by a test that needs pytest",
    r"reverse in (mixing: (alpha -> sigma( #2)?|t -> s)|coefficients: 0 -> -?1)$": "only dtype, device and shape are taken from it",
    r"schedule in Tables._shaped: False -> True": "a look-up copies, also out of an inference tensor",
    r"schedule in Tables._apply: True -> False": "tables have no children",
    r"schedule in Schedule.T: self.alpha -> self.sigma": "the tables have one length",
    r"schedule in Schedule.from_betas: (b.numel\(\) < 9 -> |9 -> |0 -> -1 #2)": "how many betas a message lists; the only axis",
    r"likelihood in log_cdf: (0 -> 1|0 -> -1 #2|x < 0 -> )": "where the other form is taken anyway; at 0 both hold",
    r"likelihood in module: 8 -> 9": "one more node of the quadrature",
    r"likelihood in log_between: ([01].0 -> |half \* \(mid)": "harmless numbers where the other way is taken; both hold where they meet",
    r"likelihood in log_between: 2 -> 1 #4": "a looser bound below 0 serves as well",
    r"likelihood in log_mass: mean -> var": "only its dtype is taken",
    r"likelihood in bits_per_dim: 0 -> ": "the size of any row",
    r"analytic in estimate_var: 0 -> -1 #[45]": "the only axis",
    r"analytic in estimate_var: 1 -> 0 #13": "at t = 0 the line through any entry and the first ends at the first",
    r"analytic in clip_var: schedule.alpha -> schedule.sigma": "tables of one shape",
    r"estimators in single_loss: x0 -> xt #3": "only its shape is taken",
    r"estimators in step_entropy: 0 -> -1": "the size of any row",
    r"oracle in Mixture.points: 0 -> -1": "the size of any row",
    r"elbo in _: sigma -> alpha #2": "only its shape and dtype are taken",
    r"data in ImageFolder\..*: 2 -> [13]( #3)?$": "to which line of the callers a warning points",
    r"data in read_image: 3 -> [24]$": "whatever is not 1 is read in colour",
    r"data in rows: 1 -> 0$": "empty sets are refused before",
    r"lines in load_lines: 1114112 -> ": "no file holds all characters but one",
    r"text in longest_copy: (len\(text\) - k -> len\(text\) \+ k|1 -> 2 #3)$": "pieces cut short equal none of full length",
    r"degradations in check_path: start < stop -> start <= stop": "a path never ends where it starts",
    r"degradations in Cover.pixels: .*.do -> ": "tables become float64 anyway",
    r"encoding in (_|encoding_loss|encoding_loss.look): xt -> x0$": "the divergence of two normal steps does not read the state",
    r"elbo in fold: 1 -> 2 #3": "noise of one more time is held; the pieces are the same",
    r"elbo in fold: (0 -> -1 #2|xt -> x0)": "any of the draws; there are b rows or no more than a chunk",
    r"batches in Batches.__init__: 1 -> 2 #2$": "stands for no pass: any negative number does",
    r"estimators in one_noise_loss: x0 -> xt #2$": "only shape and dtype are taken from it",
    r"oracle in Table.sample: 0 -> -?1$": "only the shape of a column is taken, that of any",
    r"guidance in label_gradient: (-1 -> 1|0 -> -1)$": "the last of two axes; the only input",
    r"resume in State.line: 0 -> -1$": "the only group of parameters",
    r"resume in compare: 5 -> 4$": "to which line of the callers a warning points",
    r"resume in (Record.begin: 2 -> 1|blame: 8 -> [79])$": "how far lines are indented, how many rows are named",
    r"batches in Batches.rows: 1 -> 0$": "an empty piece of the next pass",
    r"batches in (Batches.run: (0 -> 1|False -> True|not workers -> workers)|split: True -> False( #2)?)$":
        "which process makes a batch, and how it comes to the device",
    r"runs in (read_data|build|Run.sample|train): False -> True$": "whether a bar shows the progress",
    r"runs in read_data: 0 -> -1 #2$": "0 stands for a tenth, and never comes so far",
    r"runs in (Run.texts|train.show): 0 -> -?1$": "a count of characters, or of steps, that nobody reads",
    r"config in blur: 0 -> -?1$": "pictures of a run are square",
    r"config in (unet: 1 -> [02]( #2)?|tokens: 1 -> [02])$": "the rows of a trial, or of data that stand in where weights are loaded",
    r"config in Config.of: (1 -> 2|0 -> -1)$": "the first of the nearest names; the only one of a list",
    r"train in fit: (True -> False #[23]|False -> True)$": "speed, memory and how often the terminal is written to",
    r"train in (fit|Learner.advance): 0 -> -1$": "the only group of parameters",
    r"train in Learner.advance: True -> False$": "memory: gradients are made afresh, or filled with 0",
    r"train in Learner.judge: loss \+ self.norm -> loss - self.norm$": "finite, or not, for both signs: a norm is never -inf",
    r"train in (Learner.draws: 1 -> 2 #3|Learner.advance: self.of > 1 -> |Trainer.__init__: accumulate \* of -> |Trainer.run: 0 -> 1 #5)":
        "several processes, whose tests start anew and load no mutant",
    r"train in Trainer.run: (not \(self.main and|self.main and self.progress -> self.main or)": "the bar, read by a test that needs pytest",
    r"train in Trainer.run: 1 -> 2 #2$": "the second digit of a speed",
    r"edit in module: 1e\+30 -> 1e\+30": "one more or less is the same number",
    r"edit in Differing.table: (self.at_t\(table\) > NONE / 2 -> self.at_t\(table\) >= |2 -> [13])": "any bar between no chance and some",
    r"edit in Differing.sample: v < p": "a draw equals the chance once in 2**53",
    r"edit in MustDiffer.forward: 0.0 -> ": "the only logit above -inf may be any number",
    r"edit in _: (0.0 -> -?1.0|1.0 -> [02].0)$": "times a share of 0, or masked where that is 0",
    r"edit in _: 1 - idle -> ": "where a step may be idle, either Z + rest is t, and the factor is that of log 1, or the term is infinite",
    r"edit in restore: (change.double\(\) -> change|0 -> -?1)$": "chances move by 1e-7; only the shape of a column is taken",
    r"edit in check_single: s -> t$": "the times of a run carry their numbers together",
    r"samplers in inpaint: 2 -> 3": "a run of which the first step alone is taken",
    r"samplers in output_moments: (0 -> -1( #[23])?|1 -> 2 #4)$": "the only component; a table of zeros may be longer",
    r"samplers in Greedy.(bridge: 2 -> 1 #2|__call__: (x0 -> xt|xt -> x0))$": "0 times either; only dtype and shape are taken from it",
    r"cold in Cold.infer_noise: (x0 -> xt #3|0 -> -1)$": "dtype and device alone are taken from it; the only column",
    r"samplers in invert: t -> s$": "in the step that leaves the data the noise is found where it arrives: s is t there",
    r"network in TimeEmbedding.__init__: (4 -> 3|0 -> 1)$": "3 is odd and refused anyway; only the dtype of this tensor matters",
    r"network in (Stage.__init__: 0 -> -1|UNet.__init__: 8 -> 7 #2)$": "a range of -1 is empty too; 7 is no multiple of 8 and refused anyway",
    r"text in token_model: counts / counts.sum\(\) -> counts \* counts.sum\(\)": "all logits move by the same number",
    r"text in unfold: (8 -> [79]|0 -> -1 #[24])$": "the length of a name; the last of a list of one",
    r"hot in Hot.(infer_noise|step_posterior): (x0 -> xt|xt -> x0)": "only shape and dtype are taken from it",
    r"parameterization in module: alpha -> sigma": "ones and zeros in the shape of either",
    r"parameterization in (one_step_mix: alpha -> sigma #3|nelbo.on_x0: schedule.alpha -> )": "shape or dtype are taken from it",
    r"score in (jacobian|value_and_trace): 0 -> -1$": "the only input",
    r"score in value_and_trace: -1 -> 1$": "the last of two axes",
    r"score in ode_log_prob: 0 -> -1 #2": "the size of any row",
    r"score in (Heun.forward: xt -> x0 #[23]|DPMSolver2M.forward: (xt -> x0 #[23]|x0 -> xt( #2)?|1 -> [02])$)":
        "only dtype, device, shape or number of axes are taken from it",
    r"score in DPMSolver2M.forward: 0.0 -> -?1.0 #3": "steps in log-SNR are positive, so that no weight is +inf",
    r"oracle in Normal.sample: self.mean \+": "normal noise is symmetric",
    r"oracle in LinearOracle.__init__: (True -> False|var < 16 \*.* -> var <=|16 -> )": "another algorithm for the same inverse; a tolerance",
    r"oracle in TableOracle.__init__: abs.*< 1e-06 -> ": "a tolerance",
    r"oracle in MixturePosterior.sample: 0 -> -1": "the only column; the shape of any component",
    r"oracle in MixturePosterior.sample: self.means\[rows, k\] \+": "normal noise is symmetric",
    r"oracle in (MixturePosterior.nll|Oracle.forward|Oracle.log_prob|Oracle.score): -1 -> 1": "the last of two axes",
    r"oracle in Mixture.__init__: (0 -> -1$|abs.*<= 1e-06 -> |var.abs\(\) -> var|-1 -> 1)":
        "the size of any mean; a tolerance; a component without a positive eigenvalue fails either way; the last of two axes",
    r"mask in Exactly.infer: (fresh < bar -> |1 -> 2 #6)": "the number at the bar comes next either way; beyond 1 all come last",
    r"mask in Tokens.(log_prob: x0 -> xt|fits: x0 -> xt)": "only its shape is taken",
    r"mask in _: x0 -> xt #[35]": "masks are seen without x0; only its shape is taken",
    r"mask in bound_loss: x0 -> xt #2": "the prior term is one for all sentences of a length",
    r"mask in CarryOver.forward: 0.0 -> -?1.0": "the only finite logit",
}


@pytest.mark.slow
@pytest.mark.parametrize("module", KILLERS)
def test_generated_mutants_are_noticed(module):
    survivors = [name for name, source in mutants(module).items() if not killed(module, source)]
    unknown = [name for name in survivors if not any(re.match(pattern, name) for pattern in EQUIVALENT)]
    assert not unknown, f"{len(unknown)} mutants of {module} live:\n" + "\n".join(unknown)
    stale = [p for p in EQUIVALENT if p.startswith(f"{module} in") and not any(re.match(p, name) for name in survivors)]
    assert not stale, "these are noticed or gone; take them out of EQUIVALENT:\n" + "\n".join(stale)
