#!/usr/bin/env python3
"""bench.py --tools make,ninja --n 100,1000 --reps 3 --work DIR [--bin snakemake=VENV/bin ...] [--cap 240] [--out FILE.jsonl]

Every repetition has a folder of its own, and folders are removed after the last step: a file system that does not hand out
inodes again for minutes after a removal (ext4 without a journal: up to six) would make whoever creates files next pay for it.
An invocation soon after another one suffers from it all the same. What was written before a repetition, such as by a build, is on
the disk before it begins.

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
    """Wall time of each step over that of the same step of make, at each size."""
    wall = {}
    for r in rows:
        if r["wall"] is not None:
            wall.setdefault((r["n"], r["tool"], r["step"]), []).append(r["wall"])
    print()
    for n, tool in dict.fromkeys((n, tool) for n, tool, _ in wall):
        base = {s: st.median(w) for (m, t, s), w in wall.items() if (m, t) == (n, "make")}
        mine = {s: st.median(w) for (m, t, s), w in wall.items() if (m, t) == (n, tool)}
        cell = [f"{s} {mine[s] / base[s]:.2f}" for s in mine if base.get(s)]
        if cell and tool != "make":
            print(f"{tool} {n} over make |", " | ".join(cell))


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
    for n in map(int, a.n.split(",")):
        for name in a.tools.split(","):
            if not installed(name, bins):
                print(f"{name} is not installed: left out", flush=True)
                continue
            t = tools.ALL[name](os.path.abspath(bins[name]) if name in bins else "")
            for rep in range(a.reps):
                root = tempfile.mkdtemp(prefix=f"{name}-{n}-", dir=work)
                inp = dag.lay_out(n, root); t.write(n, root); os.sync()

                def step(what, argv, check=True):
                    r = go(argv, root, t.env, a.cap)
                    ok = None
                    if check:
                        try: ok = int(open(t.sink(n, root)).read()) == dag.expected(n, inp)
                        except Exception: ok = False
                    r.update(tool=name, n=n, rep=rep, step=what, right=ok, load=round(os.getloadavg()[0], 1))
                    rows.append(r); print(json.dumps(r), flush=True)
                    if a.out: open(a.out, "a").write(json.dumps(r) + "\n")
                    return r["rc"] != "cap"

                def touch(p):
                    time.sleep(0.02); inp[p] += 1000
                    open(f"{root}/{p}", "w").write(f"{inp[p]}\n")

                if not step("cold", t.run): break
                if not t.caches: continue
                if not step("warm", t.run): break
                if t.status: step("status", t.status, False)
                if t.plan: step("plan-warm", t.plan, False)
                touch("in/late.txt")
                if t.plan: step("plan-late", t.plan, False)
                step("late", t.run); touch("in/0.txt"); step("first", t.run)
    print()
    for k in dict.fromkeys((r["tool"], r["n"]) for r in rows):
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
