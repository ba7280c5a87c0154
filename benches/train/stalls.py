#!/usr/bin/env python3
"""stalls.py DEEPGEN [--iters 300] [--every 50]: what a training step waits for, measured by the training itself.

Runs stages 1 and 2 of pipelines/full.toml (profile small) with a checkpoint every 50 iterations, in a folder of results of
its own, and reads from the manifests how the time of a step was spent: on the loader, on checkpoints, on computing. The
first batch of a run, for which nothing could be prepared before, counts too. Fails when the loader takes more than 2 % of a
step or checkpoints more than 5 %.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

MOST_LOADER, MOST_CHECKPOINT = 0.02, 0.05


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("deepgen")
    arguments.add_argument("--iters", type=int, default=300)
    arguments.add_argument("--every", type=int, default=50)
    given = arguments.parse_args()
    command = [given.deepgen, "run", "pipelines/full.toml", "--profile", "small", "--to", "sft", "--quiet"]
    for node in ("pretrain", "sft"):
        command += ["--set", f"{node}.train.max_iters={given.iters}", "--set", f"{node}.checkpoint.every={given.every}"]
    command += ["--set", "pretrain.warm_start.iters=0"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "--artifacts", folder], check=True)
        manifests = [json.loads(path.read_text()) for path in pathlib.Path(folder).glob("store/*/manifest.json")]
    print("\n| stage | step, ms | loader | checkpoints | peak memory, GiB |\n|---|---|---|---|---|")
    is_met = True
    for node in ("pretrain", "sft"):
        spent = next(manifest["throughput"] for manifest in manifests if manifest["node"] == node)
        step = spent["time/step_seconds"]
        loader, checkpoint = spent["time/data_wait_seconds"] / step, spent["time/checkpoint_seconds"] / step
        is_met &= loader <= MOST_LOADER and checkpoint <= MOST_CHECKPOINT
        memory = spent["memory/process_peak_gib"]
        print(f"| {node} | {step * 1e3:.1f} | {loader:.2%} | {checkpoint:.2%} | {memory:.2f} |")
    if not is_met:
        sys.exit(f"more than {MOST_LOADER:.0%} for the loader or {MOST_CHECKPOINT:.0%} for checkpoints")


if __name__ == "__main__":
    main()
