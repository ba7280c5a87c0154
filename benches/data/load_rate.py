"""Images a second of one core: our loader beside Python's webdataset and Pillow, on the same files, in one run.

    python benches/data/load_rate.py target/release/examples/load_rate [--images N] [--rounds N]

Both read 512-class JPEGs from a tar shard and from a folder, decode, resize by `fix_pixels` to 512 (docs/spec/data.md
section 3, bicubic), and make f32 planes in -1..1. Rounds alternate; each side's best round counts, in CPU time, so that
other programs on the machine matter little. The outputs are compared first. Needs webdataset, Pillow and NumPy.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
try:
    import numpy as np
    import PIL
    import webdataset as wds
    from PIL import Image
except ImportError as error:
    sys.exit(f"{error}: python3 -m venv venv && venv/bin/pip install webdataset pillow numpy, then PYTHON=venv/bin/python")

SIZE, UNIT = 512, 32
SIDES = [(640, 480), (512, 512), (768, 512), (600, 800), (1024, 1024), (512, 683)]


def photograph(width, height, number):
    """Noise of several scales: about the bytes and the detail of a photograph."""
    random = np.random.default_rng(number)
    image = np.zeros((height, width, 3), np.float32)
    for cells, weight in [(4, 60), (16, 40), (64, 22), (256, 9)]:
        small = random.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(small[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            image[..., channel] += weight * np.asarray(plane)
    return Image.fromarray(np.clip(image + 128, 0, 255).astype(np.uint8))


def write_set(folder, count):
    """Writes the same pictures as a folder with `metadata.jsonl` and as a tar shard; returns their mean size in bytes."""
    images = folder / "folder"
    images.mkdir()
    total = 0
    with open(images / "metadata.jsonl", "w") as index, tarfile.open(folder / "shard.tar", "w") as shard:
        for number in range(count):
            name = f"{number:05}.jpg"
            file = images / name
            photograph(*SIDES[number % len(SIDES)], number).save(file, quality=90)
            total += file.stat().st_size
            caption = f"picture {number}"
            index.write(json.dumps({"file_name": name, "text": caption}) + "\n")
            shard.add(file, name)
            entry = tarfile.TarInfo(f"{number:05}.json")
            data = json.dumps({"caption": caption}).encode()
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
    return total / count


def numbers(image):
    """Pillow's image as f32 planes in -1..1 after `fix_pixels`."""
    image = image.convert("RGB")
    width, height = image.size
    ratio = SIZE / math.sqrt(height * width)
    target = tuple(math.ceil(side * ratio / UNIT) * UNIT for side in (width, height))
    image = image.resize(target)
    pixels = np.asarray(image).astype(np.float32)
    pixels *= 2 / 255
    pixels -= 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def from_tar(folder):
    """webdataset's own pipeline, decoded by Pillow."""
    dataset = wds.WebDataset(str(folder / "shard.tar"), shardshuffle=False, empty_check=False)
    for image, _ in dataset.decode("pil").to_tuple("jpg", "json"):
        yield numbers(image)


def from_folder(folder):
    """Pillow on files."""
    for line in open(folder / "folder" / "metadata.jsonl"):
        with Image.open(folder / "folder" / json.loads(line)["file_name"]) as image:
            yield numbers(image)


def time_python(source, folder):
    started = time.process_time()
    count = sum(1 for _ in source(folder))
    return count / (time.process_time() - started)


def ours(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def time_ours(program, dataset):
    found = json.loads(ours(program, "time", dataset, SIZE))
    return found["images"] / found["cpu"]


def compare(program, folder, dataset, count=12):
    """Returns the largest and mean difference of the numbers, in 8-bit levels."""
    dump = folder / "dump"
    ours(program, "dump", dataset, SIZE, count, dump)
    values = np.fromfile(dump, np.float32)
    largest, means, at = 0.0, [], 0
    for _, theirs in zip(range(count), from_folder(folder)):
        width, height = (int(side) for side in values[at : at + 2])
        mine = values[at + 2 : at + 2 + 3 * width * height].reshape(3, height, width)
        at += 2 + mine.size
        assert mine.shape == theirs.shape, f"{mine.shape} beside {theirs.shape}"
        difference = np.abs(mine - theirs) * 127.5
        largest = max(largest, float(difference.max()))
        means.append(float(difference.mean()))
    return largest, sum(means) / len(means)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program")
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_set(folder, options.images)
        for source, path in [("tar", folder / "shard.tar"), ("folder", folder / "folder")]:
            ours(options.program, "prepare", path, folder / f"prepared-{source}")
        largest, mean = compare(options.program, folder, folder / "prepared-folder")
        print(f"{options.images} JPEGs of {size / 1000:.0f} kB; Pillow {PIL.__version__}, NumPy {np.__version__}")
        print(f"outputs differ by {largest:.1f} levels at most, {mean:.2f} in the mean")
        if largest > 8 or mean > 1:
            sys.exit("the outputs are not the same")
        print("source  ours  python  ratio   (images a second of one core, best of "
              f"{options.rounds} rounds in turn)")
        for source, theirs in [("tar", from_tar), ("folder", from_folder)]:
            rates = ([], [])
            for _ in range(options.rounds):
                rates[0].append(time_ours(options.program, folder / f"prepared-{source}"))
                rates[1].append(time_python(theirs, folder))
            best = [max(rate) for rate in rates]
            print(f"{source:<6} {best[0]:5.0f} {best[1]:7.0f}  {best[0] / best[1]:5.2f}")


if __name__ == "__main__":
    main()
