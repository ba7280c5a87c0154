#!/usr/bin/env python3
"""bench.py --tools make,ninja --n 100,1000 --reps 3 --work DIR [--bin snakemake=VENV/bin ...] [--cap 240] [--out FILE.jsonl]

Every repetition has a folder of its own, and folders are removed after the last step: a file system that does not hand out
inodes again for minutes after a removal (ext4 without a journal: up to six) would make whoever creates files next pay for it.
An invocation soon after another one suffers from it all the same. What was written before a repetition, such as by a build, is on
the disk before it begins.

Tools take turns, and every other repetition in the opposite order; a ratio compares two tools in the same repetition.
Steps per repetition: cold run, warm run, plan, late input changed + plan + run, first input changed + run.
Each line of the output is one step: wall seconds, peak RSS (MiB, largest single process), exit status, sink right or not.
"""
import argparse, json, os, shutil, signal, statistics as st, subprocess, sys, tempfile, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import dag, tools
TIME = shutil.which("time")


def go(argv, root, env, cap):
    e = dict(os.environ, **{k: (os.path.join(root, v) if v.startswith(".") and k != "PYTHONPATH" else v) for k, v in env.items()})
    t0 = time.perf_counter()
    with open(f"{root}/last.log", "wb") as log:
        if TIME:  # a small parent: a child forked off Python would inherit Python's peak RSS
            argv = [TIME, "-f", "%M", "-o", f"{root}/last.rss", *argv]
        p = subprocess.Popen(argv, cwd=root, env=e, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        end = t0 + cap
        pid = 0
        while not pid:
            pid, status, ru = os.wait4(p.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() > end:
                os.killpg(p.pid, signal.SIGKILL)
                pid, status, ru = os.wait4(p.pid, 0)
                return dict(wall=None, rss=ru.ru_maxrss / 1024, rc="cap")
            time.sleep(0.001 if time.perf_counter() - t0 < 2 else 0.01)
        wall = time.perf_counter() - t0
        p.returncode = 0
    rss = ru.ru_maxrss / 1024
    if TIME:
        try: rss = int(open(f"{root}/last.rss").read().split()[-1]) / 1024
        except Exception: pass
    return dict(wall=round(wall, 4), rss=round(rss, 1), rc=os.waitstatus_to_exitcode(status))


def installed(name, bins):
    return name in bins or shutil.which(name) is not None


def ratios(rows):
    """Wall time of each step over that of make in the same repetition: the median, and of a cold run the lowest and highest."""
    wall = {(r["n"], r["tool"], r["rep"], r["step"]): r["wall"] for r in rows if r["wall"] is not None}
    cells = {}
    for (n, tool, rep, step), seconds in wall.items():
        base = wall.get((n, "make", rep, step))
        if base and tool != "make":
            cells.setdefault((n, tool), {}).setdefault(step, []).append(seconds / base)
    print()
    for (n, tool), steps in cells.items():
        span = lambda s, r: f" [{min(r):.2f}, {max(r):.2f}]" if s == "cold" and len(r) > 1 else ""
        print(f"{tool} {n} over make |", " | ".join(f"{s} {st.median(r):.2f}{span(s, r)}" for s, r in steps.items()))


def turn(t, n, rep, work, cap, tell):
    """One repetition of one tool, all steps in a fresh folder; False when a step took too long to ask for another."""
    root = tempfile.mkdtemp(prefix=f"{t.name}-{n}-", dir=work)
    inp = dag.lay_out(n, root); t.write(n, root); os.sync()

    def step(what, argv, check=True):
        r = go(argv, root, t.env, cap)
        ok = None
        if check:
            try: ok = int(open(t.sink(n, root)).read()) == dag.expected(n, inp)
            except Exception: ok = False
        r.update(tool=t.name, n=n, rep=rep, step=what, right=ok, load=round(os.getloadavg()[0], 1))
        tell(r)
        return r["rc"] != "cap"

    def touch(p):
        time.sleep(0.02); inp[p] += 1000
        open(f"{root}/{p}", "w").write(f"{inp[p]}\n")

    if not step("cold", t.run): return False
    if not t.caches: return True
    if not step("warm", t.run): return False
    if t.status: step("status", t.status, False)
    if t.plan: step("plan-warm", t.plan, False)
    touch("in/late.txt")
    if t.plan: step("plan-late", t.plan, False)
    step("late", t.run); touch("in/0.txt"); step("first", t.run)
    return True


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--tools", default="make,ninja"); a.add_argument("--n", default="100")
    a.add_argument("--reps", type=int, default=3); a.add_argument("--work", required=True)
    a.add_argument("--bin", action="append", default=[]); a.add_argument("--cap", type=float, default=240)
    a.add_argument("--out"); a = a.parse_args()
    bins = dict(b.split("=", 1) for b in a.bin)
    os.makedirs(a.work, exist_ok=True)
    work = tempfile.mkdtemp(prefix="bench-", dir=os.path.abspath(a.work))
    rows = []

    def tell(row):
        rows.append(row); print(json.dumps(row), flush=True)
        if a.out: open(a.out, "a").write(json.dumps(row) + "\n")

    names = a.tools.split(",")
    for name in [name for name in names if not installed(name, bins)]:
        print(f"{name} is not installed: left out", flush=True)
        names.remove(name)
    for n in map(int, a.n.split(",")):
        left = [tools.ALL[name](os.path.abspath(bins[name]) if name in bins else "") for name in names]
        for rep in range(a.reps):
            # Neighbours in time are compared, and nobody is always first.
            left = [t for t in left if turn(t, n, rep, work, a.cap, tell)][::-1]
    print()
    order = lambda key: (key[1], names.index(key[0]))
    for k in sorted({(r["tool"], r["n"]) for r in rows}, key=order):
        rs = [r for r in rows if (r["tool"], r["n"]) == k]
        cell = []
        for s in dict.fromkeys(r["step"] for r in rs):
            w = [r["wall"] for r in rs if r["step"] == s and r["wall"] is not None]
            bad = [r for r in rs if r["step"] == s and (r["right"] is False or r["rc"] != 0)]
            cell.append(f"{s} {st.median(w):.3f}s" + ("!" if bad else "") if w else f"{s} >cap")
        print(k[0], k[1], "|", " | ".join(cell), f"| rss {max(r['rss'] for r in rs):.0f} MiB")
    ratios(rows)
    shutil.rmtree(work, ignore_errors=True)


main()
