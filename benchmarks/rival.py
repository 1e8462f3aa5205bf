"""Trains denoising-diffusion-pytorch on the images of one file and draws from it; quality.py starts this in an interpreter that has it.

    rival.py TRAIN.npy OUT --seed 0 --seconds 120 300       train, draw after each time
    rival.py TRAIN.npy OUT --seed 0 --steps 900 2300        the same, by numbers of steps

TRAIN.npy holds images (n, 1, 8, 8) in [0, 1]. Its own `Unet`, `GaussianDiffusion` and `Trainer` are used, on their defaults except where
`SETTINGS` says otherwise: its trainer is meant for 100,000 steps and more; a training of minutes wants larger steps and a shorter average.
One thing is replaced: the images come from memory, because `Trainer` would open PNG files in worker processes, which on two cores costs it
time.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from candidates import define_torchvision_operators

SETTINGS = dict(dim=32, dim_mults=(1, 2), timesteps=1000, sampling_timesteps=50, train_batch_size=128, train_lr=1e-3, ema_update_every=1)


def images(x: torch.Tensor, size: int):
    """Batches without end, in a new order each pass, as its own data loader makes them."""
    while True:
        yield from torch.utils.data.DataLoader(x, batch_size=size, shuffle=True)


def trainer(x: torch.Tensor, settings: dict, steps: int):
    """Its `Trainer` on the images `x`."""
    define_torchvision_operators()
    import denoising_diffusion_pytorch as library
    from PIL import Image

    net = library.Unet(settings["dim"], dim_mults=settings["dim_mults"], channels=x.shape[1])
    diffusion = library.GaussianDiffusion(
        net, image_size=x.shape[-1], timesteps=settings["timesteps"], sampling_timesteps=settings["sampling_timesteps"])
    with tempfile.TemporaryDirectory() as folder:
        for i in range(100):  # it counts the images of its folder; none is read
            Image.fromarray((255 * x[i, 0].numpy()).astype("uint8")).save(f"{folder}/{i}.png")
        made = library.Trainer(
            diffusion, folder, results_folder=f"{folder}/results", train_batch_size=settings["train_batch_size"], train_lr=settings["train_lr"],
            ema_update_every=settings["ema_update_every"],
            train_num_steps=steps, save_and_sample_every=10**9, augment_horizontal_flip=False, calculate_fid=False, amp=False)
    made.dl = images(x, settings["train_batch_size"])
    return made


def quietly(f, *args):
    """Without its progress bars, which print thousands of lines into a file."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return f(*args)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train"), parser.add_argument("out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--count", type=int, default=719)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings")
    args = parser.parse_args()
    settings = SETTINGS | {name: json.loads(value) for name, value in (s.split("=") for s in args.set)}
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    x = torch.from_numpy(np.load(args.train)).float()
    made = quietly(trainer, x, settings, 0)
    report = dict(parameters=sum(p.numel() for p in made.ema.model.parameters()), settings=settings, stages=[],
                  versions={"denoising-diffusion-pytorch": version("denoising-diffusion-pytorch"), "torch": torch.__version__})
    used = 0.0
    for k, goal in enumerate(args.steps or args.seconds):
        began = time.perf_counter()
        while made.step < goal if args.steps else used + time.perf_counter() - began < goal:
            made.train_num_steps = min(goal, made.step + 5) if args.steps else made.step + 5
            quietly(made.train)
        used += time.perf_counter() - began
        averaged = copy.deepcopy(made.ema.ema_model).eval()
        began = time.perf_counter()
        for draw in range(args.draws):
            torch.manual_seed(10_000 * args.seed + 100 * k + draw)
            parts = math.ceil(args.count / 120)
            drawn = torch.cat([quietly(averaged.sample, len(part)) for part in torch.arange(args.count).tensor_split(parts)])
            np.save(Path(args.out) / f"{k}-{draw}.npy", drawn.numpy())
        report["stages"].append(dict(steps=made.step, seconds=used, images=made.step * settings["train_batch_size"] / used,
                                     drawing=(time.perf_counter() - began) / args.draws))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
